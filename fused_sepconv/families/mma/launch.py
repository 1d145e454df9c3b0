"""Launches the tensor-core family: the fused forward, and the steps of its backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_sepconv.families.simt.launch import reduced
from fused_sepconv.families.split import launch as split_launch
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import Tensors, address, contiguous, conv_shape, image_of, stream_of
from fused_sepconv.planning.problem import Candidate, MmaInputTiling, Problem
from fused_sepconv.tensors.memory_format import aligned, as_nhwc, as_output, empty_output


def forward(candidate: Candidate, problem: Problem, tensors: Tensors) -> Tensor:
    """y."""
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual = tensors
    if problem.layout == "nchw":
        return as_output(x, forward(candidate, _in_nhwc(problem), (as_nhwc(x), *tensors[1:])))
    y = empty_output(x, (problem.N, problem.F, problem.out_h, problem.out_w))
    if problem.N == 0:
        return y
    if residual is not None:
        residual = _readable(residual)
    depthwise_weight, depthwise_bias = _vectors(depthwise_weight), _vectors(depthwise_bias)
    pointwise_weight, bias = _vectors(pointwise_weight), _vectors(bias)
    tiling = candidate.tiling
    loader.load().forward(
        candidate.name,
        conv_shape(problem),
        image_of(x),
        address(depthwise_weight),
        address(pointwise_weight),
        address(depthwise_bias),
        address(bias),
        image_of(residual),
        image_of(None),
        image_of(y),
        (tiling.rows, tiling.columns, tiling.blocks, tiling.stages),
        stream_of(x.device),
    )
    return y


def backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The six gradients, None where not asked for."""
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, want_residual = output_mask
    x, _, pointwise_weight, *_ = tensors
    if problem.layout == "nchw":
        images = (as_nhwc(grad_output), (as_nhwc(x), *tensors[1:]), None if output is None else as_nhwc(output))
        grad_x, *others = backward(candidate, _in_nhwc(problem), *images, output_mask)
        return None if grad_x is None else torch.empty_like(x).copy_(grad_x), *others
    weight_step, again, input_step = candidate.steps
    grad_z, _ = split_launch.gradient_of_argument(candidate, again, problem, grad_output, tensors, output)
    grad_pointwise = grad_bias = grad_x = grad_depthwise = grad_depthwise_bias = None
    if want_pointwise:
        grad_pointwise, grad_bias = pointwise_weight_gradient(weight_step, problem, grad_z, tensors, want_bias)
    elif want_bias:
        grad_bias = grad_z.sum((0, 2, 3))
    wanted = (want_x, want_depthwise, want_depthwise_bias)
    if any(wanted) and isinstance(input_step.tiling, MmaInputTiling):
        grad_x, grad_depthwise, grad_depthwise_bias = input_gradients(input_step, problem, grad_z, tensors, wanted)
    elif any(wanted):
        grad_t, _, _ = split_launch.pointwise_backward(
            candidate, grad_z, None, pointwise_weight, (True, False, False), x
        )
        grad_x, grad_depthwise, grad_depthwise_bias = split_launch.depthwise_backward(
            input_step, problem, grad_t, tensors, wanted
        )
    return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_z if want_residual else None


def pointwise_weight_gradient(
    candidate: Candidate, problem: Problem, grad_z: Tensor, tensors: Tensors, want_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the pointwise weight, (F, K, 1, 1), and if wanted of the last bias, (F).

    From grad_z, that of the last activation's argument: (N, F, out_h, out_w), copied where it is not NHWC.
    """
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, _ = tensors
    if problem.N == 0:
        return torch.zeros_like(pointwise_weight), torch.zeros_like(bias) if want_bias else None
    grad_z = _readable(grad_z)
    depthwise_weight, depthwise_bias = contiguous(depthwise_weight, depthwise_bias)
    tiling = candidate.tiling
    partial_weight = x.new_empty((tiling.parts, problem.F * problem.K), dtype=torch.float32)
    partial_bias = x.new_empty((tiling.parts, problem.F), dtype=torch.float32) if want_bias else None
    loader.load().backward(
        candidate.name,
        conv_shape(problem),
        image_of(x),
        address(depthwise_weight),
        0,
        address(depthwise_bias),
        image_of(grad_z),
        image_of(None),
        image_of(None),
        address(partial_weight),
        address(partial_bias),
        0,
        tiling.parts,
        (tiling.columns, tiling.cells, tiling.feature_warps, tiling.channel_warps, tiling.stages),
        stream_of(x.device),
    )
    return reduced(partial_weight, pointwise_weight), reduced(partial_bias, bias) if want_bias else None


def input_gradients(
    candidate: Candidate, problem: Problem, grad_z: Tensor, tensors: Tensors, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, depthwise_weight and depthwise_bias, None where the mask does not ask, from the gradient of
    the pointwise convolution's result; `candidate` is of `families/mma_input.py`."""
    x, depthwise_weight, pointwise_weight, _, depthwise_bias, _ = tensors
    wanted = [like if asked else None for like, asked in zip((x, depthwise_weight, depthwise_bias), mask, strict=True)]
    if problem.N == 0:
        return tuple(None if like is None else torch.zeros_like(like) for like in wanted)
    grad_z = _readable(grad_z)
    grad_x = torch.empty_like(x) if wanted[0] is not None else None
    # The kernel writes where it reads, and its offsets are as wide as the plan has checked for an x without gaps.
    x = _readable(x)
    tiling = candidate.tiling
    partials = [
        None if like is None else x.new_empty((tiling.parts, like.numel()), dtype=torch.float32) for like in wanted[1:]
    ]
    weight, pointwise = depthwise_weight.contiguous(), _vectors(pointwise_weight)  # kept until the launch
    loader.load().mma_backward_input(
        candidate.name,
        conv_shape(problem),
        (tiling.strips, tiling.part, tiling.parts, tiling.stages),
        image_of(x),
        address(weight),
        address(pointwise),
        image_of(grad_z),
        address(grad_x),
        *map(address, partials),
        stream_of(x.device),
    )
    sums = (None if part is None else reduced(part, like) for part, like in zip(partials, wanted[1:], strict=True))
    return grad_x, *sums


def _in_nhwc(problem: Problem) -> Problem:
    """The problem that `families/mma_nchw.py` has planned."""
    return replace(problem, layout="nhwc", aligned=True)


def _readable(image: Tensor) -> Tensor:
    """An image as the kernels can read it, NHWC and aligned to 16 bytes: copied if it is not."""
    if image.is_contiguous(memory_format=torch.channels_last) and aligned(image):
        return image
    return as_nhwc(image)


def _vectors(weight: Tensor | None) -> Tensor | None:
    """A weight or bias that can be read 16 bytes at a time; the few that are not aligned are copied."""
    if weight is None:
        return None
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
