"""Every kernel, run on the CPU: no race, no stray access, the same bits in every order, and the right answer.

The other tests ask what `separable_conv2d` gives, on whatever runs it. These ask how the device code gets there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_sepconv import separable_conv2d
from fused_sepconv.families.simt import plan as simt
from fused_sepconv.planning.plan import INSTANCES
from tests.support.cases import CASES, Case, named, two_convolutions
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import emulated_kernels, in_every_schedule

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMATS = (torch.channels_last, torch.contiguous_format)

# Small enough for the checked build, and together every branch of the kernels: tails in pixels, channels and features,
# strides, dilation, multiplier, uneven padding, biases, residual, activations.
SMALL = tuple(case for case in CASES if case.N and case.multiplications < 60_000)

# Tiles of 64 by 64 that are just filled or one over; few of one dimension and many of another; and sums over more
# pixels than one part takes, ragged (289 in parts of 145 and 144), with tiles that K or F just fills.
TILES = (
    Case("whole tiles", 1, 64, 8, 8, 64, kernel=1, padding=0),
    Case("one over a tile", 1, 65, 1, 66, 65, kernel=(1, 2), padding=0, bias=True, depthwise_bias=True),
    Case("many channels, few features", 1, 70, 2, 3, 2, kernel=1, padding=0),
    Case("few channels, many features", 1, 2, 2, 3, 70, kernel=1, padding=0),
    Case("two parts of pixels", N=1, C=3, H=17, W=17, F=2, bias=True, depthwise_bias=True, mid_activation="relu"),
    Case("two parts, K fills a tile", N=1, C=64, H=17, W=17, F=2, kernel=1, padding=0, bias=True),
    Case("two parts, F fills a tile", N=1, C=2, H=17, W=17, F=64, kernel=1, padding=0, bias=True),
)

# Every branch of the kernels: these are enough to see 643 of 647 planted bugs (docs/planted_bugs.md).
BRANCHES = (
    *named(
        "everything", "four different sides", "three activations, both biases", "dilation and stride",
        "stride larger than the kernel", "kernel larger than the image", "5x2 kernel", "depth multiplier 3",
        "residual before the activation", "plain", "relu thrice", "relu6 thrice", "elu thrice", "silu thrice",
        "hardswish thrice", "gelu thrice",
    ),
    *TILES,
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors().items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def forward_and_back(function, tensors: dict[str, Tensor], options: dict) -> list[Tensor]:
    """The output, then the gradient of every input, for an output gradient that is the same for equal shapes."""
    y = function(**tensors, **options)
    grad_output = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), grad_output)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nhwc", "nchw"])
@pytest.mark.cases(BRANCHES, full=(*SMALL, *TILES))
def test_every_schedule_gives_the_same_bits_and_the_right_ones(native, case, memory_format):
    tensors = inputs(case, torch.float64, memory_format)
    found = in_every_schedule(native, lambda: forward_and_back(separable_conv2d, tensors, case.options))
    for ours, right in zip(found, forward_and_back(two_convolutions, tensors, case.options), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12 * float(right.abs().max()))


@pytest.mark.quick
def test_every_instance_is_executed(native):
    native.reset_counters()
    case = next(case for case in SMALL if case.mid_activation and case.bias)
    for dtype in DTYPES:
        for memory_format in FORMATS:
            forward_and_back(separable_conv2d, inputs(case, dtype, memory_format), case.options)
    assert set(native.executed()) == set(simt.INSTANCES)


@pytest.mark.quick
def test_the_plan_knows_every_instance_as_it_was_compiled(native):
    compiled = {instance["name"]: (instance["threads"], instance["shared_bytes"]) for instance in native.instances()}
    planned = {name: (instance.threads, instance.shared_bytes) for name, instance in INSTANCES.items()}
    assert planned == compiled


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nhwc", "nchw"])
def test_a_view_gives_what_its_copy_gives(native, memory_format):
    """Every tensor at an odd address; an image with gaps; a gradient that is one number."""
    case = next(case for case in SMALL if case.H > 3 and case.W > 3)
    tensors = inputs(case, torch.float16, memory_format)
    views = {}
    for name, tensor in tensors.items():
        storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        view = storage.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor.detach())
        assert view.data_ptr() % 4 == 2
        views[name] = view.requires_grad_()
    n, c, h, w = tensors["x"].shape
    gaps = torch.zeros(n, c, 2 * h, 3 * w, dtype=torch.float16)[:, :, ::2, ::3].copy_(tensors["x"].detach())
    expected = forward_and_back(separable_conv2d, tensors, case.options)
    for changed in (views, {**tensors, "x": gaps.requires_grad_()}):
        actual = forward_and_back(separable_conv2d, changed, case.options)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    y = separable_conv2d(**tensors, **case.options)
    expanded = torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=True)
    written_out = torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(expanded, written_out, strict=True))


@pytest.mark.checked_on(())
def test_more_images_than_a_grid_has_rows(native):
    n = 65_537
    x = torch.randn(n, 1, 1, 1).requires_grad_()
    depthwise_weight, pointwise_weight = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1)
    y = separable_conv2d(x, depthwise_weight, pointwise_weight)
    (grad,) = torch.autograd.grad(y.sum(), x)
    scale = (depthwise_weight * pointwise_weight).item()
    torch.testing.assert_close(y.flatten(), x.detach().flatten() * scale)
    torch.testing.assert_close(grad.flatten(), torch.full((n,), scale))


def test_addresses_past_two_to_the_31_elements():
    # 4 GiB of addresses of which four pages are ever touched: the second image lies past 2**31 elements.
    gap = 2**31 + 64
    storage = torch.empty(gap + 16, dtype=torch.float16)
    x = storage.as_strided((2, 1, 4, 4), (gap, 16, 4, 1))
    x.copy_(torch.arange(32).view(2, 1, 4, 4))
    weights = torch.full((1, 1, 3, 3), 0.25, dtype=torch.float16), torch.ones(2, 1, 1, 1, dtype=torch.float16)
    grad_output = storage.as_strided((2, 2, 4, 4), (gap - 16, 0, 4, 1))
    with emulated_kernels(checked=False):
        y = separable_conv2d(x, *weights, padding=1)
        again = separable_conv2d(x.clone(), *weights, padding=1)
        options = (1, 1), (1, 1, 1, 1), (1, 1), None, None, None, "fused", (False, True, True, False, False, False)
        gradients, compact = (
            torch.ops.fused_sepconv.separable_conv2d_backward(g, image, *weights, None, None, None, None, *options)
            for g, image in ((grad_output, x), (grad_output.clone(), x.clone()))
        )
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, compact, strict=True))


def test_nothing_of_the_depthwise_result_is_written(checked):
    case = next(case for case in SMALL if case.bias and not case.residual)
    tensors = inputs(case, torch.float32, torch.channels_last)
    checked.reset_counters()
    y = separable_conv2d(**tensors, **case.options)
    written = {name: count for name, count in checked.counters()["bytes_written"].items() if count}
    assert written == {"y": y.numel() * 4}


@pytest.mark.full
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nhwc", "nchw"])
def test_a_middle_flow_layer_forward_and_back(memory_format):
    layer = Case("728->728@19", N=1, C=728, H=19, W=19, F=728, pre_activation="relu")
    tensors = inputs(layer, torch.float32, memory_format)
    with emulated_kernels(checked=False):
        ours = forward_and_back(separable_conv2d, tensors, layer.options)
    eager = forward_and_back(two_convolutions, tensors, layer.options)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    oracle = forward_and_back(two_convolutions, exact, layer.options)
    assert_as_close_as_eager(ours[0], eager[0], oracle[0])
    for mine, theirs, right in zip(ours[1:], eager[1:], oracle[1:], strict=True):
        assert_gradient_as_close_as_eager(mine, theirs, right)


FORWARD = {
    "x": torch.randn(1, 4, 5, 5), "depthwise_weight": torch.randn(4, 1, 3, 3),
    "pointwise_weight": torch.randn(8, 4, 1, 1), **dict.fromkeys(("bias", "depthwise_bias", "residual")),
    "stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1),
    **dict.fromkeys(("pre_activation", "mid_activation", "activation")), "backend": "fused",
}  # fmt: skip
MASK = (True,) * 3 + (False,) * 3
BACKWARD = {"grad_output": torch.randn(1, 8, 5, 5), **FORWARD, "output": None, "output_mask": MASK}


@pytest.mark.parametrize(
    ("call", "change", "error"),
    (
        (FORWARD, {"pointwise_weight": torch.randn(8, 1, 1, 1)}, ValueError),
        (FORWARD, {"bias": torch.randn(1)}, ValueError),
        (FORWARD, {"residual": torch.randn(1, 8, 1, 1)}, ValueError),
        (FORWARD, {"depthwise_weight": torch.randn(4, 1, 3, 3).double()}, TypeError),
        (FORWARD, {"x": torch.ones(1, 4, 5, 5, dtype=torch.int32)}, TypeError),
        (BACKWARD, {"grad_output": torch.randn(1, 8, 1, 1)}, ValueError),
        (BACKWARD, {"grad_output": torch.randn(1, 8, 5, 5).double()}, TypeError),
        (BACKWARD, {"output": torch.randn(1, 8, 4, 4), "activation": "relu"}, ValueError),
    ),
)
def test_the_op_called_directly_lets_nothing_bad_reach_a_kernel(native, call, change, error):
    name = "separable_conv2d_backward" if call is BACKWARD else "separable_conv2d"
    native.reset_counters()
    with pytest.raises(error, match="|".join(("x", *change))):
        getattr(torch.ops.fused_sepconv, name)(**{**call, **change})
    assert native.executed() == {}
