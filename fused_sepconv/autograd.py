"""The derivatives of the two operators: a `torch.autograd.Function` each, and how PyTorch reaches them.

A call is `torch.ops.fused_sepconv.separable_conv2d` whether it is eager, compiled, exported or inside a `torch.func`
transform. The op's Autograd kernel, registered below, applies the Function at the transform level that is being
processed, and calls the op again below autograd for the value. So there is one way in for all of them. (Handing
`backward` to `torch.library.register_autograd` instead gives silent zeros in forward mode and fails inside
`torch.func.grad`.)

Inside a forward-mode level the kernel is PyTorch's own operators, which carry tangents in every order: a forward-mode
derivative never runs our kernels, and is never silently zero.

Saved between forward and backward: the inputs, and the output where the last activation's derivative is read from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# PyTorch's own names for what `torch.autograd.Function.apply` and its functorch rule do inside; stable since 2.0.
from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from . import ops, reference
from .activations import ACTIVATIONS
from .arguments import Arguments
from .memory_format import memory_format_of

_INPUTS = 6  # x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual
_ARGUMENTS = 7  # stride, padding, dilation, the three activations, backend


class SeparableConv2dFunction(torch.autograd.Function):
    """y = act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual).

    `apply` takes the arguments of `torch.ops.fused_sepconv.separable_conv2d`, unchecked.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with _below_autograd():
            return ops.separable_conv2d(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, residual = inputs[:_INPUTS]
        ctx.arguments, ctx.backend = Arguments(*inputs[_INPUTS:-1]), inputs[-1]
        activation = ACTIVATIONS[ctx.arguments.activation]
        reads_output = activation.from_output is not None and ctx.arguments.activation is not None
        # The residual is only ever needed to compute the last activation's argument again.
        residual = None if activation.piecewise_linear else residual
        ctx.save_for_backward(*tensors, residual, output if reads_output else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        *tensors, output = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:_INPUTS])
        # Without an activation the residual's gradient is grad_output itself.
        passes_through = mask[5] and ctx.arguments.activation is None
        mask[5] = mask[5] and not passes_through
        if tensors[5] is None and mask[5]:
            tensors[5] = grad_output  # stands in for the residual: its shape and strides alone are read
        gradients = [None] * _INPUTS
        if any(mask):
            results = ops.separable_conv2d_backward(
                grad_output, *tensors, output, *ctx.arguments, ctx.backend, tuple(mask)
            )
            gradients = [grad if wanted else None for grad, wanted in zip(results, mask, strict=True)]
        if passes_through:
            gradients[5] = grad_output
        return (*gradients, *(None,) * _ARGUMENTS)


class SeparableConv2dBackwardFunction(torch.autograd.Function):
    """The gradients of a separable convolution, themselves differentiable, through PyTorch's own operators.

    A function of grad_output and the six inputs: `output` is one of them written another way, and has no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> ops.Gradients:
        with _below_autograd():
            return ops.separable_conv2d_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: ops.Gradients) -> None:
        tensors, arguments = inputs[: _INPUTS + 2], inputs[_INPUTS + 2 :]
        ctx.arguments, ctx.mask = Arguments(*arguments[:-2]), tuple(arguments[-1])
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor) -> tuple:
        function, present = _as_function_of_tensors(ctx)
        wanted = tuple(grad for grad, asked in zip(grad_gradients, ctx.mask, strict=True) if asked)
        gradients = dict(zip(present, _vjp(function, tuple(present.values()), wanted), strict=True))
        return (*(gradients.get(i) for i in range(_INPUTS + 1)), None, *(None,) * _ARGUMENTS, None)


def _as_function_of_tensors(ctx: Any) -> tuple[Any, dict[int, Tensor]]:
    """The backward of a saved call as a function of the tensors it has, and those tensors by position."""
    *tensors, output = ctx.saved_tensors
    if not ACTIVATIONS[ctx.arguments.activation].piecewise_linear:
        output = None  # its own dependence on the inputs matters now: compute it again
    present = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * (_INPUTS + 1)
        for i, value in zip(present, values, strict=True):
            filled[i] = value
        gradients = reference.backward(*filled, output, *ctx.arguments, ctx.mask)
        return tuple(grad for grad in gradients if grad is not None)

    return function, present


def _vjp(function: Any, primals: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product, differentiable in its turn."""
    if _are_functorch_transforms_active():
        return torch.func.vjp(function, *primals)[1](cotangents)
    # torch.func refuses to work under saved-tensor hooks (save_on_cpu, checkpointing); plain autograd does not.
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the derivative stops at these tensors and yet, where asked for, leads on through them.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in primals]
        outputs = function(*inputs)
        return torch.autograd.grad(outputs, inputs, cotangents, create_graph=differentiable, allow_unused=True)


