"""The tensor-core kernels on NCHW tensors: between conversions to NHWC and back, and the plan says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fused_sepconv
from fused_sepconv.ops import launching
from fused_sepconv.ops.problems import ALL_KERNELS
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import plan
from tests.planning.test_plan import problem
from tests.support.cases import XCEPTION_REDUCED, Case, two_convolutions
from tests.support.closeness import assert_as_close_as_eager
from tests.support.emulation import emulated_kernels
from tests.support.tf32 import pointwise_in_tf32

CASES = (
    Case("everything", 2, 16, 7, 9, 24, bias=True, depthwise_bias=True, residual=True, activation="relu"),
    Case("a mid-activation, and z computed again", 2, 8, 6, 5, 16, mid_activation="relu", activation="silu"),
    Case("stride 2", 1, 24, 9, 8, 8, stride=2, pre_activation="relu"),
    Case("images of one pixel, padded", 3, 8, 1, 1, 8, kernel=3, padding=2),
    Case("no image", 0, 8, 4, 4, 8, bias=True),
)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.cases((*CASES, *XCEPTION_REDUCED[::4]))
def test_results_are_as_close_as_eagers_and_have_their_inputs_strides(case, stored):
    exact = case.tensors()
    tensors = {name: tensor.to(stored).requires_grad_() for name, tensor in exact.items()}
    pointwise = pointwise_in_tf32 if stored == torch.float32 else F.conv2d
    grad = torch.randn_like(two_convolutions(**exact, **case.options))

    def results(function, tensors, **more):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        y = function(**leaves, **case.options, **more)
        grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    with emulated_kernels(False) as native, launching.preferring("mma"):
        native.reset_counters()
        ours = results(fused_sepconv.separable_conv2d, tensors)
        if case.N:
            ran = " ".join(native.executed())
            assert "mma_forward" in ran and "mma_backward_pointwise_weight" in ran and "simt" not in ran
    eager = results(two_convolutions, tensors, pointwise=pointwise)
    oracle = results(two_convolutions, {name: tensor.double() for name, tensor in tensors.items()})
    for name, mine in ours.items():
        assert mine.is_contiguous(), name
        if case.N:
            assert_as_close_as_eager(mine, eager[name], oracle[name], name=f"{case.name}: {name}")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_plan_counts_the_conversions(direction):
    nchw = dataclasses.replace(problem(CASES[2], direction, torch.bfloat16), N=64)
    nhwc = dataclasses.replace(nchw, layout="nhwc")
    there, here = (
        [c for c in plan(call, DEVICES["H200"], ALL_KERNELS).candidates if c.family == "mma"] for call in (nchw, nhwc)
    )
    images = nchw.x_bytes + nchw.y_bytes + (nchw.x_bytes if direction == "backward" else 0)
    for converted, plain in zip(there, here, strict=True):
        assert converted.bytes == plain.bytes + 2 * images
        assert converted.predicted_seconds > plain.predicted_seconds
        assert "converted to NHWC and back" in converted.note
