"""Depthwise convolutions of a normalised tensor: what a BatchNorm unit runs between its statistics and its 1x1.

    u = scale[c] * x + shift[c]                   in float32
    t = depthwise(pre_activation(u)) + bias       zeros around the image, after the activation

`problem` is a `DepthwiseProblem` of x as it is for `depthwise_conv2d` (its pre_activation is the unit's activation, its
mid_activation None); whether its `normalised` is set does not matter. `scale`, `shift` and `mean` are contiguous
float32 tensors of (C,) where x is; `bias` may be None. x and grad_t have the problem's layout; another grad_t is
copied. Nothing is checked here.

    reason = supports(problem, device, kernels)   None: both directions run. Else a sentence, and the caller runs
                                                  PyTorch's operators. device and kernels: `planning.devices.Device`
                                                  and `planning.problem.Kernels`, as `ops.launching` finds them
    run = Forward(candidate(problem, device, kernels), problem, x)               prepared once for x's shape and strides
    t = run(x, scale, shift, weight, bias)
    run = Backward(candidate(problem, ...), problem, x, weight, bias, mask)      a problem of direction "backward"
    grad_weight, grad_bias, dz, sum_dz, sum_dz_xmu = run(grad_t, x, scale, shift, mean, weight)

dz, in x's dtype and strides, is the gradient of u (not yet times scale). sum_dz and sum_dz_xmu, float32 of (C,), are
the sums over N, H and W of dz and of dz * (x - mean). `mean` may be any value near those of x: it keeps the second sum
from being a small difference of large ones. `mask` says whether grad_weight and grad_bias are wanted (None where not);
dz and its sums always come. From them

    the gradient of scale is sum_dz_xmu + mean * sum_dz, that of shift is sum_dz, and that of x alone is scale * dz.

The sums are added in a fixed order: the same bits in every run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.depthwise import plan
from fused_sepconv.families.depthwise.launch import readable
from fused_sepconv.families.simt.launch import Reduction
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import NO_STRIDES, Strides, address, conv_shape, stream_of, tilings_of
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Kernels
from fused_sepconv.tensors.memory_format import memory_format_of, output_strides

Gradients = tuple["Tensor | None", "Tensor | None", Tensor, Tensor, Tensor]


def candidate(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    """The kernel that runs a problem in its direction, with its cut and its predicted cost; or its `refusal`."""
    return plan.best(replace(problem, normalised=True), device, kernels)


def supports(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> str | None:
    """Why a problem can't be run in both directions; None where it can."""
    for direction in ("forward", "backward"):
        if refusal := candidate(replace(problem, direction=direction), device, kernels).refusal:
            return refusal
    return None


class Forward:
    """t, on every tensor of x's shape and strides."""

    def __init__(self, candidate: Candidate, problem: DepthwiseProblem, x: Tensor) -> None:
        self._shape = (problem.N, problem.K, problem.out_h, problem.out_w)
        self._strides, self._index = output_strides(x, self._shape), x.device.index
        self._launch = loader.load().DepthwiseForwardLaunch(
            candidate.name,
            conv_shape(problem),
            *tilings_of(candidate.tiling),
            x.stride(),
            NO_STRIDES,
            self._strides,
        )

    def __call__(self, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        t = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
        if not self._shape[0]:
            return t
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        self._launch.normalised(
            x.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            weight.data_ptr(),
            address(bias),
            t.data_ptr(),
            stream_of(self._index),
        )
        return t


class Backward:
    """All gradients in one pass over x and grad_t, on every tensor of x's shape and strides."""

    def __init__(
        self,
        candidate: Candidate,
        problem: DepthwiseProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: tuple[bool, bool],
    ) -> None:
        self._candidate, self._problem = candidate, problem
        self._layout, self._x_strides, self._index = memory_format_of(x), x.stride(), x.device.index
        parts = candidate.tiling.parts
        want_weight, want_bias = mask
        affine = torch.empty((2, problem.C), dtype=torch.float32, device="meta")
        self._sums = [
            Reduction(parts, like) if wanted else None
            for like, wanted in ((weight, want_weight), (bias, want_bias and bias is not None), (affine, True))
        ]
        self._launches: dict[tuple[Strides, Strides], Any] = {}

    def __call__(
        self, grad_t: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, weight: Tensor
    ) -> Gradients:
        grad_t = readable(grad_t, self._layout, self._candidate)
        dz = torch.empty_like(x)
        if not self._problem.N:
            grad_weight, grad_bias, sums = (None if each is None else each.zeros(x) for each in self._sums)
            return grad_weight, grad_bias, dz, *sums.unbind()
        strides = grad_t.stride(), dz.stride()
        launch = self._launches.get(strides)
        if launch is None:
            launch = self._launches[strides] = loader.load().DepthwiseBackwardLaunch(
                self._candidate.name,
                conv_shape(self._problem),
                *tilings_of(self._candidate.tiling),
                self._x_strides,
                *strides,
            )
        partials = [None if sums is None else sums.empty(x) for sums in self._sums]
        weight = weight.contiguous()
        launch.normalised(
            x.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            mean.data_ptr(),
            weight.data_ptr(),
            grad_t.data_ptr(),
            dz.data_ptr(),
            *map(address, partials),
            stream_of(self._index),
        )
        grad_weight, grad_bias, sums = (
            None if each is None else each(part) for each, part in zip(self._sums, partials, strict=True)
        )
        return grad_weight, grad_bias, dz, *sums.unbind()
