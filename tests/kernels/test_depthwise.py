"""The depthwise kernels by themselves, run on the CPU: right, in every order, race-free, and no byte read twice."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_sepconv
from fused_sepconv.families.depthwise import launch as depthwise_launch
from fused_sepconv.families.depthwise import nchw, nhwc
from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.ops import calls, launching, problems
from fused_sepconv.ops.arguments import DepthwiseArguments
from fused_sepconv.ops.operators import DEPTHWISE_CONV2D
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.problem import DepthwiseProblem, NhwcTiling
from tests.support.cases import (
    ACTIVATIONS,
    CASES,
    DEPTHWISE,
    FEATURES,
    XCEPTION,
    Case,
    four_sides,
    named,
    pair,
    two_convolutions,
)
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import in_every_schedule, planned_for

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LIGHT = tuple(
    case for case in DEPTHWISE if math.prod((case.N, case.K, *case.output_size, *pair(case.kernel))) < 300_000
)

FAMILY = "depthwise"


def depthwise_forward(tensors, arguments, backend):
    """The depthwise operator's output by the kernels that the plan chooses."""
    return calls.find(DEPTHWISE_CONV2D, tuple(tensors), arguments, backend).forward(*tensors)


def depthwise_backward(grad_output, tensors, output, arguments, backend, mask):
    """Its gradients, None where the mask does not ask."""
    return calls.find(DEPTHWISE_CONV2D, tuple(tensors), arguments, backend).backward(grad_output, tensors, output, mask)


def arguments_of(case: Case) -> DepthwiseArguments:
    stride, dilation = pair(case.stride), pair(case.dilation)
    sides = four_sides(case.padding, (case.H, case.W), pair(case.kernel), stride, dilation)
    return DepthwiseArguments(stride, sides, dilation, case.pre_activation, case.mid_activation)


def inputs(case: Case, dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """x, weight, bias."""
    tensors = case.tensors()
    x = tensors["x"].to(dtype).contiguous(memory_format=FORMATS[layout])
    bias = tensors.get("depthwise_bias")
    return [x, tensors["depthwise_weight"].to(dtype), None if bias is None else bias.to(dtype)]


def grad_like(y: Tensor) -> Tensor:
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.empty_like(y).copy_(noise)


def ours(case: Case, tensors: list[Tensor | None]) -> list[Tensor]:
    """The output, then the gradients of x, weight and, if there is one, bias."""
    arguments = arguments_of(case)
    y = depthwise_forward(tuple(tensors), arguments, "fused")
    mask = (True, True, tensors[2] is not None)
    gradients = depthwise_backward(grad_like(y), tuple(tensors), None, arguments, "fused", mask)
    return [y, *(grad for grad in gradients if grad is not None)]


def theirs(case: Case, tensors: list[Tensor | None]) -> list[Tensor]:
    """The same of PyTorch's own operators."""
    arguments = arguments_of(case)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    x, weight, bias = leaves
    top, bottom, left, right = arguments.padding
    z = F.pad(ACTIVATIONS[case.pre_activation](x), (left, right, top, bottom))
    z = F.conv2d(z, weight, bias, arguments.stride, 0, arguments.dilation, groups=case.C)
    y = ACTIVATIONS[case.mid_activation](z)
    grad = grad_like(y.detach())
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad)]


@pytest.mark.parametrize(
    "sms, widest",
    [
        pytest.param(132, False, id="many blocks"),
        pytest.param(1, False, id="few", marks=pytest.mark.full),
        pytest.param(1, True, id="wide"),
    ],
)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.checked_on(LIGHT, plain=[case for case in DEPTHWISE if case not in LIGHT])
@pytest.mark.cases(DEPTHWISE)
def test_every_schedule_gives_the_same_bits_and_the_right_ones(native, case, layout, sms, widest):
    tensors = inputs(case, torch.float32, layout)
    with planned_for(sms, widest):
        results = in_every_schedule(native, lambda: ours(case, tensors))
    exact = theirs(case, [None if tensor is None else tensor.double() for tensor in tensors])
    for mine, right in zip(results, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=3e-6 * float(right.abs().max()))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.dtypes(torch.float16, torch.bfloat16)  # float32 is above
