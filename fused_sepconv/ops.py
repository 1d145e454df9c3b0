"""The two custom operators: their schemas, what runs them, and what tracers need to know of them.

`torch.ops.fused_sepconv.separable_conv2d` and `..._backward` take an already checked call (`arguments.py`). Each has
one implementation for every device, which asks the plan what to run: a kernel of the native module or PyTorch's own
convolutions. Their autograd rules are in `autograd.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import execution, reference
from .arguments import Arguments, autocasts, hashable, output_size
from .backend import BACKENDS
from .memory_format import as_gradient, as_output, empty_output

_ARGUMENTS = (
    "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
    "str? pre_activation, str? mid_activation, str? activation, str backend"
)
_INPUTS = (
    "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? bias, Tensor? depthwise_bias, Tensor? residual"
)

# The output's memory format is x's, so a compiler must not change x's on the way.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)

LIBRARY = torch.library.Library("fused_sepconv", "DEF")
LIBRARY.define(f"separable_conv2d({_INPUTS}, {_ARGUMENTS}) -> Tensor", tags=_TAGS)
# Six gradients, in the order of the inputs; one that output_mask does not ask for is an empty tensor of shape (0,).
# (Not a list, and never undefined: legacy vmap, behind is_grads_batched, falls back for nothing but plain tensors.)
LIBRARY.define(
    f"separable_conv2d_backward(Tensor grad_output, {_INPUTS}, Tensor? output, {_ARGUMENTS}, bool[6] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

separable_conv2d = torch.ops.fused_sepconv.separable_conv2d.default
separable_conv2d_backward = torch.ops.fused_sepconv.separable_conv2d_backward.default

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# What runs ----------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    depthwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pre_activation: str | None,
    mid_activation: str | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    tensors = (x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual)
    arguments = (stride, padding, dilation, pre_activation, mid_activation, activation)
    if _asks_the_plan(x, backend):
        y = execution.forward(tensors, Arguments(*hashable(arguments)), backend)
        if y is not None:
            return y
    if residual is not None and residual.dtype != x.dtype:  # the one thing that PyTorch's operators would promote
        raise TypeError(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}")
    with _without_autocast(x):
        return as_output(x, reference.forward(*tensors, *arguments))


def _backward(
    grad_output: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    depthwise_bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pre_activation: str | None,
    mid_activation: str | None,
    activation: str | None,
    backend: str,
    output_mask: Sequence[bool],
) -> Gradients:
    tensors = (x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual)
    arguments = (stride, padding, dilation, pre_activation, mid_activation, activation)
    gradients = None
    if _asks_the_plan(x, backend):
        gradients = execution.backward(
            grad_output, tensors, output, Arguments(*hashable(arguments)), backend, tuple(output_mask)
        )
    if gradients is None:
        with _without_autocast(x):
            gradients = reference.backward(grad_output, *tensors, output, *arguments, output_mask)
    return tuple(
        x.new_empty(0) if grad is None else as_gradient(tensor, grad.clone() if grad is grad_output else grad)
        for tensor, grad in zip(tensors, gradients, strict=True)
    )


def _asks_the_plan(x: Tensor, backend: str) -> bool:
    """Whether a kernel could run: when it is asked for, or on a GPU; on the CPU a well-kept library beats our own."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    return backend == "fused" or (backend == "auto" and x.is_cuda)


