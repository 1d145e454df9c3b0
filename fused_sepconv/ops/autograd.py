"""The derivatives of the operators: a `torch.autograd.Function` each, and how PyTorch reaches them.

A call is its operator, such as `torch.ops.fused_sepconv.separable_conv2d`, whether it is eager, compiled, exported or
inside a `torch.func` transform. The op's Autograd kernel, registered below, applies the Function at the transform level
that is being processed, and calls the op again below autograd for the value. So there is one way in for all of them.
(Handing `backward` to `torch.library.register_autograd` instead gives silent zeros in forward mode and fails inside
`torch.func.grad`.)

Inside a forward-mode level the kernel is PyTorch's own operators, which carry tangents in every order: a forward-mode
derivative never runs our kernels, and is never silently zero.

Saved between forward and backward: the inputs, the output where the last activation's derivative is read from it, and
the depthwise result where `saving.py` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sepconv.ops import operators, saving
from fused_sepconv.ops.arguments import hashable
from fused_sepconv.ops.operators import Operator, without_autocast
from fused_sepconv.ops.torch_internals import (
    AutoDispatchBelowAutograd,
    SingleLevelFunction,
    are_functorch_transforms_active,
    below_subclasses,
    has_tangent,
    in_forward_mode,
    set_forward_mode_enabled,
    single_level_autograd_function,
)
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import memory_format_of


class _Forward(torch.autograd.Function):
    """An operator and its derivative. `apply` takes the operator's own arguments, unchecked."""

    operator: ClassVar[Operator]
    generate_vmap_rule = True

    @classmethod
    def forward(cls, *args: Any) -> Tensor:
        with below_autograd():
            return cls.operator.forward(*args)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple, output: Tensor) -> None:
        count = cls.operator.count
        ctx.arguments, ctx.backend = cls.operator.arguments(*inputs[count:-1]), inputs[-1]
        ctx.save_for_backward(*saved(cls.operator, inputs[:count], output, ctx.arguments.activation))

    @classmethod
    def backward(cls, ctx: Any, grad_output: Tensor) -> tuple:
        operator = cls.operator
        mask = ctx.needs_input_grad[: operator.count]

        def run(tensors: list[Tensor | None], output: Tensor | None, mask: tuple[bool, ...]) -> operators.Gradients:
            return operator.backward(grad_output, *tensors, output, *ctx.arguments, ctx.backend, mask)

        found = gradients(operator, grad_output, ctx.saved_tensors, mask, ctx.arguments.activation, run)
        return (*found, *(None,) * len(ctx.arguments), None)


def saved(
    operator: Operator, tensors: tuple[Tensor | None, ...], output: Tensor, activation: str | None
) -> tuple[Tensor | None, ...]:
    """What a call's derivative reads: the inputs, and the output where the last activation's derivative is read from
    it."""
    last = ACTIVATIONS[activation]
    if operator.residual is not None and last.from_output is not None:  # act'' is 0 then
        kept = list(tensors)
        kept[operator.residual] = None  # it is only ever needed to compute the last activation's argument again
        tensors = tuple(kept)
    return *tensors, output if activation is not None and last.from_output is not None else None


def gradients(
    operator: Operator,
    grad_output: Tensor,
    kept: tuple[Tensor | None, ...],
    mask: tuple[bool, ...],
    activation: str | None,
    run: Callable[[list[Tensor | None], Tensor | None, tuple[bool, ...]], tuple[Tensor | None, ...]],
) -> list[Tensor | None]:
    """The gradient of each input from what `saved` kept, by `run(tensors, output, mask)`; None where the mask does not
    ask."""
    *tensors, output = kept
    residual = operator.residual
    passes_through = residual is not None and mask[residual] and activation is None
    if residual is not None and mask[residual]:
        if passes_through:  # without an activation the residual's gradient is grad_output itself
            mask = (*mask[:residual], False, *mask[residual + 1 :])
        if tensors[residual] is None:
            tensors[residual] = grad_output  # stands in for it: its shape and strides alone are read
    found: list[Tensor | None] = [None] * operator.count
    if any(mask):
        found = [grad if wanted else None for grad, wanted in zip(run(tensors, output, mask), mask, strict=True)]
    if passes_through:
        found[residual] = grad_output
    return found