@pytest.mark.cases(LIGHT, full=DEPTHWISE)
def test_as_close_as_eager_in_16_bits(plain, case, dtype, layout):
    tensors = inputs(case, dtype, layout)
    with launching.preferring("depthwise"):
        results = ours(case, tensors)
    eager = theirs(case, tensors)
    exact = theirs(case, [None if tensor is None else tensor.double() for tensor in tensors])
    for mine, other, right in zip(results, eager, exact, strict=True):
        assert_as_close_as_eager(mine, other, right)


@pytest.mark.checked_on(())
@pytest.mark.quick
def test_every_instance_is_executed(native):
    native.reset_counters()
    for kernel in (3, 5, 7):
        for stride in (1, 2):
            case = Case("one", 1, 8, 5, 5, 1, kernel=kernel, padding=kernel // 2, stride=stride)
            dilated = dataclasses.replace(case, stride=1, padding=kernel - 1, dilation=2)
            for dtype in DTYPES:
                for layout in FORMATS:
                    ours(case, inputs(case, dtype, layout))
                ours(dilated, inputs(dilated, dtype, "nchw"))
    generic = Case("generic", 1, 3, 3, 3, 1, kernel=2)
    for dtype in (torch.float64, *DTYPES):
        for layout in FORMATS:
            ours(generic, inputs(generic, dtype, layout))
    assert {name for name in depthwise.INSTANCES if "normalised" not in name} <= set(native.executed())


@pytest.mark.parametrize("layout", FORMATS)
def test_the_fast_kernels_run_where_they_can(plain, layout):
    for case in (case for case in DEPTHWISE if case.name != "one pixel"):  # which is NCHW as much as NHWC
        with launching.preferring("depthwise"):
            plain.reset_counters()
            ours(case, inputs(case, torch.bfloat16, layout))
        ran = plain.executed()
        dilated = case.dilation != 1
        strides, dilations = pair(case.stride), pair(case.dilation)
        common = tuple(map(math.gcd, strides, dilations))
        fast = layout == "nhwc" or not dilated or strides == common
        fast_back = fast and case.multiplier == 1 and not (dilated and max(common) > 1)
        assert any(name.startswith(f"depthwise_forward_{layout}") for name in ran) == fast, case
        assert any(name.startswith(f"depthwise_backward_{layout}") for name in ran) == fast_back, case
        # In the one pass over them, through the mid-activation too: no step of its own computes the forward again.
        again = bool(case.mid_activation) and not fast_back
        assert sum(count for name, count in ran.items() if "depthwise_forward" in name) == 1 + again, case


@pytest.mark.cases([case for case in DEPTHWISE if case.mid_activation])
def test_where_shared_memory_is_short_a_step_of_its_own_goes_through_the_mid_activation(plain, case):
    tensors = inputs(case, torch.float32, "nhwc")
    problem = problems.depthwise_problem_of("backward", tuple(tensors), arguments_of(case))
    devices = (dataclasses.replace(DEVICES["H200"], shared_bytes=1024 * kib) for kib in range(1, 228))
    candidates = (depthwise.best(problem, device, problems.ALL_KERNELS) for device in devices)
    candidate = next(candidate for candidate in candidates if candidate.family == "depthwise")
    assert len(candidate.steps) == 1
    y = depthwise_forward(tuple(tensors), arguments_of(case), "fused")
    mask = (True, True, tensors[2] is not None)
    grad_output = grad_like(y)
    run = depthwise_launch.Backward(candidate, problem, grad_output, tuple(tensors), None, mask)
    grads = run(grad_output, tuple(tensors), None)
    exact = theirs(case, [None if tensor is None else tensor.double() for tensor in tensors])
    for mine, right in zip((grad for grad in grads if grad is not None), exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=3e-6 * float(right.abs().max()))


UNREAD = (
    Case("unread", 1, 8, 6, 6, 1, stride=2, padding=0, mid_activation="silu"),
    Case("unread beside several tiles", 1, 40, 22, 46, 1, kernel=5, stride=2, padding=0, mid_activation="silu"),
)


@pytest.mark.parametrize("sms, widest", [(132, False), (3, False), (1, True)], ids=["many blocks", "few", "wide"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.cases(UNREAD)
def test_what_no_output_reads_makes_no_gradient_of_x(plain, case, layout, sms, widest):
    """The last row and column: an output that read them would lie past the end, and have no gradient to multiply."""
    x, weight, _ = inputs(case, torch.float32, layout)
    x[:, :, -1], x[:, :, :, -1] = torch.nan, torch.nan
    grad = grad_like(torch.empty(1, case.K, *case.output_size).contiguous(memory_format=FORMATS[layout]))
    mask = (True, False, False)
    with launching.preferring("depthwise"), planned_for(sms, widest):
        grad_x, _, _ = depthwise_backward(grad, (x, weight, None), None, arguments_of(case), "fused", mask)
    assert grad_x[:, :, :-1, :-1].abs().min() > 0
    assert not grad_x[:, :, -1].any() and not grad_x[:, :, :, -1].any()


@pytest.mark.parametrize("offset, narrower", [(1, 0), (0, 1)], ids=["odd address", "odd stride"])
def test_what_is_not_aligned_goes_to_the_generic_kernels(native, offset, narrower):
    case = DEPTHWISE[0]
    x, weight, _ = inputs(case, torch.float16, "nhwc")
    wide = torch.zeros(2, 9, 9, 64 + offset + narrower, dtype=torch.float16)[..., offset : 64 + offset]
    view = wide.permute(0, 3, 1, 2).copy_(x)
    expected = ours(case, [x, weight, None])
    native.reset_counters()
    actual = ours(case, [view, weight, None])
    assert not any(name.startswith("depthwise") for name in native.executed())
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-3, atol=2e-3 * float(right.abs().max()))


def test_a_gradient_of_another_layout_is_read_right(native):
    case = DEPTHWISE[0]
    tensors = inputs(case, torch.float32, "nhwc")
    grad = grad_like(torch.empty(2, 64, 9, 9))
    results = [
        depthwise_backward(g, tuple(tensors), None, arguments_of(case), "fused", (True, True, False))
        for g in (grad, grad.contiguous(memory_format=torch.channels_last))
    ]
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_a_gradient_is_the_same_when_it_is_the_only_one_asked_for(native, mask):
    case = DEPTHWISE[1]
    tensors = tuple(inputs(case, torch.float32, "nhwc"))
    arguments = arguments_of(case)
    grad = grad_like(depthwise_forward(tensors, arguments, "fused"))
    whole = depthwise_backward(grad, tensors, None, arguments, "fused", (True, True, True))
    alone = depthwise_backward(grad, tensors, None, arguments, "fused", mask)
    for wanted, one, all_ in zip(mask, alone, whole, strict=True):
        assert torch.equal(one, all_) if wanted else one is None


@pytest.mark.parametrize("dtype, ways", [("float32", 4), ("float16", 2)])
def test_the_plan_counts_the_bank_conflicts_of_nchw(dtype: str, ways: int) -> None:
    """Stride 2 in float32: neighbouring lanes are four words apart, so a warp meets every fourth bank four times."""
    size = 4 if dtype == "float32" else 2
    words = [lane * nchw.COLUMNS * 2 * size // 4 for lane in range(32)]
    assert max(Counter(word % 32 for word in set(words)).values()) == ways
    strided = nchw.NchwTraits("forward", 3, 2, False, dtype)
    window, values = 5 * 5, 2 * nchw.COLUMNS
    assert strided.shared_cycles == window * ways + values * ways // 2


# ---- the split family: these kernels, with PyTorch's own 1x1


SMALL = tuple(case for case in CASES if case.multiplications < 60_000 and case.N is not None)


def forward_and_back(function, tensors: dict[str, Tensor], options: dict) -> list[Tensor]:
    y = function(**tensors, **options)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), grad_like(y.detach()))]