def _without_autocast(x: Tensor) -> Any:
    """The op computes in the dtype it is given; autocast's casts came before it."""
    if autocasts(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


LIBRARY.impl("separable_conv2d", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("separable_conv2d_backward", _backward, "CompositeExplicitAutograd")


# What tracers see ---------------------------------------------------------------------------------------------------


@torch.library.register_fake("fused_sepconv::separable_conv2d", lib=LIBRARY)
def _fake_forward(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    depthwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
) -> Tensor:
    out_h, out_w = output_size(x.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)
    return empty_output(x, (x.shape[0], pointwise_weight.shape[0], out_h, out_w))


@torch.library.register_fake("fused_sepconv::separable_conv2d_backward", lib=LIBRARY)
def _fake_backward(grad_output: Tensor, *rest: Any) -> Gradients:
    inputs, output_mask = rest[:6], rest[-1]
    return tuple(
        torch.empty_like(tensor) if wanted else grad_output.new_empty(0)
        for tensor, wanted in zip(inputs, output_mask, strict=True)
    )


# vmap ---------------------------------------------------------------------------------------------------------------
#
# A batch of images is more images: it is folded into N. A batch of weights is a convolution each, run one by one.

_WEIGHTS = slice(1, 5)  # depthwise_weight, pointwise_weight, bias, depthwise_bias among the inputs


@torch.library.register_vmap("fused_sepconv::separable_conv2d", lib=LIBRARY)
def _vmap_forward(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    inputs, dims = args[:6], in_dims[:6]
    if any(dim is not None for dim in dims[_WEIGHTS]):
        return _one_by_one(separable_conv2d, info.batch_size, in_dims, args)
    x, residual = (_fold(inputs[i], dims[i], info.batch_size) for i in (0, 5))
    y = separable_conv2d(x, *inputs[_WEIGHTS], residual, *args[6:])
    images = x.shape[0] // info.batch_size if info.batch_size else inputs[0].movedim(dims[0] or 0, 0).shape[1]
    return y.reshape(info.batch_size, images, *y.shape[1:]), 0


@torch.library.register_vmap("fused_sepconv::separable_conv2d_backward", lib=LIBRARY)
def _vmap_backward(info: Any, in_dims: tuple, *args: Any) -> tuple[Gradients, tuple[int, ...]]:
    # The gradients of weights are sums over the images of one example of the batch, so folding would mix examples.
    gradients, _ = _one_by_one(separable_conv2d_backward, info.batch_size, in_dims, args)
    return gradients, (0,) * len(gradients)


def _fold(tensor: Tensor | None, dim: int | None, batch_size: int) -> Tensor | None:
    """(..., B, ...) -> (B * N, ...): the vmapped dimension in front of, and folded into, the images."""
    if tensor is None:
        return None
    tensor = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(batch_size * tensor.shape[1], *tensor.shape[2:])


def _one_by_one(op: Callable, batch_size: int, in_dims: tuple, args: tuple) -> tuple[Any, int]:
    if batch_size == 0:
        raise ValueError("vmap: an empty batch of weights or gradients has no result whose shape could be known")

    def example(i: int) -> list[Any]:
        batched = (isinstance(arg, Tensor) and dim is not None for arg, dim in zip(args, in_dims, strict=True))
        return [arg.select(dim, i) if b else arg for arg, dim, b in zip(args, in_dims, batched, strict=True)]

    results = [op(*example(i)) for i in range(batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), 0


# torch.utils.flop_counter -------------------------------------------------------------------------------------------


def _convolution_flops(depthwise: Sequence[int], y: Sequence[int]) -> tuple[int, int]:
    """Flops of the depthwise and of the pointwise convolution: two a multiply-add."""
    intermediate, _, kernel_h, kernel_w = depthwise
    n, features, out_h, out_w = y
    pixels = n * out_h * out_w
    return 2 * pixels * intermediate * kernel_h * kernel_w, 2 * pixels * intermediate * features


@register_flop_formula(torch.ops.fused_sepconv.separable_conv2d)
def _forward_flops(x: Any, depthwise_weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sum(_convolution_flops(depthwise_weight, out_shape))


@register_flop_formula(torch.ops.fused_sepconv.separable_conv2d_backward)
def _backward_flops(
    grad_output: Any, x: Any, depthwise_weight: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    """A convolution's work for each gradient asked for; the recomputed forward is overhead, and not counted."""
    depthwise, pointwise = _convolution_flops(depthwise_weight, grad_output)
    want_x, want_depthwise, want_pointwise, _, want_depthwise_bias, _ = rest[-1]
    want_t = want_x or want_depthwise or want_depthwise_bias
    return pointwise * (want_t + want_pointwise) + depthwise * (want_x + want_depthwise)