class _Backward(torch.autograd.Function):
    """The gradients of an operator, themselves differentiable, through PyTorch's own operators.

    A function of grad_output and the inputs: `output` is one of them written another way, and has no gradient.
    """

    operator: ClassVar[Operator]
    generate_vmap_rule = True

    @classmethod
    def forward(cls, *args: Any) -> operators.Gradients:
        with below_autograd():
            return cls.operator.backward(*args)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple, output: operators.Gradients) -> None:
        count = cls.operator.count + 2  # grad_output, the inputs, the output
        ctx.arguments, ctx.mask = cls.operator.arguments(*inputs[count:-2]), tuple(inputs[-1])
        ctx.save_for_backward(*inputs[:count])

    @classmethod
    def backward(cls, ctx: Any, *grad_gradients: Tensor) -> tuple:
        function, present = _as_function_of_tensors(cls.operator, ctx)
        wanted = tuple(grad for grad, asked in zip(grad_gradients, ctx.mask, strict=True) if asked)
        gradients = dict(zip(present, vjp(function, tuple(present.values()), wanted), strict=True))
        tensors = (gradients.get(i) for i in range(cls.operator.count + 1))
        return (*tensors, None, *(None,) * len(ctx.arguments), None, None)


class SeparableConv2dFunction(_Forward):
    """y = act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual).

    `apply` takes the arguments of `torch.ops.fused_sepconv.separable_conv2d`, unchecked.
    """

    operator = operators.SEPARABLE_CONV2D


class SeparableConv2dBackwardFunction(_Backward):
    """The gradients of a separable convolution."""

    operator = operators.SEPARABLE_CONV2D


class DepthwiseConv2dFunction(_Forward):
    """y = act(depthwise(pre_act(x)) + bias).

    `apply` takes the arguments of `torch.ops.fused_sepconv.depthwise_conv2d`, unchecked.
    """

    operator = operators.DEPTHWISE_CONV2D


class DepthwiseConv2dBackwardFunction(_Backward):
    """The gradients of a depthwise convolution."""

    operator = operators.DEPTHWISE_CONV2D


def _as_function_of_tensors(operator: Operator, ctx: Any) -> tuple[Any, dict[int, Tensor]]:
    """The backward of a saved call as a function of the tensors it has, and those tensors by position."""
    *tensors, output = ctx.saved_tensors  # the output is only read where its own derivative is 0: see piecewise_linear
    present = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None}
    _, backward = operator.reference

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(present, values, strict=True):
            filled[i] = value
        gradients = backward(*filled, output, *ctx.arguments, ctx.mask)
        return tuple(grad for grad in gradients if grad is not None)

    return function, present


