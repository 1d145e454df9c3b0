"""Brings a call into the form that the native module takes: addresses, strides, `csrc/params.h` structs, a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.native import loader
from fused_sepconv.planning.problem import DepthwiseProblem, NchwTiling, NhwcTiling, Problem

Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual."""

Strides = tuple[int, ...]
NO_STRIDES = (0, 0, 0, 0)
"""Strides of an image that is not there."""

_cuda_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def strides_of(image: Tensor | None) -> Strides:
    """The strides of an image in elements, zeros for None."""
    return NO_STRIDES if image is None else image.stride()


def stream_of(index: int | None) -> int:
    """The handle of PyTorch's current stream on a CUDA device, by its index; 0 for None, the CPU."""
    return 0 if index is None else _cuda_stream(index)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, on which the native module launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=4096)
def conv_shape(problem: Problem | DepthwiseProblem) -> Any:
    """The problem as `ConvShape` of csrc/params.h."""
    native = loader.load()
    shape = native.ConvShape()
    shape.N, shape.C, shape.H, shape.W = problem.N, problem.C, problem.H, problem.W
    shape.K, shape.F, shape.multiplier = problem.K, getattr(problem, "F", 0), problem.multiplier
    shape.out_h, shape.out_w = problem.out_h, problem.out_w
    shape.kernel_h, shape.kernel_w = problem.kernel
    shape.stride_h, shape.stride_w = problem.stride
    shape.pad_top, _, shape.pad_left, _ = problem.padding
    shape.dilation_h, shape.dilation_w = problem.dilation
    for place in ("pre_activation", "mid_activation", "activation"):
        setattr(shape, place, getattr(native.Activation, getattr(problem, place, None) or "none"))
    return shape


@lru_cache(maxsize=4096)
def tilings_of(tiling: NhwcTiling | NchwTiling | None) -> tuple[Any, Any]:
    """The tiling as csrc/params.h has it, for NHWC and for NCHW; all zeros for what the kernel does not use."""
    native = loader.load()
    made = native.NhwcTiling(), native.NchwTiling()
    for kind, native_tiling in zip((NhwcTiling, NchwTiling), made, strict=True):
        for field in fields(kind):
            setattr(native_tiling, field.name, getattr(tiling, field.name) if isinstance(tiling, kind) else 0)
    return made