@contextmanager
def _below_autograd() -> Iterator[None]:
    """Where a Function's forward calls its op for the value."""
    if not _are_functorch_transforms_active():
        with _AutoDispatchBelowAutograd():
            yield
        return
    # A Function switches gradients off around its forward, but the transforms below this level differentiate too.
    with torch.enable_grad(), _set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
        yield


def _records(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _is_traced(arg: Any) -> bool:
    return isinstance(arg, Tensor) and type(arg) not in (Tensor, torch.nn.Parameter)


def _has_tangent(tensor: Tensor) -> bool:
    # A graph that is being traced makes dual tensors without entering the level in Python: the tensors alone tell. (Not
    # asked of ordinary tensors, in whose eager calls the level tells: asking costs a view of each, 20 % of a call.)
    return torch._VF._unpack_dual(tensor, level=0).tangent is not None


def separable_conv2d(*args: Any) -> Tensor:
    """`torch.ops.fused_sepconv.separable_conv2d`, called below autograd where nothing can ask for a derivative.

    The op's Autograd kernel would find the same out, in Python, at the price of a second dispatch: 8 us a call.
    """
    if _in_forward_mode():
        return _forward_composite(*args)
    if torch.compiler.is_compiling() or _are_functorch_transforms_active() or _records(args[:_INPUTS]):
        return ops.separable_conv2d(*args)
    with _AutoDispatchBelowAutograd():
        return ops.separable_conv2d(*args)


def _autograd_kernel(op: Any, function: type[torch.autograd.Function], composite: Any) -> Any:
    """What the op does at PyTorch's Autograd key: apply the function, once, at the level being processed."""

    def kernel(*args: Any) -> Any:
        if _in_forward_mode() or any(_is_traced(arg) and _has_tangent(arg) for arg in args):
            return composite(*args)
        if not _records(args):
            with _AutoDispatchBelowAutograd():
                return op(*args)
        # Function.apply would hand the call to the whole stack of transforms again: its base class applies it here.
        apply = super(torch.autograd.Function, function).apply
        if not _are_functorch_transforms_active():
            return apply(*args)
        with enable_single_level_autograd_function():
            return apply(*args)

    return kernel


def _forward_composite(*args: Any) -> Tensor:
    *call, _backend = args
    # Not `as_output`: its copy_ into a new tensor could not be batched.
    return reference.forward(*call).contiguous(memory_format=memory_format_of(args[0]))


def _backward_composite(*args: Any) -> ops.Gradients:
    *call, _backend, output_mask = args
    if not ACTIVATIONS[args[-3]].piecewise_linear:
        call[_INPUTS + 1] = None  # as in double backward: the output's own dependence on the inputs matters
    gradients = reference.backward(*call, output_mask)
    return tuple(args[0].new_zeros(0) if grad is None else grad for grad in gradients)


ops.LIBRARY.impl(
    "separable_conv2d",
    _autograd_kernel(ops.separable_conv2d, SeparableConv2dFunction, _forward_composite),
    "Autograd",
)
ops.LIBRARY.impl(
    "separable_conv2d_backward",
    _autograd_kernel(ops.separable_conv2d_backward, SeparableConv2dBackwardFunction, _backward_composite),
    "Autograd",
)