SPLIT = (*(case for case in named(*(case.name for case in FEATURES[:11])) if case.N and case in SMALL), *LIGHT[::2])
IN_FULL = tuple(case for case in (*SMALL, *DEPTHWISE) if case.N and case not in SPLIT)


@pytest.mark.parametrize("cases", (SPLIT, pytest.param(IN_FULL, marks=pytest.mark.full)), ids=("some", "the others"))
@pytest.mark.parametrize(
    "dtype, layout",
    [
        pytest.param(dtype, layout, id=f"{dtype}-{layout}", marks=() if dtype in defaults else pytest.mark.full)
        for layout, defaults in (("nhwc", (torch.float64, torch.float16)), ("nchw", (torch.float32, torch.bfloat16)))
        for dtype in (torch.float64, *DTYPES)
    ],
)
def test_the_split_family_gives_every_case_right(plain, dtype, layout, cases):
    for case in cases:
        tensors = {name: tensor.to(dtype) for name, tensor in case.tensors().items()}
        tensors["x"] = tensors["x"].contiguous(memory_format=FORMATS[layout])
        tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        with launching.preferring("split"):
            mine = forward_and_back(fused_sepconv.separable_conv2d, tensors, case.options)
        exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
        oracle = forward_and_back(two_convolutions, exact, case.options)
        eager = list(zip(*all_of_eager(case, tensors), strict=True))
        for name, a, those, right in zip(("y", *tensors), mine, eager, oracle, strict=True):
            close = assert_as_close_as_eager if name == "y" else assert_gradient_as_close_as_eager
            close(a, max(those, key=lambda b: (b.double() - right).norm()), right, name=f"{case}: {name}")


