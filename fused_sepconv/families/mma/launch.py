"""Launches of the tensor-core family: the fused forward, and the steps of its backward.

Each class prepares its launches once, for a problem and the strides of its tensors; a call allocates and launches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.simt.launch import Reduction
from fused_sepconv.families.split import launch as split
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import NO_STRIDES, Tensors, address, conv_shape, cuda_stream, stream_of
from fused_sepconv.planning.problem import Candidate, MmaInputTiling, Problem
from fused_sepconv.tensors.memory_format import aligned, as_nhwc, as_output, output_strides

Gradients = tuple[Tensor | None, ...]


class Forward:
    """y, of NHWC images."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors) -> None:
        x, *weights, residual = tensors
        self._shape = (problem.N, problem.F, problem.out_h, problem.out_w)
        self._strides = output_strides(x, self._shape)
        self._index = x.device.index
        # Whether all can be read where they are: the signature that this is prepared for decides.
        self._in_place = all(weight is None or _vectors(weight) is weight for weight in weights) and (
            residual is None or _readable(residual) is residual
        )
        tiling = candidate.tiling
        self._launch = loader.load().ForwardLaunch(
            candidate.name,
            conv_shape(problem),
            (tiling.rows, tiling.columns, tiling.blocks, tiling.stages),
            x.stride(),
            NO_STRIDES if residual is None else _readable(residual).stride(),
            NO_STRIDES,
            self._strides,
        )

    def __call__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        bias: Tensor | None,
        depthwise_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        y = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
        if not self._shape[0]:
            return y
        if not self._in_place:
            depthwise_weight, pointwise_weight = _vectors(depthwise_weight), _vectors(pointwise_weight)
            bias = None if bias is None else _vectors(bias)
            depthwise_bias = None if depthwise_bias is None else _vectors(depthwise_bias)
            residual = None if residual is None else _readable(residual)
        self._launch(
            x.data_ptr(),
            depthwise_weight.data_ptr(),
            pointwise_weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if depthwise_bias is None else depthwise_bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0,
            y.data_ptr(),
            0 if self._index is None else cuda_stream(self._index),
        )
        return y


