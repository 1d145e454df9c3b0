"""Eager calls on plain tensors, which skip PyTorch's dispatcher.

A call with nothing unusual about it (no compiler, mode, transform, tracer, tensor subclass or forward-mode derivative)
is a lookup by everything that decides what runs; all others go through the operator. Both end in `calls.Prepared`.
"""

from __future__ import annotations

from collections.abc import Callable
from marshal import dumps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_sepconv.families.registry import RunBackward
from fused_sepconv.ops import autograd, calls, operators
from fused_sepconv.ops.arguments import check_save
from fused_sepconv.ops.backend import BACKENDS
from fused_sepconv.ops.calls import Prepared
from fused_sepconv.ops.operators import Operator
from fused_sepconv.ops.torch_internals import (
    excluded_keys,
    included_keys,
    is_plain_state,
    may_skip_dispatcher,
)
from fused_sepconv.tensors.memory_format import as_gradient

Route = Callable[..., Tensor]

_routes: dict[tuple, Route | None] = {}
_UNKNOWN: Any = object()


def run(operator: Operator, tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str) -> Tensor | None:
    """The result of an eager call, or None where it has to go through PyTorch's dispatcher.

    `tensors` and `options` are a user's own. A call that was not met before is checked.
    """
    if not may_skip_dispatcher():
        return None
    try:
        # Bytes tell 1 from True and 1.0, which are equal as keys. What marshal refuses is no plain number or name.
        key = (operator.name, backend, *_signatures(tensors), *calls.flags(tensors[0], backend), dumps(options, 2))
        route = _routes.get(key, _UNKNOWN)
    except Exception:  # no tensor, no strides, no hash: whatever it is, the checks will say
        return None
    if route is _UNKNOWN:
        route = calls.keep(_routes, key, _route(operator, tensors, options, backend))
    return None if route is None else route(*tensors)


