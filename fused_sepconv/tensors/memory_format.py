"""The memory format of a result: x's for the output, its own input's for a gradient.

The op's fake kernel and its real ones ask here, so that they agree to the last stride.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last where x's strides say so, else contiguous.

    Where a dimension of size 1 makes a tensor both, or a view makes it neither, its strides decide, by the rule of
    `Tensor.suggest_memory_format` in PyTorch's C++.
    """
    contiguous = x.is_contiguous()
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if contiguous != channels_last:
        return torch.channels_last if channels_last else torch.contiguous_format
    return torch.channels_last if _channels_last_strides(x) else torch.contiguous_format


def _channels_last_strides(x: Tensor) -> bool:
    strides, sizes = x.stride(), x.shape
    smallest = 0
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < smallest:
            return False
        # (N, 1, 1, 1) is contiguous: its strides say nothing about the order of the other dimensions.
        if dim == 0 and smallest == strides[1]:
            return False
        smallest = strides[dim]
        if sizes[dim] > 1:
            smallest = smallest * sizes[dim]
    return True


def output_strides(x: Tensor, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The strides, in elements, of a dense (N, channels, H, W) tensor in x's memory format."""
    _, channels, height, width = shape
    if memory_format_of(x) == torch.channels_last:
        return height * width * channels, 1, width * channels, channels
    return channels * height * width, height * width, width, 1


def empty_output(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """An uninitialised (N, F, out_h, out_w) tensor for the output of a call on x."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def as_output(x: Tensor, y: Tensor) -> Tensor:
    """y with the strides that `empty_output` would have given it; copied only where they differ."""
    return y if y.stride() == output_strides(x, y.shape) else empty_output(x, y.shape).copy_(y)


def as_nhwc(image: Tensor) -> Tensor:
    """A copy of an image with the strides of NHWC, of every dimension."""
    empty = torch.empty(image.shape, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
    return empty.copy_(image)


def as_gradient(tensor: Tensor, grad: Tensor) -> Tensor:
    """grad with the strides of `torch.empty_like(tensor)` and memory of its own; copied only where it has not."""
    like = torch.empty_like(tensor)
    whole = grad.stride() == like.stride() and grad.storage_offset() == 0
    return grad if whole else like.copy_(grad)


def aligned(image: Tensor) -> bool:
    """Whether the fast kernels can read an image 16 bytes at a time: pixels of an NHWC one, or an NCHW one whole.

    Not where one image spans more than 31 bits can number in units of 16 bytes, as a view with gaps may.
    """
    if image.data_ptr() % 16:
        return False
    if memory_format_of(image) != torch.channels_last:
        return image.is_contiguous()
    (n, _, height, width), strides, size = image.shape, image.stride(), image.element_size()
    reach = 0
    for length, stride, inside in ((n, strides[0], 0), (height, strides[2], 1), (width, strides[3], 1)):
        if length > 1:
            if stride * size % 16:
                return False
            reach += inside * (length - 1) * stride * size
    return strides[1] == 1 and reach < 16 << 31


def tf32() -> bool:
    """Whether PyTorch's float32 convolutions may use TF32 now."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)  # the new flag, which knows the old one's setting too
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
