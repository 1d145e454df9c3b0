"""The custom operators: their schemas, what runs them, and what tracers need to know of them.

`torch.ops.fused_sepconv.separable_conv2d`, `...depthwise_conv2d` and their `..._backward` take an already checked call
(`arguments.py`). Each has one implementation for every device, which asks the plan what to run: a kernel of the native
module or PyTorch's own convolutions. Their autograd rules are in `autograd.py`.

What sets one apart from the other is in its `Operator`, below; the rest is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_sepconv.families import registry
from fused_sepconv.families.pytorch import composed, convolutions
from fused_sepconv.families.registry import Family
from fused_sepconv.ops import calls, problems
from fused_sepconv.ops.arguments import (
    Arguments,
    DepthwiseArguments,
    autocasts,
    check_depthwise_tensors,
    check_tensors,
    hashable,
    normalise,
    normalise_depthwise,
    output_size,
)
from fused_sepconv.ops.backend import asks_the_plan
from fused_sepconv.ops.torch_internals import below_subclasses
from fused_sepconv.tensors.memory_format import as_gradient, as_output, empty_output

LIBRARY = torch.library.Library("fused_sepconv", "DEF")

Gradients = tuple[Tensor, ...]
"""One an input, in their order."""


@dataclass(frozen=True)
class Operator:
    """An operator and its backward.

    The operator takes its inputs (x, then its weights; some of them optional), its arguments and the backend. Its
    backward takes grad_output, the inputs, the output or None, the arguments, the backend and output_mask.
    """

    name: str
    inputs: tuple[str, ...]
    """Declarations, as in the schema."""
    arguments: type[Arguments] | type[DepthwiseArguments]
    features: int
    """The position among the inputs of the weight whose dimension 0 is the output's channels."""
    problem_of: Callable[..., Any]
    """The problem of a direction, for checked tensors and arguments."""
    families: Mapping[str, Family]
    """The families that may run it, by the names that plans use."""
    normalise: Callable[[tuple, tuple], Arguments | DepthwiseArguments]
    """The checked arguments of a user's tensors and options."""
    check: Callable[[tuple, tuple], object]
    """Refuses what a kernel must not see: the operator may be called directly, with anything."""
    tuned_gradients: tuple[bool, ...]
    """The gradients for which a backward is measured: those of x and the weights, whichever a call asks for."""
    composed: Callable[[tuple, tuple], Callable[..., Tensor]]
    """PyTorch's own convolutions for checked arguments and tensors like those given."""
    reference: tuple[Callable[..., Tensor], Callable[..., tuple[Tensor | None, ...]]]
    """Forward and backward in PyTorch's own convolutions."""
    residual: int | None = None
    """The position of the input that is added before the last activation."""
    saves_intermediate: bool = False
    """Whether it has a depthwise result that may be saved for the backward, and an argument that says so."""

    @cached_property
    def forward(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.fused_sepconv, self.name).default

    @cached_property
    def backward(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.fused_sepconv, f"{self.name}_backward").default

    @cached_property
    def count(self) -> int:
        """The number of inputs."""
        return len(self.inputs)

    @cached_property
    def arity(self) -> int:
        """Of inputs, arguments and the backend: what the operator takes but for `save_intermediate`, which only its
        derivative reads."""
        return self.count + len(self.arguments._fields) + 1

    @cached_property
    def images(self) -> tuple[int, ...]:
        """The positions of the inputs that are batches of images."""
        return (0,) if self.residual is None else (0, self.residual)

    @property
    def schemas(self) -> tuple[str, str]:
        """The operator's and its backward's."""
        inputs = ", ".join(self.inputs)
        types = {"stride": "SymInt[2]", "padding": "SymInt[4]", "dilation": "SymInt[2]"}
        arguments = ", ".join(f"{types.get(name, 'str?')} {name}" for name in self.arguments._fields)
        # Left out by programs that were exported before it was there.
        save = ", bool? save_intermediate=None" if self.saves_intermediate else ""
        # A gradient that output_mask does not ask for is an empty tensor of shape (0,). (Not a list, and never
        # undefined: legacy vmap, behind is_grads_batched, falls back for nothing but plain tensors.)
        gradients = ", ".join(["Tensor"] * self.count)
        return (
            f"{self.name}({inputs}, {arguments}, str backend{save}) -> Tensor",
            f"{self.name}_backward(Tensor grad_output, {inputs}, Tensor? output, {arguments}, str backend, "
            f"bool[{self.count}] output_mask) -> ({gradients})",
        )


