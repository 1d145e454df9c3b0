"""BatchNorm, an activation and a depthwise convolution in one operator, for training.

`torch.ops.fused_sepconv.norm_depthwise_conv2d` takes the raw tensor and its statistics:

    u = (x - mean) * invstd * norm_weight + norm_bias
    t = depthwise(activation(u)) + bias

so that u is never written. Its backward gives what BatchNorm's derivative needs beside the taps' gradients: dz, the
gradient of u, and the sums over all pixels of dz and of dz * (x - mean). Where no kernel runs a problem, both are
PyTorch's operators.

`mean` and `invstd` get no gradient of their own. With `batch_statistics` they are x's, and x's gradient takes them into
account; else they are constants (evaluation, frozen BatchNorm). Second derivatives are PyTorch's operators.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sepconv.families.depthwise import normalised
from fused_sepconv.families.pytorch import convolutions
from fused_sepconv.ops import calls, launching, problems, saving
from fused_sepconv.ops.arguments import DepthwiseArguments, hashable, output_size
from fused_sepconv.ops.autograd import autograd_kernel, below_autograd, vjp
from fused_sepconv.ops.backend import asks_the_plan
from fused_sepconv.ops.operators import LIBRARY, TAGS, one_by_one, without_autocast
from fused_sepconv.ops.torch_internals import are_functorch_transforms_active, below_subclasses
from fused_sepconv.planning.problem import DepthwiseProblem
from fused_sepconv.tensors.memory_format import as_gradient, as_output, empty_output

_INPUTS = (
    "Tensor x, Tensor mean, Tensor invstd, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, "
    "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, str? activation, bool batch_statistics, str backend"
)
_TENSORS, _ARGUMENTS = 7, 13
"""How many arguments are tensors, and how many there are."""

for _schema in (
    f"norm_depthwise_conv2d({_INPUTS}) -> Tensor",
    f"norm_depthwise_conv2d_backward(Tensor grad_output, {_INPUTS}, bool[2] output_mask) "
    "-> (Tensor grad_weight, Tensor grad_bias, Tensor dz, Tensor sum_dz, Tensor sum_dz_xmu)",
):
    LIBRARY.define(_schema, tags=TAGS)

norm_depthwise_conv2d = torch.ops.fused_sepconv.norm_depthwise_conv2d.default
norm_depthwise_conv2d_backward = torch.ops.fused_sepconv.norm_depthwise_conv2d_backward.default


# What runs ------------------------------------------------------------------------------------------------------------


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of x's statistics."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def problem_of(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple) -> DepthwiseProblem:
    """The problem of a unit; `arguments` are stride, padding, dilation and activation."""
    checked = DepthwiseArguments(*hashable(arguments), None)
    return problems.depthwise_problem_of("forward", (x, weight, bias), checked)


def runs(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple, backend: str) -> bool:
    """Whether a kernel of ours runs such a unit, in both directions."""
    if not asks_the_plan(x, backend):
        return False
    described = saving.as_meta((x, weight, bias))
    sizes = [saving.expected(sizes) for sizes in arguments[:3]]
    if described is None or None in sizes:
        return False
    problem = problem_of(*described, (*sizes, arguments[3]))
    return not normalised.supports(problem, *launching.device_and_kernels(x.device))


def _prepared(direction: str, args: tuple, mask: tuple[bool, bool] = (False, False)) -> Any:
    """The kernel that runs a call in a direction, ready; None where none does."""
    x, _, _, _, _, weight, bias = args[:_TENSORS]
    *arguments, _, backend = args[_TENSORS:]
    arguments = hashable(arguments)
    key = ("norm_depthwise_conv2d", direction, *calls.signature(x), weight.shape, bias is None, arguments, mask)
    key = (*key, backend, *calls.flags(x, backend))
    found = calls.look_up(key)
    if found is not None:
        return found[0]
    run = None
    if runs(x, weight, bias, arguments, backend):
        problem = problem_of(x, weight, bias, arguments)
        where = launching.device_and_kernels(x.device)
        if direction == "forward":
            run = normalised.Forward(normalised.candidate(problem, *where), problem, x)
        else:
            problem = replace(problem, direction="backward")
            run = normalised.Backward(normalised.candidate(problem, *where), problem, x, weight, bias, mask)
    return calls.remember(key, (run,))[0]


def _forward(*args: Any) -> Tensor:
    x, mean, invstd, norm_weight, norm_bias, weight, bias, stride, padding, dilation, activation, _, _ = args
    with below_subclasses(), without_autocast(x), launching.on_device(x.device):
        run = _prepared("forward", args)
        if run is not None:
            return run(x, *scale_and_shift(mean, invstd, norm_weight, norm_bias), weight, bias)
        u = normalise(x, mean, invstd, norm_weight, norm_bias)
        t = convolutions.depthwise_forward(u, weight, bias, stride, padding, dilation, activation, None)
        return as_output(x, t)


def _backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *args, mask = args
    x, mean, invstd, norm_weight, norm_bias, weight, bias, stride, padding, dilation, activation, _, _ = args
    with below_subclasses(), without_autocast(x), launching.on_device(x.device):
        run = _prepared("backward", tuple(args), tuple(mask))
        if run is not None:
            scale, shift = scale_and_shift(mean, invstd, norm_weight, norm_bias)
            grad_weight, grad_bias, *rest = run(grad_output, x, scale, shift, mean, weight)
        else:
            u = normalise(x, mean, invstd, norm_weight, norm_bias)
            dz, grad_weight, grad_bias = convolutions.depthwise_backward(
                grad_output, u, weight, bias, None, stride, padding, dilation, activation, None, (True, *mask)
            )
            wide, dims = dz.to(accumulator(x)), (0, 2, 3)
            rest = [as_gradient(x, dz), wide.sum(dims), (wide * (x - by_channel(mean))).sum(dims)]
        empty = torch.empty(0, dtype=x.dtype, device=x.device)
        weights = (
            empty if grad is None else as_gradient(like, grad)
            for like, grad in ((weight, grad_weight), (bias, grad_bias))
        )
        return *weights, *rest


def scale_and_shift(
    mean: Tensor, invstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = invstd if norm_weight is None else invstd * norm_weight
    shift = -mean * scale if norm_bias is None else torch.addcmul(norm_bias.to(mean.dtype), mean, scale, value=-1)
    return scale.contiguous(), shift


def by_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def normalise(x: Tensor, mean: Tensor, invstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    """u, in x's dtype."""
    u = (x - by_channel(mean)) * by_channel(invstd if norm_weight is None else invstd * norm_weight)
    return (u if norm_bias is None else u + by_channel(norm_bias)).to(x.dtype)


