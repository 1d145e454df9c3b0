"""Padding of modules: the part that `nn.Conv2d` can express, and padding with other than zeros."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.ops.arguments import Padding, Pair, TensorSpec, padding_form, padding_sides

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def check_padding_mode(padding_mode: Any) -> str:
    """`padding_mode`, if it is one."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: expected one of {PADDING_MODES}, got {padding_mode!r}")
    return padding_mode


def divide(padding: Padding | str, stride: Pair) -> tuple[Padding | str | None, Any]:
    """The part of a padding that `nn.Conv2d` cannot express (None: nothing), and what it is given."""
    if padding == "valid":
        return None, 0
    if padding == "same":
        return (None, "same") if stride == (1, 1) else ("same", 0)
    top, bottom, left, right = padding
    return (None, (top, left)) if (top, left) == (bottom, right) else (padding, 0)


# torch.fx leaves it as one call in what it traces: what it looks at in x, a traced x has not.
@torch.fx.wrap
def pad_image(x: Tensor, padding: Any, mode: str, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """x, (N, C, H, W) or (C, H, W), padded as a convolution with this padding and mode would read it.

    Raises:
        ValueError: an x of other dimensions, or too small to be continued so far.
    """
    spec = TensorSpec.of("x", x)
    if len(spec.shape) not in (3, 4):
        raise ValueError(f"x: expected (N, C, H, W) or (C, H, W), got {tuple(spec.shape)}")
    form = padding if isinstance(padding, tuple) and len(padding) == 4 else padding_form(padding)
    top, bottom, left, right = padding_sides(form, x.shape[-2:], kernel, stride, dilation)
    mode = "constant" if mode == "zeros" else mode
    reach = {"reflect": 1, "circular": 0}.get(mode)  # how much less than the image such a padding may be
    if reach is not None and (max(top, bottom) > x.shape[-2] - reach or max(left, right) > x.shape[-1] - reach):
        raise ValueError(
            f"padding: {mode} padding (top, bottom, left, right) = {(top, bottom, left, right)} is wider than x, "
            f"{tuple(x.shape)}, can be continued"
        )
    return F.pad(x, (left, right, top, bottom), mode)
