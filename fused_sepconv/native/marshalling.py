"""Brings a call into the form that the native module takes: addresses, strides, `csrc/params.h` structs, a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.native import loader
from fused_sepconv.planning.problem import AnyTiling, DepthwiseProblem, NchwTiling, NhwcTiling, Problem

Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual."""

Strides = tuple[int, ...]
NO_STRIDES = (0, 0, 0, 0)  # strides of an image that is not there

cuda_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
"""The handle of PyTorch's current stream on a CUDA device, by its index."""


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> list[int]:
    """`address` of each, without a call for each."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def strides_of(image: Tensor | None) -> Strides:
    """The strides of an image in elements, zeros for None."""
    return NO_STRIDES if image is None else image.stride()


def stream_of(index: int | None) -> int:
    """`cuda_stream`, and 0 for None, the CPU."""
    return 0 if index is None else cuda_stream(index)


GUARD_BINDS = torch.version.cuda is None or int(torch.version.cuda.partition(".")[0]) >= 12
"""Whether PyTorch's device guard makes the device's context the thread's: cudaSetDevice does since CUDA 12."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, for PyTorch and for the native module, whose CUDA runtime is its own."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(device) if GUARD_BINDS else _bound(device)


@contextmanager
def _bound(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device):
        if (native := loader.load()) is not None:
            native.set_device(torch.cuda.current_device())
        yield


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


def tiling_of(tiling: AnyTiling | None, fields: int) -> tuple[int, ...]:
    """A tiling's fields in their order, which is that of its struct in csrc/params.h; zeros for none."""
    return (0,) * fields if tiling is None else astuple(tiling)[:fields]


@lru_cache(maxsize=4096)
def tilings_of(tiling: NhwcTiling | NchwTiling | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A depthwise kernel's tiling for NHWC and for NCHW; zeros for the one that the kernel does not use."""
    return tuple(
        tiling_of(tiling if isinstance(tiling, kind) else None, len(fields(kind))) for kind in (NhwcTiling, NchwTiling)
    )