class ForwardOfNchw:
    """y, of NCHW images: the kernel for NHWC between conversions there and back."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors) -> None:
        self._forward = Forward(candidate, _in_nhwc(problem), (as_nhwc(tensors[0]), *tensors[1:]))

    def __call__(self, x: Tensor, *others: Tensor | None) -> Tensor:
        return as_output(x, self._forward(as_nhwc(x), *others))


class Backward:
    """The six gradients of NHWC images, None where not asked for."""

    def __init__(
        self,
        candidate: Candidate,
        problem: Problem,
        grad_output: Tensor,
        tensors: Tensors,
        output: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, _ = mask
        weight_step, again, input_step = candidate.steps
        self._mask = mask
        self._argument = split.ArgumentGradient(candidate, problem, split.Intermediate(again, problem, tensors), output)
        self._pointwise_weight = self._fused = self._product = None
        if want_pointwise:
            self._pointwise_weight = PointwiseWeightGradient(weight_step, problem, tensors, want_bias)
        wanted = (want_x, want_depthwise, want_depthwise_bias)
        if any(wanted) and isinstance(input_step.tiling, MmaInputTiling):
            self._fused = InputGradients(input_step, problem, tensors, wanted)
        elif any(wanted):
            self._product = split.Pointwise(candidate)
            self._depthwise = split.DepthwiseBackward(input_step, problem, tensors, mask)

    def __call__(
        self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, kept: Tensor | None = None
    ) -> Gradients:
        _, _, _, want_bias, _, want_residual = self._mask
        grad_z, _ = self._argument(grad_output, tensors, output)
        grad_pointwise = grad_bias = grad_x = grad_depthwise = grad_depthwise_bias = None
        if self._pointwise_weight is not None:
            grad_pointwise, grad_bias = self._pointwise_weight(grad_z, tensors)
        elif want_bias:
            grad_bias = grad_z.sum((0, 2, 3))
        if self._fused is not None:
            grad_x, grad_depthwise, grad_depthwise_bias = self._fused(grad_z, tensors)
        elif self._product is not None:
            grad_v, _, _ = self._product.backward(grad_z, None, tensors[2], (True, False, False), tensors[0])
            grad_x, grad_depthwise, grad_depthwise_bias = self._depthwise(grad_v, tensors)
        grad_residual = grad_z if want_residual else None
        return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_residual


class BackwardOfNchw:
    """The six gradients of NCHW images: the kernels for NHWC between conversions there and back."""

    def __init__(
        self,
        candidate: Candidate,
        problem: Problem,
        grad_output: Tensor,
        tensors: Tensors,
        output: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        tensors = (as_nhwc(tensors[0]), *tensors[1:])
        self._backward = Backward(candidate, _in_nhwc(problem), grad_output, tensors, output, mask)

    def __call__(
        self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, kept: Tensor | None = None
    ) -> Gradients:
        x = tensors[0]
        output = None if output is None else as_nhwc(output)
        grad_x, *others = self._backward(as_nhwc(grad_output), (as_nhwc(x), *tensors[1:]), output)
        return None if grad_x is None else torch.empty_like(x).copy_(grad_x), *others


class PointwiseWeightGradient:
    """The gradients of the pointwise weight, (F, K, 1, 1), and if wanted of the last bias, (F), from grad_z."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, want_bias: bool = False) -> None:
        x, _, pointwise_weight, bias, _, _ = tensors
        self._candidate, self._problem, self._x_strides = candidate, problem, x.stride()
        parts = candidate.tiling.parts if problem.N else 1
        self._weight = Reduction(parts, pointwise_weight)
        self._bias = Reduction(parts, bias) if want_bias else None
        self._launches: dict[tuple[int, ...], Any] = {}

    def __call__(self, grad_z: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        if not self._problem.N:
            return self._weight.zeros(x), None if self._bias is None else self._bias.zeros(x)
        grad_z = _readable(grad_z)
        strides = grad_z.stride()
        launch = self._launches.get(strides)
        if launch is None:
            tiling = self._candidate.tiling
            launch = self._launches[strides] = loader.load().BackwardLaunch(
                self._candidate.name,
                conv_shape(self._problem),
                (tiling.columns, tiling.cells, tiling.feature_warps, tiling.channel_warps, tiling.stages),
                0,
                tiling.parts,
                self._x_strides,
                strides,
                NO_STRIDES,
                NO_STRIDES,
            )
        partial_weight = self._weight.empty(x)
        partial_bias = None if self._bias is None else self._bias.empty(x)
        depthwise_weight = depthwise_weight.contiguous()
        depthwise_bias = None if depthwise_bias is None else depthwise_bias.contiguous()
        launch(
            x.data_ptr(),
            depthwise_weight.data_ptr(),
            0,
            address(depthwise_bias),
            grad_z.data_ptr(),
            0,
            0,
            partial_weight.data_ptr(),
            address(partial_bias),
            stream_of(x.device.index),
        )
        return self._weight(partial_weight), None if self._bias is None else self._bias(partial_bias)


class InputGradients:
    """The gradients of x, depthwise_weight and depthwise_bias, None where the mask does not ask, from grad_z.

    `candidate` is of backward_input.py.
    """

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, mask: tuple[bool, bool, bool]) -> None:
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        self._want_x, want_weight, want_bias = mask
        self._candidate, self._problem = candidate, problem
        parts = candidate.tiling.parts if problem.N else 1
        self._sums = [
            Reduction(parts, depthwise_weight) if want_weight else None,
            Reduction(parts, depthwise_bias) if want_bias else None,
        ]
        self._launches: dict[tuple, Any] = {}

    def __call__(self, grad_z: Tensor, tensors: Tensors) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, depthwise_weight, pointwise_weight, _, _, _ = tensors
        if not self._problem.N:
            grads = (None if sums is None else sums.zeros(x) for sums in self._sums)
            return torch.zeros_like(x) if self._want_x else None, *grads
        grad_z = _readable(grad_z)
        grad_x = torch.empty_like(x) if self._want_x else None
        # The kernel writes where it reads, and its offsets are as wide as the plan has checked for an x without gaps.
        x = _readable(x)
        strides = x.stride(), grad_z.stride()
        launch = self._launches.get(strides)
        if launch is None:
            tiling = self._candidate.tiling
            launch = self._launches[strides] = loader.load().MmaInputLaunch(
                self._candidate.name,
                conv_shape(self._problem),
                (tiling.strips, tiling.part, tiling.parts, tiling.stages),
                *strides,
            )
        partials = [None if sums is None else sums.empty(x) for sums in self._sums]
        depthwise_weight, pointwise_weight = depthwise_weight.contiguous(), _vectors(pointwise_weight)
        launch(
            x.data_ptr(),
            depthwise_weight.data_ptr(),
            pointwise_weight.data_ptr(),
            grad_z.data_ptr(),
            address(grad_x),
            address(partials[0]),
            address(partials[1]),
            stream_of(x.device.index),
        )
        grads = (None if sums is None else sums(part) for sums, part in zip(self._sums, partials, strict=True))
        return grad_x, *grads


def prepare_forward(candidate: Candidate, problem: Problem, tensors: Tensors) -> Forward | ForwardOfNchw:
    """The forward for the problem's layout."""
    kind = Forward if problem.layout == "nhwc" else ForwardOfNchw
    return kind(candidate, problem, tensors)


def prepare_backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    mask: tuple[bool, ...],
) -> Backward | BackwardOfNchw:
    """The backward for the problem's layout."""
    kind = Backward if problem.layout == "nhwc" else BackwardOfNchw
    return kind(candidate, problem, grad_output, tensors, output, mask)


def _in_nhwc(problem: Problem) -> Problem:
    """The problem that nchw.py has planned."""
    return replace(problem, layout="nhwc", aligned=True)


def _readable(image: Tensor) -> Tensor:
    """An image as the kernels can read it, NHWC and aligned to 16 bytes: copied if it is not."""
    if image.is_contiguous(memory_format=torch.channels_last) and aligned(image):
        return image
    return as_nhwc(image)


def _vectors(weight: Tensor) -> Tensor:
    """A weight or bias that can be read 16 bytes at a time; the few that are not aligned are copied."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