def all_of_eager(case: Case, tensors: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """PyTorch's results. In float32 rounding is all there is, and it falls differently in its convolution and its
    product, in either layout: in a small tensor one ill-conditioned element shows up to four times as much of it."""
    yield forward_and_back(two_convolutions, tensors, case.options)
    if tensors["x"].dtype == torch.float32:
        for memory_format in FORMATS.values():
            x = tensors["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
            for pointwise in (F.conv2d, product):
                two = functools.partial(two_convolutions, pointwise=pointwise)
                yield forward_and_back(two, {**tensors, "x": x}, case.options)


def product(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = t.movedim(-3, -1) @ weight.flatten(1).t()
    return (z if bias is None else z + bias).movedim(-1, -3)


def test_the_split_family_ran(plain):
    case = DEPTHWISE[1]
    tensors = {name: tensor.float().requires_grad_() for name, tensor in case.tensors().items()}
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    plain.reset_counters()
    with launching.preferring("split"):
        forward_and_back(fused_sepconv.separable_conv2d, tensors, case.options)
    # Forward, whose depthwise result is saved; in the backward all of its gradients at once.
    assert plain.executed() == {
        "depthwise_forward_nhwc_3x3_s1_float32": 1,
        "depthwise_backward_nhwc_3x3_s1_float32": 1,
        "reduce_splits_float32": 2,
    }


def test_the_split_family_sums_in_float32_over_the_pixels_and_keeps_nan(plain, monkeypatch):
    """cuBLAS may add the parts of a 16-bit product in 16 bits, and its relu may lose NaN: neither is asked for it."""
    case = dataclasses.replace(DEPTHWISE[1], pre_activation=None, activation="relu")
    tensors = {name: tensor.bfloat16().requires_grad_() for name, tensor in case.tensors().items()}
    x = tensors["x"].detach().contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 5] = float("nan")
    tensors["x"] = x.requires_grad_()
    sizes = []

    def product(left: Tensor, right: Tensor, mm: Callable = torch.mm) -> Tensor:
        sizes.append((left.shape[0], right.shape[1]))
        return mm(left, right)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.delattr(torch, "_addmm_activation")
    with launching.preferring("split"):
        y, *grads = forward_and_back(fused_sepconv.separable_conv2d, tensors, case.options)
    pixels = case.N * math.prod(case.output_size)
    assert sizes == [(pixels, case.F), (pixels, case.K)]  # forward, and the gradient of its input
    expected = two_convolutions(**{name: tensor.detach() for name, tensor in tensors.items()}, **case.options)
    assert y.isnan().any() and torch.equal(y.isnan(), expected.isnan())


def test_autocast_does_not_reach_the_split_familys_own_1x1(plain):
    tensors = {name: tensor.float().requires_grad_() for name, tensor in DEPTHWISE[1].tensors().items()}
    with launching.preferring("split"):
        # Of silu's gradient the backward computes the 1x1 again.
        y = fused_sepconv.separable_conv2d(**tensors, **{**DEPTHWISE[1].options, "activation": "silu"})
        outside = torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y), retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


# ---- bytes


def counted(native: ModuleType, tensors: list[Tensor | None], case: Case, direction: str) -> dict[str, int]:
    """What a call's kernel read and wrote, by tensor."""
    arguments = arguments_of(case)
    native.reset_counters()
    if direction == "forward":
        depthwise_forward(tuple(tensors), arguments, "fused")
    else:
        grad = torch.zeros(case.N, case.K, *case.output_size, dtype=tensors[0].dtype)
        grad = grad.contiguous(memory_format=torch.channels_last)
        mask = (True, True, False)
        depthwise_backward(grad, tuple(tensors), None, arguments, "fused", mask)
    counters = native.counters()
    names = ("x", "y", "grad_output", "grad_x")
    return {name: counters["bytes_read"].get(name, 0) + counters["bytes_written"].get(name, 0) for name in names}


@pytest.mark.parametrize("sms", [132, 2])
@pytest.mark.cases(LIGHT, full=DEPTHWISE)
def test_the_plan_knows_the_bytes_to_the_last(checked, case, sms):
    tensors = inputs(case, torch.bfloat16, "nhwc")
    with planned_for(sms):
        for direction in ("forward", "backward"):
            problem = problems.depthwise_problem_of(direction, tuple(tensors), arguments_of(case))
            candidate = launching.choose(problem, tensors[0].device, "fused").candidate
            if not isinstance(candidate.tiling, NhwcTiling):  # of NCHW pieces of 16 bytes reach beyond the rows
                continue
            traits = next(t for t in depthwise.ALL_TRAITS if t.name == candidate.name)
            cut = nhwc.Cut(problem, traits, candidate.tiling)
            planned = cut.bytes_by_tensor()
            seen = counted(checked, tensors, case, direction)
            assert {name: planned.get(name, 0) for name in seen} == seen, (direction, candidate.tiling)
            assert candidate.bytes == sum(planned.values())


PIXELS = 6_000  # of the sample of a layer's images: at least one, or 60 of the smallest


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "direction, mid_activation",
    [("forward", None), ("backward", None), ("backward", "relu")],
    ids=["forward", "backward", "backward with a mid-activation"],
)
@pytest.mark.parametrize(
    "layers", [XCEPTION[-3:-1], pytest.param(XCEPTION, marks=pytest.mark.full)], ids=["two", "all"]
)
def test_the_xception_layers_read_and_write_little_more_than_they_must(
    checked, direction, mid_activation, layout, layers
):
    """At batch 64, in bfloat16, as planned for an H200: the blocks of one chunk of channels, for some of the images."""
    print()
    channels = 64 if layout == "nhwc" else 2
    for layer in layers:
        whole = dataclasses.replace(problem_of_layer(layer, direction, layout), mid_activation=mid_activation)
        candidate = depthwise.best(whole, DEVICES["H200"], problems.ALL_KERNELS)
        images = min(64, max(1, PIXELS // (layer.H * layer.W)))
        sample = dataclasses.replace(whole, N=images, C=channels)
        tiling = candidate.tiling
        if layout == "nhwc":
            parts = -(-images * tiling.column_tiles * tiling.groups // tiling.groups_per_part)
        else:
            parts = -(-(-(-images // tiling.images) * tiling.bands) // tiling.units_per_part)
        candidate = dataclasses.replace(candidate, tiling=dataclasses.replace(tiling, parts=parts))

        x = torch.zeros(images, channels, layer.H, layer.W, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=FORMATS[layout])
        weight = torch.zeros(channels, 1, 3, 3, dtype=torch.bfloat16)
        checked.reset_counters()
        if direction == "forward":
            depthwise_launch.Forward(candidate, sample, (x, weight, None))(x, weight, None)
        else:
            grad_output, sampled = x.clone(), (x, weight, None)
            run = depthwise_launch.Backward(candidate, sample, grad_output, sampled, None, (True, True, False))
            run(grad_output, sampled, None)
        counters = checked.counters()
        names = ("x", "y", "grad_output", "grad_x", "partial_weight")
        moved = sum(counters[way].get(name, 0) for way in ("bytes_read", "bytes_written") for name in names)
        floor = (2 if direction == "forward" else 3) * x.numel() * x.element_size()
        ratio, planned = moved / floor, candidate.bytes / (whole.x_bytes * (2 if direction == "forward" else 3))
        figures = f"{moved / 1e6:.1f} MB, {ratio:.3f} x the floor; planned: {planned:.3f}"
        print(f"{layer.name:>16} {direction} {layout}: {figures}")
        assert 1.0 <= ratio <= 1.15
        assert 1.0 <= planned <= 1.15


def problem_of_layer(layer: Case, direction: str, layout: str) -> DepthwiseProblem:
    sizes = {"N": 64, "C": layer.C, "H": layer.H, "W": layer.W, "out_h": layer.H, "out_w": layer.W, "multiplier": 1}
    window = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
    kind = {"dtype": "bfloat16", "layout": layout, "pre_activation": layer.pre_activation}
    return DepthwiseProblem(direction=direction, **sizes, **window, **kind)
