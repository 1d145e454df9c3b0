"""Brings a call into the form that the native module takes: addresses, strides, `csrc/params.h` structs, a stream."""

from __future__ import annotations

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


def contiguous(*weights: Tensor | None) -> list[Tensor | None]:
    """The weights are small: a view with odd strides is copied rather than strided through."""
    return [None if weight is None else weight.contiguous() for weight in weights]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def image_of(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0, 0, 0)) if tensor is None else (tensor.data_ptr(), tensor.stride())


def stream_of(device: torch.device) -> int:
    """The handle of the stream that PyTorch would use now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """The native module launches on the current device: this makes it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=4096)
def conv_shape(problem: Problem | DepthwiseProblem) -> Any:
    """The problem as `csrc/params.h` has it."""
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
    """The tiling as `csrc/params.h` has it, for NHWC and for NCHW; all zeros for what the kernel does not take."""
    native = loader.load()
    made = native.NhwcTiling(), native.NchwTiling()
    for kind, native_tiling in zip((NhwcTiling, NchwTiling), made, strict=True):
        for field in fields(kind):
            setattr(native_tiling, field.name, getattr(tiling, field.name) if isinstance(tiling, kind) else 0)
    return made