def vjp(function: Any, primals: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product, differentiable in its turn."""
    if are_functorch_transforms_active():
        return torch.func.vjp(function, *primals)[1](cotangents)
    # torch.func refuses to work under saved-tensor hooks (save_on_cpu, checkpointing); plain autograd does not.
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that the derivative stops at these tensors and yet, where asked for, leads on through them.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in primals]
        outputs = function(*inputs)
        return torch.autograd.grad(outputs, inputs, cotangents, create_graph=differentiable, allow_unused=True)


@contextmanager
def below_autograd() -> Iterator[None]:
    """A context in which a Function's forward calls its op for the value."""
    if not are_functorch_transforms_active():
        with AutoDispatchBelowAutograd():
            yield
        return
    # A Function switches gradients off around its forward, but the transforms below this level differentiate too.
    with torch.enable_grad(), set_forward_mode_enabled(True), AutoDispatchBelowAutograd():
        yield


def _records(args: tuple) -> bool:
    if torch.is_grad_enabled():
        for arg in args:  # a loop: any() of a generator takes twice as long, 0.6 us a call
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


def _is_traced(arg: Any) -> bool:
    return isinstance(arg, Tensor) and type(arg) not in (Tensor, torch.nn.Parameter)


def _entrance(operator: Operator) -> Callable[..., Tensor]:
    """The operator, called below autograd where nothing can ask for a derivative.

    Its Autograd kernel would find the same out, in Python, at the price of a second dispatch: 8 us a call.
    """
    op, count, composite = operator.forward, operator.count, _forward_composite(operator)

    def call(*args: Any) -> Tensor:
        if in_forward_mode():
            return composite(*args)
        if torch.compiler.is_compiling() or are_functorch_transforms_active() or _records(args[:count]):
            return op(*args)
        with AutoDispatchBelowAutograd():
            return op(*args)

    return call


def autograd_kernel(op: Any, function: type[torch.autograd.Function], composite: Any) -> Any:
    """Makes the op's kernel at PyTorch's Autograd key: it applies the function once, at the level being processed."""

    # A Function's apply would hand the call to the whole stack of transforms again, in 2.14 its base class's with it.
    steps = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward")}
    single_level = type(function.__name__, (SingleLevelFunction,), steps)

    def kernel(*args: Any) -> Any:
        if _is_dual(args):
            return composite(*args)
        if not _records(args):
            with AutoDispatchBelowAutograd():
                return op(*args)
        if not are_functorch_transforms_active():
            return super(torch.autograd.Function, function).apply(*args)
        with single_level_autograd_function():
            return single_level.apply(*args)

    return kernel


def _saving_kernel(operator: Operator, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`kernel`, and what the op does instead where the depthwise result is saved for the backward.

    Then it is the depthwise operator and PyTorch's 1x1, as the families that save are, and autograd saves what lies
    between. (Under `torch.func` nothing is saved: a Function at one level may save its inputs and outputs alone.)
    """
    count, arity = operator.count, operator.arity

    def saving_kernel(*args: Any) -> Tensor:
        args, save = args[:arity], args[arity] if len(args) > arity else None
        if _records(args[:count]) and not (are_functorch_transforms_active() or _is_dual(args)):
            tensors, arguments, backend = args[:count], operator.arguments(*hashable(args[count:-1])), args[-1]
            mask = tuple(tensor is not None and tensor.requires_grad for tensor in tensors)
            if saving.saves(operator, tensors, arguments, backend, save, mask):
                return _two_steps(tensors, arguments, backend)
        return kernel(*args)

    return saving_kernel


def _two_steps(tensors: tuple[Tensor | None, ...], arguments: Any, backend: str) -> Tensor:
    """A separable convolution as two operators that autograd differentiates."""
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual = tensors
    *how, pre_activation, mid_activation, activation = arguments
    if residual is not None and residual.dtype != x.dtype:  # which PyTorch's addition would promote
        raise TypeError(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}")
    mid = ACTIVATIONS[mid_activation]
    inside, after = (mid_activation, ACTIVATIONS[None]) if mid.from_output is not None else (None, mid)
    with below_subclasses(), without_autocast(x):
        depthwise = operators.DEPTHWISE_CONV2D.forward
        v = after.forward(depthwise(x, depthwise_weight, depthwise_bias, *how, pre_activation, inside, backend))
        z = torch.conv2d(v, pointwise_weight, bias)
        y = ACTIVATIONS[activation].forward(z if residual is None else z + residual)
        return y.contiguous(memory_format=memory_format_of(x))


def _is_dual(args: tuple) -> bool:
    # A graph that is being traced makes dual tensors without entering the level in Python: the tensors alone tell.
    # (Not asked of ordinary tensors, in whose eager calls the level tells: asking costs 20 % of a call.)
    return in_forward_mode() or any(_is_traced(arg) and has_tangent(arg) for arg in args)


def _forward_composite(operator: Operator) -> Callable[..., Tensor]:
    forward, _ = operator.reference

    def composite(*args: Any) -> Tensor:
        call = args[: operator.arity - 1]
        # Not `as_output`: its copy_ into a new tensor could not be batched.
        return forward(*call).contiguous(memory_format=memory_format_of(args[0]))

    return composite


def backward_composite(operator: Operator) -> Callable[..., operators.Gradients]:
    """The operator's backward in PyTorch's own operators."""
    _, backward = operator.reference

    def composite(*args: Any) -> operators.Gradients:
        *call, _backend, output_mask = args
        gradients = backward(*call, output_mask)
        return tuple(args[0].new_zeros(0) if grad is None else grad for grad in gradients)

    return composite


def _register(forward: type[_Forward], backward: type[_Backward]) -> None:
    operator = forward.operator
    for op, function, composite in (
        (operator.forward, forward, _forward_composite(operator)),
        (operator.backward, backward, backward_composite(operator)),
    ):
        kernel = autograd_kernel(op, function, composite)
        if op is operator.forward and operator.saves_intermediate:
            kernel = _saving_kernel(operator, kernel)
        operators.LIBRARY.impl(op._schema.name, kernel, "Autograd")


_register(SeparableConv2dFunction, SeparableConv2dBackwardFunction)
_register(DepthwiseConv2dFunction, DepthwiseConv2dBackwardFunction)

separable_conv2d = _entrance(operators.SEPARABLE_CONV2D)
depthwise_conv2d = _entrance(operators.DEPTHWISE_CONV2D)
