"""BatchNorm joined to the addition, or to the max-pooling and the addition, that alone read its result.

    y = pool(u) + other,    u = (x - mean) * invstd * weight + bias,    other perhaps normalised likewise

u is never written, nor its gradient. `NormJoinFunction` is that with its derivative; three operators are the kernels.
They are run where `why_not` is empty, and never asked for elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.families import joins
from fused_sepconv.ops import calls, launching
from fused_sepconv.ops.autograd import vjp
from fused_sepconv.ops.norm_units import (
    accumulator,
    by_channel,
    is_on_gpu,
    normalise,
    scale_and_shift,
    through_statistics,
    with_own_statistics,
)
from fused_sepconv.ops.operators import LIBRARY, TAGS, without_autocast
from fused_sepconv.ops.torch_internals import is_plain_state

for _schema in (
    "norm_add(Tensor x, Tensor scale, Tensor shift, Tensor? other, Tensor? other_scale, Tensor? other_shift) -> Tensor",
    "norm_pool(Tensor x, Tensor scale, Tensor shift, int[2] padding, int[2] size) -> (Tensor, Tensor)",
    "norm_pool_backward(Tensor grad, Tensor index, Tensor x, Tensor factor, Tensor? mean, Tensor? mean_g, "
    "Tensor? slope, int[2] padding) -> Tensor",
):
    LIBRARY.define(_schema, tags=TAGS)


class Window(NamedTuple):
    """A 3x3 max-pooling of stride 2: rows and columns before the first pixel, and its result's height and width."""

    padding: tuple[int, int]
    size: tuple[int, int]
    ceil_mode: bool

    @classmethod
    def of(cls, size: tuple[int, int], padding: tuple[int, int], ceil_mode: bool) -> Window:
        return cls(padding, tuple(_pooled(*each, ceil_mode) for each in zip(size, padding, strict=True)), ceil_mode)

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, self.padding, ceil_mode=self.ceil_mode)


def _pooled(size: int, padding: int, ceil_mode: bool) -> int:
    """PyTorch's rule: with `ceil_mode` a last window may reach over the edge, if it begins inside or in the padding."""
    whole = (size + 2 * padding - 3 + ceil_mode) // 2 + 1
    return whole - 1 if ceil_mode and 2 * (whole - 1) >= size + padding else whole


class Norm(NamedTuple):
    """How an image is normalised; the statistics are its `own`, or constants."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    own: bool


def why_not(x: Tensor) -> str:
    """Why no kernel of ours joins the BatchNorm of an image to what follows; empty if one does."""
    return joins.refusal(x, launching.device_and_kernels(x.device)[1])


# What runs ------------------------------------------------------------------------------------------------------------


def _prepared(kind: type, x: Tensor, *arguments: Any) -> Any:
    key = (kind.__name__, *calls.signature(x), *arguments)
    return calls.look_up(key) or calls.remember(key, kind(x, *arguments))


def _add(x: Tensor, *rest: Tensor | None) -> Tensor:
    with launching.on_device(x.device):
        return _prepared(joins.Add, x)(x, *rest)


def _pool(x: Tensor, scale: Tensor, shift: Tensor, padding: list[int], size: list[int]) -> tuple[Tensor, Tensor]:
    with launching.on_device(x.device):
        return _prepared(joins.Pool, x, tuple(padding), tuple(size))(x, scale, shift)


def _pool_backward(grad: Tensor, index: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *values, padding = rest
    with launching.on_device(x.device):
        return _prepared(joins.PoolBackward, x, tuple(padding), tuple(grad.shape[2:]))(grad, index, x, *values)


def _fake_pool(x: Tensor, scale: Tensor, shift: Tensor, padding: list[int], size: list[int]) -> tuple[Tensor, Tensor]:
    like = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return like, torch.empty_like(like, dtype=torch.uint8)


_RUN = {"norm_add": _add, "norm_pool": _pool, "norm_pool_backward": _pool_backward}


def _operator(name: str, x: Tensor) -> Callable[..., Any]:
    """An operator; where nobody wants to see it, what runs it, without PyTorch's dispatcher."""
    return _RUN[name] if is_plain_state() and not x.is_meta else getattr(torch.ops.fused_sepconv, name)