TAGS = (
    torch.Tag.pt2_compliant_tag,
    # The output's memory format is x's, so a compiler must not change x's on the way.
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


def _define(operator: Operator) -> None:
    for schema in operator.schemas:
        LIBRARY.define(schema, tags=TAGS)
    _implement(operator)
    _register_fakes(operator)
    _register_vmap(operator)


# What runs ----------------------------------------------------------------------------------------------------------


def _implement(operator: Operator) -> None:
    count, residual = operator.count, operator.residual
    reference_forward, reference_backward = operator.reference

    def forward(*args: Any) -> Tensor:
        tensors, arguments, backend = args[:count], args[count : operator.arity - 1], args[operator.arity - 1]
        x = tensors[0]
        if asks_the_plan(x, backend):
            with below_subclasses(), without_autocast(x):  # the split family runs PyTorch's own 1x1
                call = calls.find(operator, tensors, operator.arguments(*hashable(arguments)), backend)
                return call.forward(*tensors)
        # The one thing that PyTorch's operators would promote.
        if residual is not None and tensors[residual] is not None and tensors[residual].dtype != x.dtype:
            raise TypeError(f"residual: expected x's dtype {x.dtype}, got {tensors[residual].dtype}")
        with below_subclasses(), without_autocast(x):
            return as_output(x, reference_forward(*tensors, *arguments))

    def backward(grad_output: Tensor, *args: Any) -> Gradients:
        tensors, output, arguments = args[:count], args[count], args[count + 1 : -2]
        backend, output_mask = args[-2:]
        x = tensors[0]
        with below_subclasses(), without_autocast(x):
            if asks_the_plan(x, backend):
                call = calls.find(operator, tensors, operator.arguments(*hashable(arguments)), backend)
                gradients = call.backward(grad_output, tensors, output, tuple(output_mask))
            else:
                gradients = reference_backward(grad_output, *tensors, output, *arguments, output_mask)
            # (Not x.new_empty: a subclass of Tensor may have its own.)
            return tuple(
                torch.empty(0, dtype=x.dtype, device=x.device)
                if grad is None
                else as_gradient(tensor, grad.clone() if grad is grad_output else grad)
                for tensor, grad in zip(tensors, gradients, strict=True)
            )

    LIBRARY.impl(operator.name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{operator.name}_backward", backward, "CompositeExplicitAutograd")


def without_autocast(x: Tensor) -> Any:
    """The op computes in the dtype it is given; autocast's casts came before it."""
    if autocasts(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


# What tracers see ---------------------------------------------------------------------------------------------------


def _register_fakes(operator: Operator) -> None:
    count = operator.count

    def forward(*args: Any) -> Tensor:
        x, weight, (stride, padding, dilation) = args[0], args[1], args[count : count + 3]
        out_h, out_w = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        return empty_output(x, (x.shape[0], args[operator.features].shape[0], out_h, out_w))

    def backward(grad_output: Tensor, *args: Any) -> Gradients:
        x, inputs, output_mask = args[0], args[:count], args[-1]
        return tuple(
            torch.empty_like(tensor) if wanted else torch.empty(0, dtype=x.dtype, device=x.device)
            for tensor, wanted in zip(inputs, output_mask, strict=True)
        )

    torch.library.register_fake(f"fused_sepconv::{operator.name}", forward, lib=LIBRARY)
    torch.library.register_fake(f"fused_sepconv::{operator.name}_backward", backward, lib=LIBRARY)


# vmap ---------------------------------------------------------------------------------------------------------------
#
# A batch of images is more images: it is folded into N. A batch of weights is a convolution each, run one by one.


def _register_vmap(operator: Operator) -> None:
    images = operator.images

    def forward(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        inputs, batch_size = list(args[: operator.count]), info.batch_size
        if any(in_dims[i] is not None for i in range(operator.count) if i not in images):
            return one_by_one(operator.forward, batch_size, in_dims, args)
        for i in images:
            inputs[i] = _fold(args[i], in_dims[i], batch_size)
        y = operator.forward(*inputs, *args[operator.count :])
        n = y.shape[0] // batch_size if batch_size else args[0].movedim(in_dims[0] or 0, 0).shape[1]
        return y.reshape(batch_size, n, *y.shape[1:]), 0

    def backward(info: Any, in_dims: tuple, *args: Any) -> tuple[Gradients, tuple[int, ...]]:
        # The gradients of weights are sums over the images of one example of the batch, so folding would mix examples.
        gradients, _ = one_by_one(operator.backward, info.batch_size, in_dims, args)
        return gradients, (0,) * len(gradients)

    torch.library.register_vmap(f"fused_sepconv::{operator.name}", forward, lib=LIBRARY)
    torch.library.register_vmap(f"fused_sepconv::{operator.name}_backward", backward, lib=LIBRARY)


def _fold(tensor: Tensor | None, dim: int | None, batch_size: int) -> Tensor | None:
    """(..., B, ...) -> (B * N, ...): the vmapped dimension in front of, and folded into, the images."""
    if tensor is None:
        return None
    tensor = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(batch_size * tensor.shape[1], *tensor.shape[2:])


def one_by_one(op: Callable, batch_size: int, in_dims: tuple, args: tuple) -> tuple[Any, int]:
    if batch_size == 0:
        raise ValueError("vmap: an empty batch of weights or gradients has no result whose shape could be known")

    def example(i: int) -> list[Any]:
        batched = (isinstance(arg, Tensor) and dim is not None for arg, dim in zip(args, in_dims, strict=True))
        return [arg.select(dim, i) if b else arg for arg, dim, b in zip(args, in_dims, batched, strict=True)]

    results = [op(*example(i)) for i in range(batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), 0


# The two operators --------------------------------------------------------------------------------------------------

SEPARABLE_CONV2D = Operator(
    name="separable_conv2d",
    inputs=(
        "Tensor x",
        "Tensor depthwise_weight",
        "Tensor pointwise_weight",
        "Tensor? bias",
        "Tensor? depthwise_bias",
        "Tensor? residual",
    ),
    arguments=Arguments,
    features=2,
    problem_of=problems.problem_of,
    families=registry.SEPARABLE_CONV2D,
    normalise=lambda tensors, options: (
        normalise(
            *tensors[:4],
            *options[:3],
            depthwise_bias=tensors[4],
            residual=tensors[5],
            pre_activation=options[3],
            mid_activation=options[4],
            activation=options[5],
            save_intermediate=options[6],
        ).arguments
    ),
    check=check_tensors,
    tuned_gradients=(True, True, True, False, False, False),
    composed=composed.separable,
    reference=(convolutions.forward, convolutions.backward),
    residual=5,
    saves_intermediate=True,
)
DEPTHWISE_CONV2D = Operator(
    name="depthwise_conv2d",
    inputs=("Tensor x", "Tensor weight", "Tensor? bias"),
    arguments=DepthwiseArguments,
    features=1,
    problem_of=problems.depthwise_problem_of,
    families=registry.DEPTHWISE_CONV2D,
    normalise=lambda tensors, options: (
        normalise_depthwise(*tensors, *options[:3], pre_activation=options[3], activation=options[4]).arguments
    ),
    check=check_depthwise_tensors,
    tuned_gradients=(True, True, False),
    composed=composed.depthwise,
    reference=(convolutions.depthwise_forward, convolutions.depthwise_backward),
)
OPERATORS = (SEPARABLE_CONV2D, DEPTHWISE_CONV2D)

for _operator in OPERATORS:
    _define(_operator)


# torch.utils.flop_counter -------------------------------------------------------------------------------------------
#
# Two flops a multiply-add. A backward counts a convolution's work for each gradient asked for; the recomputed forward
# is overhead, and not counted.


def _depthwise_flops(weight: Sequence[int], output: Sequence[int]) -> int:
    """Flops of a depthwise convolution, whose output may be given by the shape of what follows it."""
    channels, _, kernel_h, kernel_w = weight
    n, _, out_h, out_w = output
    return 2 * n * out_h * out_w * channels * kernel_h * kernel_w


def _pointwise_flops(weight: Sequence[int], output: Sequence[int]) -> int:
    n, features, out_h, out_w = output
    return 2 * n * out_h * out_w * features * weight[1]


@register_flop_formula(torch.ops.fused_sepconv.separable_conv2d)
def _separable_forward_flops(x: Any, depthwise: Any, pointwise: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _depthwise_flops(depthwise, out_shape) + _pointwise_flops(pointwise, out_shape)


@register_flop_formula(torch.ops.fused_sepconv.separable_conv2d_backward)
def _separable_backward_flops(grad_output: Any, x: Any, depthwise: Any, pointwise: Any, *rest: Any, **_: Any) -> int:
    want_x, want_depthwise, want_pointwise, _, want_depthwise_bias, _ = rest[-1]
    want_t = want_x or want_depthwise or want_depthwise_bias
    return _pointwise_flops(pointwise, grad_output) * (want_t + want_pointwise) + _depthwise_flops(
        depthwise, grad_output
    ) * (want_x + want_depthwise)


@register_flop_formula(torch.ops.fused_sepconv.depthwise_conv2d)
def _depthwise_forward_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _depthwise_flops(weight, out_shape)


@register_flop_formula(torch.ops.fused_sepconv.depthwise_conv2d_backward)
def _depthwise_backward_flops(grad_output: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    want_x, want_weight, _ = rest[-1]
    return _depthwise_flops(weight, grad_output) * (want_x + want_weight)