def _fake_forward(*args: Any) -> Tensor:
    x, weight, (stride, padding, dilation) = args[0], args[5], args[7:10]
    out_h, out_w = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_output(x, (x.shape[0], weight.shape[0], out_h, out_w))


def _fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, weight, bias, mask = args[0], args[5], args[6], args[-1]
    empty = torch.empty(0, dtype=x.dtype, device=x.device)
    weights = (torch.empty_like(like) if wanted else empty for like, wanted in zip((weight, bias), mask, strict=True))
    sums = (torch.empty(x.shape[1], dtype=accumulator(x), device=x.device) for _ in range(2))
    return *weights, torch.empty_like(x), *sums


# Derivatives ----------------------------------------------------------------------------------------------------------


class NormDepthwiseConv2dFunction(torch.autograd.Function):
    """`apply` takes the operator's arguments, and for statistics of several processes (their group, the number of
    values of a channel in all of them) besides."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        with below_autograd():
            return norm_depthwise_conv2d(*args[:_ARGUMENTS])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.arguments, ctx.shared, ctx.others = inputs[_TENSORS:_ARGUMENTS], None, len(inputs) - _TENSORS
        if len(inputs) > _ARGUMENTS:
            ctx.shared = inputs[_ARGUMENTS]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad
        others = (None,) * ctx.others
        if torch.is_grad_enabled() or are_functorch_transforms_active():
            if ctx.shared is not None:
                raise RuntimeError("BatchNorm over several processes has no second derivative")
            return *_composed_gradients(tensors, ctx.arguments, needs, grad_output), *others
        x, mean, invstd, norm_weight, norm_bias, weight, bias = tensors
        grad_weight, grad_bias, dz, sum_dz, sum_dz_xmu = norm_depthwise_conv2d_backward(
            grad_output, *tensors, *ctx.arguments, (needs[5], needs[6])
        )
        grad_x = None
        if needs[0]:
            batch_statistics = ctx.arguments[4]
            scale = invstd if norm_weight is None else invstd * norm_weight
            if batch_statistics:
                grad_x = through_statistics(dz, x, mean, invstd, norm_weight, sum_dz, sum_dz_xmu, ctx.shared)
            else:
                grad_x = (dz * by_channel(scale)).to(x.dtype)
        return (
            grad_x,
            None,
            None,
            (sum_dz_xmu * invstd).to(norm_weight.dtype) if needs[3] else None,
            sum_dz.to(norm_bias.dtype) if needs[4] else None,
            grad_weight if needs[5] else None,
            grad_bias if needs[6] else None,
            *others,
        )


def through_statistics(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    norm_weight: Tensor | None,
    sum_dz: Tensor,
    sum_dz_xmu: Tensor,
    shared: tuple[Any, Tensor] | None,
) -> Tensor:
    """x's gradient where the statistics are x's own: BatchNorm's backward."""
    count: Any = x.shape[0] * x.shape[2] * x.shape[3]
    if shared is not None:
        group, count = shared
        sums = torch.cat([sum_dz, sum_dz_xmu])
        dist.all_reduce(sums, group=group)
        sum_dz, sum_dz_xmu = sums.chunk(2)
    elif is_on_gpu(x):  # one pass of PyTorch's own
        counts = torch.full((1,), count, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(dz, x, mean, invstd, norm_weight, sum_dz, sum_dz_xmu, counts)
    scale = invstd if norm_weight is None else invstd * norm_weight
    of_dz, of_xmu = sum_dz / count, sum_dz_xmu * invstd.square() / count
    grad = dz - by_channel(of_dz) - (x - by_channel(mean)) * by_channel(of_xmu)
    return (grad * by_channel(scale)).to(x.dtype)


def _composed(*args: Any) -> Tensor:
    """The operator in PyTorch's own, differentiable in x through its statistics too."""
    x, mean, invstd, norm_weight, norm_bias, weight, bias, stride, padding, dilation, activation, own, _ = args
    if own:
        mean, invstd = with_own_statistics(x, invstd)
    u = normalise(x, mean, invstd, norm_weight, norm_bias)
    return convolutions.depthwise_forward(u, weight, bias, stride, padding, dilation, activation, None)


def with_own_statistics(x: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd as differentiable functions of x, of which `invstd` is the value."""
    variance, mean = torch.var_mean(x.to(accumulator(x)), (0, 2, 3), correction=0)
    epsilon = invstd.detach().pow(-2) - variance.detach()
    return mean, torch.rsqrt(variance + epsilon)


def _composed_gradients(tensors: tuple, arguments: tuple, needs: tuple, grad_output: Tensor) -> list[Tensor | None]:
    asked = [i for i in range(_TENSORS) if needs[i]]

    def function(*values: Tensor) -> Tensor:
        filled = list(tensors)
        for i, value in zip(asked, values, strict=True):
            filled[i] = value
        return _composed(*filled, *arguments)

    found: list[Tensor | None] = [None] * _TENSORS
    for i, grad in zip(asked, vjp(function, tuple(tensors[i] for i in asked), grad_output), strict=True):
        found[i] = grad
    return found


def _register() -> None:
    name = "norm_depthwise_conv2d"
    LIBRARY.impl(name, _forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_sepconv::{name}", _fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"fused_sepconv::{name}_backward", _fake_backward, lib=LIBRARY)
    for op in (norm_depthwise_conv2d, norm_depthwise_conv2d_backward):

        def one_example_each(info: Any, in_dims: tuple, *args: Any, op: Any = op) -> tuple[Any, Any]:
            found, _ = one_by_one(op, info.batch_size, in_dims, args)
            return found, 0 if isinstance(found, Tensor) else (0,) * len(found)

        torch.library.register_vmap(f"fused_sepconv::{op._schema.name.split('::')[1]}", one_example_each, lib=LIBRARY)
    kernel = autograd_kernel(norm_depthwise_conv2d, NormDepthwiseConv2dFunction, _composed)
    LIBRARY.impl(name, kernel, "Autograd")


_register()


# Statistics -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean, 1 / sqrt(variance + eps) and count of each channel of x, over all processes of a group; the running
    statistics are updated."""
    count: Any = x.shape[0] * x.shape[2] * x.shape[3]
    if group is None and is_on_gpu(x):
        mean, invstd = torch.batch_norm_stats(x, eps)
        if running_mean is not None:
            counts = torch.full((1,), count, dtype=running_mean.dtype, device=x.device)
            mean, invstd = torch.batch_norm_gather_stats_with_counts(
                x, mean[None], invstd[None], running_mean, running_var, momentum, eps, counts
            )
        return mean, invstd, count
    wide = x.to(accumulator(x))
    if group is None:
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    else:
        variance, mean, count = _merged(wide, count, group)
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
        unbiased = variance * (count / (count - 1))
        running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    return mean, torch.rsqrt(variance + eps), count


def is_on_gpu(x: Tensor) -> bool:
    """Whether PyTorch has kernels for the parts of x's BatchNorm, or (meta) what they move is counted."""
    return (x.is_cuda or x.is_meta) and type(x) in (Tensor, torch.nn.Parameter)


def _merged(x: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Variance, mean and count of all processes: each sends its mean, sum of squared differences and count."""
    channels = x.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=x.dtype, device=x.device)
    if count:
        variance, own[:channels] = torch.var_mean(x, (0, 2, 3), correction=0)
        own[channels:-1], own[-1] = variance * count, count
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    means, squares, counts = torch.stack(parts).split([channels, channels, 1], 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = (squares + (means - mean).square() * counts).sum(0) / total
    return variance, mean, total