def _register() -> None:
    fakes = {
        "norm_add": lambda x, *_: torch.empty_like(x),
        "norm_pool": _fake_pool,
        "norm_pool_backward": lambda grad, index, x, *_: torch.empty_like(x),
    }
    for name, fake in fakes.items():
        LIBRARY.impl(name, _RUN[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_sepconv::{name}", fake, lib=LIBRARY)


_register()


# Derivatives ----------------------------------------------------------------------------------------------------------

_NORM = 5  # x, mean, invstd, weight, bias: of each of the two images


class NormJoinFunction(torch.autograd.Function):
    """`apply` takes x, then the four tensors of its norm; the other image or None, then those of its norm or Nones;
    the window or None; and whether the statistics are x's own, and the other image's. All images are NHWC."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        tensors, (window, *own) = args[: 2 * _NORM], args[2 * _NORM :]
        (x, *norm), (other, *other_norm) = tensors[:_NORM], tensors[_NORM:]
        ctx.window, ctx.own = window, own
        picked, index = x, None
        scale, shift = scale_and_shift(*norm)
        if window is not None:
            picked, index = _operator("norm_pool", x)(x, scale, shift, window.padding, window.size)
        affine = (None, None) if other_norm[0] is None else scale_and_shift(*other_norm)
        y = _operator("norm_add", x)(picked, scale, shift, other, *affine)
        kept = other if other_norm[0] is not None else None  # of an image as it is, the gradient asks nothing
        ctx.has_other = other is not None
        ctx.save_for_backward(x, *norm, kept, *other_norm, None if index is None else picked, index)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, picked, index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        first, second, window = tensors[:_NORM], tensors[_NORM:], ctx.window
        others = (None,) * 3
        if torch.is_grad_enabled():
            return *_composed_gradients(ctx, tensors, needs, grad), *others
        with without_autocast(first[0]):
            like = first[0] if picked is None else picked
            grad = _readable(grad.to(like.dtype))
            gradients = _gradients(grad, first, ctx.own[0], needs[:_NORM], window, picked, index)
            if second[1] is not None:
                gradients += _gradients(grad, second, ctx.own[1], needs[_NORM : 2 * _NORM], None, None, None)
            else:
                gradients += (grad if needs[_NORM] else None, None, None, None, None)
        return *gradients, *others


def _gradients(
    grad: Tensor,
    tensors: list[Tensor],
    own: bool,
    needs: tuple[bool, ...],
    window: Window | None,
    picked: Tensor | None,
    index: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of an image and of its norm's tensors; `grad` is that of its normalised, perhaps pooled values."""
    x, mean, invstd, weight, bias = tensors
    want_x, _, _, want_weight, want_bias = needs
    sums = None
    if want_weight or want_bias or (want_x and own):
        # A pooled value's gradient belongs to the one pixel that was picked.
        sums = _sums(grad, x if picked is None else picked, mean, invstd, weight)
    grad_x = None
    if want_x and window is None:
        if own:
            grad_x = through_statistics(grad, x, mean, invstd, weight, *sums, None)
        else:
            grad_x = (grad * by_channel(invstd if weight is None else invstd * weight)).to(x.dtype)
    elif want_x:
        factor = (invstd if weight is None else invstd * weight).contiguous()
        values = (None, None, None)
        if own:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            values = mean, sums[0] / count, sums[1] * invstd.square() / count
        grad_x = _operator("norm_pool_backward", x)(grad, index, x, factor, *values, window.padding)
    return (
        grad_x,
        None,
        None,
        (sums[1] * invstd).to(weight.dtype) if want_weight else None,
        sums[0].to(bias.dtype) if want_bias else None,
    )


def _sums(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums over all pixels of the gradient, and of it times x - mean."""
    if is_on_gpu(x):
        return torch.batch_norm_backward_reduce(grad, x, mean, invstd, weight, True, False, False)[:2]
    wide = grad.to(accumulator(x))
    return wide.sum((0, 2, 3)), (wide * (x - by_channel(mean))).sum((0, 2, 3))


def _composed_gradients(ctx: Any, tensors: list[Tensor], needs: tuple, grad: Tensor) -> list[Tensor | None]:
    """The gradients in PyTorch's operators, to be differentiated in their turn."""
    asked = [i for i in range(2 * _NORM) if needs[i] and tensors[i] is not None]

    def function(*values: Tensor) -> Tensor:
        filled = list(tensors)
        for i, value in zip(asked, values, strict=True):
            filled[i] = value
        u = _u(filled[:_NORM], ctx.own[0])
        y = u if ctx.window is None else ctx.window.pool(u)
        return y if filled[_NORM] is None else y + _u(filled[_NORM:], ctx.own[1])

    found: list[Tensor | None] = [None] * (2 * _NORM)
    for i, value in zip(asked, vjp(function, tuple(tensors[i] for i in asked), grad), strict=True):
        found[i] = value
    if needs[_NORM] and tensors[_NORM] is None:
        found[_NORM] = grad
    return found


def _u(tensors: list[Tensor], own: bool) -> Tensor:
    x, mean, invstd, weight, bias = tensors
    if own:
        mean, invstd = with_own_statistics(x, invstd)
    return normalise(x, mean, invstd, weight, bias)


def norm_join(x: Tensor, norm: Norm, other: Tensor | None, other_norm: Norm | None, window: Window | None) -> Tensor:
    """pool(norm(x)) + other_norm(other), by the kernels; `why_not` is empty for x."""
    if other is not None:
        other = _readable(other)
    second = (None,) * 4 if other_norm is None else other_norm[:4]
    own = norm.own, other_norm is not None and other_norm.own
    with without_autocast(x):
        return NormJoinFunction.apply(x, *norm[:4], other, *second, window, *own)


def _readable(image: Tensor) -> Tensor:
    """An image as the kernels read it: a copy where it is not NHWC or not aligned."""
    image = image.contiguous(memory_format=torch.channels_last)
    return image.clone() if image.data_ptr() % joins.VECTOR_BYTES else image
