"""The kernels of `families/joins.py` in PyTorch's operators, in any dtype: for float64, and to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.nn.norm_units import joined
from fused_sepconv.ops.joins import Window


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(x.dtype)


def add(x: Tensor, scale: Tensor, shift: Tensor, other: Any, other_scale: Any, other_shift: Any) -> Tensor:
    y = _affine(x, scale, shift)
    if other is None:
        return y
    return y + (other if other_scale is None else _affine(other, other_scale, other_shift))


def pool(padding: Any, size: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    u, width = _affine(x, scale, shift), x.shape[3]
    for ceil_mode in (False, True):
        values, flat = F.max_pool2d(u, 3, 2, padding, ceil_mode=ceil_mode, return_indices=True)
        if tuple(values.shape[2:]) == tuple(size):
            break
    picked = x.flatten(2).gather(2, flat.flatten(2)).view(flat.shape)
    rows, columns = _corners(padding, size)
    return picked, (3 * (flat // width - rows) + flat % width - columns).to(torch.uint8)


def pool_backward(
    padding: Any, size: Any, grad: Tensor, index: Tensor, x: Tensor, factor: Tensor, mean: Any, mean_g: Any, slope: Any
) -> Tensor:
    rows, columns = _corners(padding, size)
    flat = (index.long() // 3 + rows) * x.shape[3] + index.long() % 3 + columns
    wide = torch.promote_types(x.dtype, torch.float32)
    g = (
        torch.zeros(x.shape, dtype=wide)
        .flatten(2)
        .scatter_add(2, flat.flatten(2), grad.to(wide).flatten(2))
        .view(x.shape)
    )
    if slope is not None:
        mean, mean_g, slope = (each.view(-1, 1, 1) for each in (mean, mean_g, slope))
        g = g - mean_g - (x - mean) * slope
    return (g * factor.view(-1, 1, 1)).to(x.dtype)


def _corners(padding: Any, size: Any) -> tuple[Tensor, Tensor]:
    """The first row and column of each window."""
    rows, columns = (2 * torch.arange(count) - before for count, before in zip(size, padding, strict=True))
    return rows.view(-1, 1), columns


def prepared(kind: type, x: Tensor, *arguments: Any) -> Callable[..., Any]:
    """In place of `ops.joins._prepared`."""
    return {"Add": add, "Pool": partial(pool, *arguments), "PoolBackward": partial(pool_backward, *arguments)}[
        kind.__name__
    ]


def norm_join(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, other: Tensor, *, pooled: bool) -> Tensor:
    """`tests.support.cases.joined_norm` by our kernels."""
    norm = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "training": True, "momentum": 0.1, "eps": 1e-5}
    norm |= {"running_mean": None, "running_var": None, "process_group": None}
    y = joined(norm, Window.of(x.shape[2:], (1, 1), False) if pooled else None, other)
    if y is None:
        raise RuntimeError(f"no kernel joins the BatchNorm of {tuple(x.shape)}")
    return y
