"""Xception's 3 x 3 max-pooling, in the two ways of padding that weights were trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PADDINGS = ("same", "symmetric")


def check_padding(name: str, value: str) -> str:
    """`value`, if it is one of the two ways."""
    if value not in _PADDINGS:
        raise ValueError(f"{name}: expected one of {_PADDINGS}, got {value!r}")
    return value


class MaxPool3x3(nn.Module):
    """3 x 3 max-pooling that keeps every `stride`-th pixel: out = ceil(in / stride), for a stride of 1 or 2.

    Args:
        stride: 1 or 2.
        padding: "same" is TensorFlow's rule: the windows of an even size begin at its first pixel, those of an odd
            size one before it. "symmetric" is `nn.MaxPool2d(3, 2, 1)`'s: they always begin one before it.
        dilation: in pixels, between the rows and columns of a window, with a stride of 1. The result at every
            2 * dilation-th pixel is what a stride of 2 makes of every dilation-th pixel of the input: a network loses
            its strides and computes the same thing more densely.

    Shape: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, stride: int, padding: str = "same", dilation: int = 1) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = stride, check_padding("padding", padding), dilation

    def forward(self, x: Tensor) -> Tensor:
        return _max_pool(x, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"


# torch.fx leaves it as one call in what it traces: what it looks at in x, a traced x has not.
@torch.fx.wrap
def _max_pool(x: Tensor, stride: int, padding: str, dilation: int) -> Tensor:
    if stride == 2 and padding == "same" and _exports_free_sizes(x):
        # F.pad takes free sizes, where max_pool2d wants its padding in numbers. They are size % 2, written so that the
        # result's size is seen to be a strided convolution's.
        top, left = ((size - 1) // 2 * 2 + 2 - size for size in x.shape[-2:])
        return F.max_pool2d(F.pad(x, (left, 1, top, 1), value=float("-inf")), 3, 2)
    before = [1 if padding == "symmetric" else (size + dilation - 1) // dilation % 2 for size in x.shape[-2:]]
    if stride == 2:
        # TensorFlow's last window reaches over the edge of an even size: ceil_mode does that without padding.
        return F.max_pool2d(x, 3, 2, before, ceil_mode=padding == "same")
    if before == [1, 1] and dilation == 1:
        return F.max_pool2d(x, 3, 1, 1)
    (top, left), reach = before, 2 * dilation
    top, left = top * dilation, left * dilation
    x = F.pad(x, (left, reach - left, top, reach - top), value=float("-inf"))
    return F.max_pool2d(x, 3, 1, 0, dilation)


def _exports_free_sizes(x: Tensor) -> bool:
    """Tells whether sizes that may change are exported. Every export by Dynamo counts: 2.7 hides such sizes."""
    free = any(isinstance(size, torch.SymInt) for size in x.shape[-2:])
    return free or (torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting())
