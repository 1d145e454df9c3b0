"""Launches the tensor-core family: the fused forward."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .launching import Tensors, address, aligned, conv_shape, image_of, stream_of
from .memory_format import empty_output
from .problem import Candidate, Problem


def forward(candidate: Candidate, problem: Problem, tensors: Tensors) -> Tensor:
    """y."""
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual = tensors
    y = empty_output(x, (problem.N, problem.F, problem.out_h, problem.out_w))
    if problem.N == 0:
        return y
    if residual is not None and not (_is_nhwc(residual) and aligned(residual)):
        residual = empty_output(x, y.shape).copy_(residual)
    depthwise_weight, depthwise_bias = _vectors(depthwise_weight), _vectors(depthwise_bias)
    pointwise_weight, bias = _vectors(pointwise_weight), _vectors(bias)
    tiling = candidate.tiling
    _native.load().forward(
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


def _is_nhwc(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last)


def _vectors(weight: Tensor | None) -> Tensor | None:
    """A weight or bias that can be read 16 bytes at a time; the few that are not aligned are copied."""
    if weight is None:
        return None
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
