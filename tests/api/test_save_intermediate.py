"""`save_intermediate`: the depthwise result given to the backward, on every way that a call can take."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_sepconv import SeparableConv2d, separable_conv2d, use_backend
from fused_sepconv.explain import explain
from fused_sepconv.ops.launching import preferring
from fused_sepconv.planning import plan as plans
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import INSTANCES, plan, saving_pays
from fused_sepconv.planning.problem import Kernels
from tests.planning.test_plan import MIDDLE
from tests.support.calls import leaves
from tests.support.cases import named, two_convolutions
from tests.support.closeness import close

CASES = named(
    "plain", "all six tensors", "relu thrice", "elu thrice", "gelu thrice", "everything", "same, stride 2, even size",
    "unbatched", "batch 0",
)  # fmt: skip


def differentiate(function, inputs, **options):
    """(y, every gradient, the shapes of what the forward saved)."""
    shapes = []

    def keep(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(**inputs, **options)
    asking = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return y, torch.autograd.grad(y.square().sum(), asking), shapes


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.cases(CASES)
def test_the_gradients_are_the_same_and_the_depthwise_result_is_saved(target, dtype, case):
    inputs = leaves(case, dtype, target.device)
    y, right, without = differentiate(separable_conv2d, inputs, **case.options, save_intermediate=False)
    for save in (True, "auto"):
        ours, found, saved = differentiate(separable_conv2d, inputs, **case.options, save_intermediate=save)
        close((ours, *found), (y, *right))
        n, _, *size = y.shape if y.dim() == 4 else (1, *y.shape)
        kept = n, inputs["depthwise_weight"].shape[0], *size
        if save is True or (target.device, target.backend) == ("cpu", "auto"):
            assert saved.count(kept) > without.count(kept)
    close(right, differentiate(case.definition, inputs, **case.options)[1])


def test_what_no_gradient_reads_is_not_saved():
    module = SeparableConv2d(4, 6, 3, padding=1, activation="relu", dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)

    def saved():
        return len(differentiate(lambda x: module(x), {"x": x})[2])

    everything = saved()
    module.pointwise.weight.requires_grad_(False)
    assert saved() == everything - 1
    module.mid_activation = "relu"
    assert saved() == everything


@pytest.mark.parametrize("dynamic", (False, pytest.param(True, marks=pytest.mark.full)), ids=("static", "dynamic"))
def test_a_compiled_graph_saves_it_too(dynamic):
    (case,) = named("relu thrice")
    inputs = leaves(case)
    right = differentiate(case.definition, inputs, **case.options)[1]
    counts = []
    for save in (False, True, "auto"):
        torch.compiler.reset()
        compiled = torch.compile(separable_conv2d, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        _, found, saved = differentiate(compiled, inputs, **case.options, save_intermediate=save)
        close(found, right)
        counts.append(len(saved))
    assert counts[0] < counts[1] == counts[2]


def test_flops_hooks_second_derivatives_checkpoints_and_transforms():
    """Everything that goes through the operator, or reads what is saved in another way."""
    (case,) = named("gelu thrice")
    inputs = leaves(case)
    asking, counted = list(inputs.values()), set()
    for save in (True, False):

        def function(*values, save=save):
            options = {**case.options, "save_intermediate": save}
            return separable_conv2d(**dict(zip(inputs, values, strict=True)), **options)

        assert torch.autograd.gradcheck(function, asking, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, asking, fast_mode=True)
        right = torch.autograd.grad(case.definition(**inputs, **case.options).square().sum(), asking)
        checkpointed = torch.utils.checkpoint.checkpoint(function, *asking, use_reentrant=False)
        close(torch.autograd.grad(checkpointed.square().sum(), asking), right)
        with torch.autograd.graph.save_on_cpu():
            y = function(*asking)
        close(torch.autograd.grad(y.square().sum(), asking), right)
        with FlopCounterMode(display=False) as flops:
            close(torch.autograd.grad(function(*asking).square().sum(), asking), right)
        counted.add(flops.get_total_flops())
        gradient = torch.func.grad(lambda *values: function(*values).square().sum(), tuple(range(len(asking))))
        close(gradient(*asking), right)
        batch = torch.stack([inputs["x"], 2 * inputs["x"]]).detach()
        mapped = torch.vmap(lambda x, function=function: function(x, *asking[1:]))(batch)
        close(mapped[1], function(2 * inputs["x"], *asking[1:]))
    assert len(counted) == 1


def test_the_operator_is_called_with_and_without_it():
    (case,) = named("plain")
    inputs = leaves(case)
    arguments = [*inputs.values(), *[None] * (6 - len(inputs)), [1, 1], [0] * 4, [1, 1], None, None, None, "auto"]
    op = torch.ops.fused_sepconv.separable_conv2d
    right = two_convolutions(**inputs)
    for save in ((), (None,), (True,), (False,)):
        y = op(*arguments, *save)
        close([y], [right])
        close(torch.autograd.grad(y.sum(), list(inputs.values())), torch.autograd.grad(
            two_convolutions(**inputs).sum(), list(inputs.values())))  # fmt: skip
        if save in ((), (True,)):
            torch.library.opcheck(op.default, (*arguments, *save))


def test_autocast_saves_in_the_dtype_it_computes_in():
    module = SeparableConv2d(4, 6, 3, padding=1, save_intermediate=True)
    dtypes = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (dtypes.append((t.shape, t.dtype)), t)[1], lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = module(torch.randn(2, 4, 6, 6))
    assert (torch.Size([2, 4, 6, 6]), torch.bfloat16) in dtypes
    y.sum().backward()


@pytest.mark.parametrize("value, error", (("yes", ValueError), (1, TypeError), (None, TypeError)))
def test_other_values_are_refused(value, error):
    x, depthwise, pointwise = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3), torch.randn(4, 2, 1, 1)
    with pytest.raises(error, match="save_intermediate"):
        separable_conv2d(x, depthwise, pointwise, save_intermediate=value)
    with pytest.raises(error, match="save_intermediate"):
        SeparableConv2d(2, 4, 3, save_intermediate=value)


# The plan


@pytest.mark.quick
def test_saving_spares_the_second_depthwise_forward():
    device, kernels = DEVICES["H200"], Kernels(frozenset(INSTANCES))
    backward = replace(MIDDLE, direction="backward")
    split, given = (
        next(c for c in plan(problem, device, kernels).candidates if c.family == "split")
        for problem in (backward, replace(backward, saved=True))
    )
    assert split.recomputes
    assert not given.recomputes
    assert split.bytes - given.bytes >= 2 * MIDDLE.intermediate_bytes  # x is read and t written once less
    assert given.predicted_seconds < split.predicted_seconds
    assert saving_pays(MIDDLE, device, kernels, "auto")
    assert {c.family for c in plan(replace(MIDDLE, saved=True), device, kernels).candidates} == {"pytorch", "split"}


@pytest.mark.quick
def test_where_the_backward_runs_nothing_again_there_is_nothing_to_save(monkeypatch):
    device, kernels = DEVICES["H200"], Kernels(frozenset(INSTANCES))
    assert not saving_pays(MIDDLE, device, kernels, "fused", "simt")
    assert saving_pays(MIDDLE, device, kernels, "fused", "split")
    assert saving_pays(MIDDLE, device, Kernels(frozenset(), "none"), "auto")
    assert not saving_pays(MIDDLE, device, Kernels(frozenset(), "none"), "fused")
    assert plans.SAVING_FAMILIES


def test_explain_tells_what_is_saved():
    x = torch.empty(64, 728, 19, 19, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    module = SeparableConv2d(728, 728, 3, padding=1, bias=False, dtype=torch.bfloat16, device="meta")
    found = explain(module, x, device="H200")
    size = 64 * 728 * 19 * 19 * 2
    assert found.saved_bytes == found.layers[0][1].saved_bytes == size
    assert f"{size / 1e6:.1f} MB" in str(found)
    assert found.as_dict()["saved_bytes"] == size
    module.save_intermediate = False
    assert explain(module, x, device="H200").saved_bytes == 0
    with use_backend("reference"):
        assert explain(SeparableConv2d(4, 4, 3), torch.empty(1, 4, 6, 6)).saved_bytes == 4 * 4 * 4 * 4


# Emulated, from here on (the fixture lasts as long as the module)


SMALL = torch.randn(2, 8, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "activations", ((None, None), ("relu", None), ("relu", "gelu"), ("gelu", None), ("silu", "elu"))
)
@pytest.mark.parametrize("bf16", (False, True), ids=("float32", "bfloat16"))
def test_split_reads_what_its_forward_saved(plain, activations, bf16):
    mid, last = activations
    module = SeparableConv2d(8, 8, 3, padding=1, pre_activation="relu", mid_activation=mid, activation=last)
    x = SMALL.float()
    if bf16:
        module, x = module.bfloat16(), x.bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    results, launched = [], []
    with preferring("split"):
        for save in (False, True):
            module.save_intermediate = save
            plain.executed(), module(x).sum().backward()
            before = plain.executed()
            y = module(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
            launched.append({name: count - before.get(name, 0) for name, count in plain.executed().items()})
    close(*results, 0.05 if bf16 else 1e-4)
    forwards = [sum(count for name, count in counts.items() if "forward" in name) for counts in launched]
    assert forwards[1] == 1 < forwards[0]
