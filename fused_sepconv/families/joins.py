"""BatchNorm's last step joined to what reads its result: the kernels of csrc/joins, for NHWC images without gaps.

`scale`, `shift` and the other values of a channel are contiguous float32 tensors of (C,) where x is. Nothing is checked
here but by `refusal`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import address, stream_of
from fused_sepconv.planning.problem import INT32_MAX, Instance, Kernels

KERNELS = ("norm_add", "norm_pool", "norm_pool_backward")
THREADS = 256  # `kJoinThreads` in csrc/joins/joins.cuh
VECTOR_BYTES = 16  # of a thread
INSTANCES = {
    name: Instance(name, THREADS, 0, registers=64)
    for kernel in KERNELS
    for dtype in ("float32", "float16", "bfloat16")
    for name in (f"{kernel}_{dtype}",)
}


def refusal(x: Tensor, kernels: Kernels) -> str:
    """Why the kernels can't run on an image; empty if they can."""
    if not kernels.instances:
        return kernels.why_none
    name = instance("norm_add", x)
    if name not in INSTANCES:
        return f"the kernels do not compute in {x.dtype}"
    if missing := [each for each in (instance(kernel, x) for kernel in KERNELS) if each not in kernels.instances]:
        return f"the native module has no instance {missing[0]}"
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last) or x.data_ptr() % VECTOR_BYTES:
        return "x is not NHWC without gaps, aligned to 16 bytes"
    if x.shape[1] * x.element_size() % VECTOR_BYTES:
        return f"pixels of {x.shape[1]} channels are no multiple of 16 bytes"
    if x.nbytes // VECTOR_BYTES > INT32_MAX - THREADS:
        return "x is too large for 32-bit numbers of its vectors"
    return ""


def instance(kernel: str, x: Tensor) -> str:
    """The name of a kernel for tensors like x."""
    return f"{kernel}_{str(x.dtype).removeprefix('torch.')}"


class Add:
    """y = (scale * x + shift) + other, or + (other_scale * other + other_shift), or neither, for every x of a shape."""

    def __init__(self, x: Tensor) -> None:
        n, channels, height, width = x.shape
        self._launch = loader.load().NormAddLaunch(instance("norm_add", x), n * height * width, channels)

    def __call__(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        other: Tensor | None,
        other_scale: Tensor | None,
        other_shift: Tensor | None,
    ) -> Tensor:
        y = torch.empty_like(x)
        tensors = (x, scale, shift, other, other_scale, other_shift, y)
        if y.numel():
            self._launch(*map(address, tensors), stream_of(x.device.index))
        return y


class Pool:
    """(x where scale * x + shift is largest, its place in the window) of each 3x3 window, two pixels apart."""

    def __init__(self, x: Tensor, padding: tuple[int, int], size: tuple[int, int]) -> None:
        n, channels, _, _ = x.shape
        self._shape = (n, channels, *size)
        self._launch = loader.load().NormPoolLaunch(instance("norm_pool", x), [*x.shape, *size, *padding])

    def __call__(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        options = {"device": x.device, "memory_format": torch.channels_last}
        picked = torch.empty(self._shape, dtype=x.dtype, **options)
        index = torch.empty(self._shape, dtype=torch.uint8, **options)
        if picked.numel():
            self._launch(*map(address, (x, scale, shift, picked, index)), stream_of(x.device.index))
        return picked, index


class PoolBackward:
    """grad_x = factor * (g - mean_g - (x - mean) * slope), g being what the windows that picked a pixel give it; the
    last three may be None together."""

    def __init__(self, x: Tensor, padding: tuple[int, int], size: tuple[int, int]) -> None:
        name = instance("norm_pool_backward", x)
        self._launch = loader.load().NormPoolBackwardLaunch(name, [*x.shape, *size, *padding])

    def __call__(
        self,
        grad: Tensor,
        index: Tensor,
        x: Tensor,
        factor: Tensor,
        mean: Tensor | None,
        mean_g: Tensor | None,
        slope: Tensor | None,
    ) -> Tensor:
        grad_x = torch.empty_like(x)
        tensors = (grad, index, x, factor, mean, mean_g, slope, grad_x)
        if grad_x.numel():
            self._launch(*map(address, tensors), stream_of(x.device.index))
        return grad_x