def _signatures(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    """The dispatch keys of this thread, and all that tells a kernel one plain tensor from another.

    Raises where a tensor is of another kind, a subclass or a tracer's stand-in, or has no strides or memory.
    """
    parts: list[Any] = [included_keys().raw_repr(), excluded_keys().raw_repr()]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
            continue
        if tensor.__class__ is not Tensor and tensor.__class__ is not Parameter:
            raise TypeError  # before any other question, which a tracer would note
        address = tensor.data_ptr()
        parts += (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            address & 15 if address else None,
            tensor.is_neg(),
        )
    return parts


def clear() -> None:
    """Forgets all routes and prepared calls."""
    _routes.clear()
    calls.clear()


def _route(operator: Operator, tensors: tuple, options: tuple, backend: str) -> Route | None:
    """How calls of one key run; None for the dispatcher."""
    x = tensors[0]
    if not _are_plain(tensors) or not is_plain_state() or x.dim() != 4 or backend not in BACKENDS:
        return None
    if x.device.type not in ("cpu", "cuda"):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return _Autocast(operator, options, backend, x.device.type)
    arguments = operator.normalise(tensors, options)
    save = check_save(options[-1]) if operator.saves_intermediate else None
    prepared = calls.find(operator, tensors, arguments, backend, save)
    value = prepared.forward if operators.asks_the_plan(x, backend) else operator.composed(arguments, tensors)
    return _Direct(prepared, value)


class _Autocast:
    """Casts as a convolution under autocast would, then runs without it."""

    def __init__(self, operator: Operator, options: tuple, backend: str, device_type: str) -> None:
        self._operator, self._options, self._backend, self._device_type = operator, options, backend, device_type

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(self._device_type)
        cast = tuple(
            tensor if tensor is None or tensor.dtype is torch.float64 else tensor.to(dtype) for tensor in tensors
        )
        with torch.autocast(self._device_type, enabled=False):
            y = run(self._operator, cast, self._options, self._backend)
            if y is None:
                arguments = self._operator.normalise(cast, self._options)
                save = (check_save(self._options[-1]),) if self._operator.saves_intermediate else ()
                y = self._operator.forward(*cast, *arguments, self._backend, *save)
        return y


class _Direct:
    """The value of a call, with a derivative where one can be asked for."""

    def __init__(self, prepared: Prepared, value: Route) -> None:
        self._prepared, self._value, self._apply = prepared, value, _APPLY[prepared.operator.name]

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return self._apply(self._prepared, self._value, *tensors)
        return self._value(*tensors)


class _Function(torch.autograd.Function):
    """A prepared call and its derivative."""

    @staticmethod
    def forward(ctx: Any, prepared: Prepared, value: Route, *tensors: Tensor | None) -> Tensor:
        intermediate, mask = None, ctx.needs_input_grad[2:]
        if prepared.saves_for.get(mask) or (mask not in prepared.saves_for and prepared.saves(tensors, mask)):
            y, intermediate = prepared.forward_saving(*tensors)
        else:
            y = value(*tensors)
        ctx.prepared = prepared
        kept = autograd.saved(prepared.operator, tensors, y, prepared.arguments.activation)
        ctx.save_for_backward(*kept, intermediate)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        prepared, mask, saved = ctx.prepared, ctx.needs_input_grad[2:], ctx.saved_tensors
        operator, arguments = prepared.operator, prepared.arguments
        *kept, intermediate = saved
        key = _backward_key(prepared, grad_output, saved, mask)

        def run(tensors: list[Tensor | None], output: Tensor | None, mask: tuple[bool, ...]) -> Any:
            route = None if key is None else prepared.backward_routes.get(key, _UNKNOWN)
            if route is _UNKNOWN:
                route = _backward_route(prepared, key, grad_output, tuple(tensors), output, mask, intermediate)
            if route is None:
                return operator.backward(grad_output, *tensors, output, *arguments, prepared.backend, mask)
            return route(grad_output, tensors, output, intermediate)

        return None, None, *autograd.gradients(operator, grad_output, kept, mask, arguments.activation, run)


class PreparedSeparableConv2dFunction(_Function):
    """The node of `separable_conv2d` in a graph."""


class PreparedDepthwiseConv2dFunction(_Function):
    """The node of `depthwise_conv2d` in a graph."""


# `Function.apply` in Python binds the arguments by their signature and asks for transforms, of which there are none
# here: most of its time. Its base class does the rest.
_APPLY: dict[str, Route] = {
    "separable_conv2d": super(torch.autograd.Function, PreparedSeparableConv2dFunction).apply,
    "depthwise_conv2d": super(torch.autograd.Function, PreparedDepthwiseConv2dFunction).apply,
}


def _backward_key(
    prepared: Prepared, grad_output: Tensor, saved: tuple[Tensor | None, ...], mask: tuple[bool, ...]
) -> tuple[Any, ...] | None:
    """Everything that decides how a call's gradients run; None where they are differentiated in their turn, or where
    somebody wants to see the operator."""
    if torch.is_grad_enabled() or not may_skip_dispatcher():
        return None
    try:
        return mask, *_signatures((grad_output, *saved)), *calls.flags(grad_output, prepared.backend)
    except Exception:  # no memory: a batch of gradients, say
        return None


def _backward_route(
    prepared: Prepared,
    key: tuple[Any, ...],
    grad_output: Tensor,
    tensors: tuple[Tensor | None, ...],
    output: Tensor | None,
    mask: tuple[bool, ...],
    intermediate: Tensor | None,
) -> _DirectBackward | None:
    """How the gradients of one key run; None for the dispatcher."""
    operator, route, settled = prepared.operator, None, True
    plain = is_plain_state() and not torch.is_autocast_enabled(grad_output.device.type)
    if plain and _are_plain((grad_output, *tensors)):
        # Not `prepared` itself: a parameter may have got other memory or a flag another value since the forward.
        call = calls.find(operator, tensors, prepared.arguments, prepared.backend, prepared.save)
        run, settled = call.prepare_backward(grad_output, tensors, output, mask, intermediate is not None)
        images = [(i, torch.empty_like(tensors[i]).stride()) for i in operator.images if tensors[i] is not None]
        route = _DirectBackward(call, run, images)
    return calls.keep(prepared.backward_routes, key, route, calls.MOST_GRADIENTS) if settled else route


class _DirectBackward:
    """The gradients of a call on tensors of one signature."""

    def __init__(self, call: Prepared, run: RunBackward, images: list[tuple[int, tuple[int, ...]]]) -> None:
        self._call, self._run, self._images = call, run, images

    def __call__(
        self, grad_output: Tensor, tensors: list[Tensor | None], output: Tensor | None, intermediate: Tensor | None
    ) -> list[Tensor | None]:
        given = (grad_output, tensors, output)
        found = list(self._call.run(self._run, given if intermediate is None else (*given, intermediate)))
        for image, strides in self._images:
            grad = found[image]
            if grad is not None and (grad.stride() != strides or grad.storage_offset()):
                found[image] = as_gradient(tensors[image], grad)
        return found


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Tells whether a kernel may read these tensors' memory as it is. Lazy negations, and zeros or functional stand-ins
    without memory, have a signature and are not plain."""
    return not any(
        tensor is not None and (tensor.is_neg() or (tensor.numel() and not tensor.data_ptr())) for tensor in tensors
    )
