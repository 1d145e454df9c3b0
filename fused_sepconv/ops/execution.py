"""Runs a checked call on the kernels that its plan chooses.

The families' own files, `<family>_execution.py`, launch them; with `launching.py` and `_native.py` they are all that
talks to the native module.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_sepconv.families.depthwise import launch as depthwise_launch
from fused_sepconv.families.mma import launch as mma_launch
from fused_sepconv.families.pytorch import convolutions
from fused_sepconv.families.simt import launch as simt_launch
from fused_sepconv.families.split import launch as split_launch
from fused_sepconv.native.marshalling import Tensors
from fused_sepconv.ops.arguments import (
    Arguments,
    DepthwiseArguments,
    TensorSpec,
    check_cached,
    check_depthwise_cached,
    output_size,
)
from fused_sepconv.ops.launching import choose, launching
from fused_sepconv.planning.plan import INSTANCES
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Kernels, Problem
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import aligned, as_output, memory_format_of, tf32

DepthwiseTensors = tuple[Tensor, Tensor, Tensor | None]
"""x, weight, bias."""

ALL_KERNELS = Kernels(frozenset(INSTANCES))
"""What a complete build has; predictions for a device that is not here assume it."""


def forward(tensors: Tensors, arguments: Arguments, backend: str) -> Tensor | None:
    """The output, or None where the plan chooses PyTorch's own convolutions."""
    _check(tensors, arguments)
    problem = problem_of("forward", tensors, arguments)
    candidate = choose(problem, tensors[0].device, backend, _try_forward, arguments, tensors)
    if candidate.family == "reference":
        return None
    return _forward(candidate, problem, tensors)


def _forward(candidate: Candidate, problem: Problem, tensors: Tensors) -> Tensor:
    with launching(problem, tensors[0].device, candidate):
        if candidate.family == "split":
            return split_launch.forward(candidate, problem, tensors)
        if candidate.family == "mma":
            return mma_launch.forward(candidate, problem, tensors)
        return simt_launch.forward(candidate, problem, tensors)


def backward(
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    arguments: Arguments,
    backend: str,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """The six gradients, None where not asked for; None instead where the plan chooses PyTorch's own convolutions."""
    _check(tensors, arguments)
    problem = problem_of("backward", tensors, arguments)
    _check_like("grad_output", grad_output, tensors[0], (problem.N, problem.F, problem.out_h, problem.out_w))
    if output is not None:
        _check_like("output", output, tensors[0], (problem.N, problem.F, problem.out_h, problem.out_w))
    device = tensors[0].device
    candidate = choose(problem, device, backend, _try_backward, arguments, (grad_output, *tensors, output))
    if candidate.family == "reference":
        return None
    return _backward(candidate, problem, grad_output, tensors, output, output_mask)


def _backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    with launching(problem, tensors[0].device, candidate):
        if candidate.family == "split":
            return split_launch.backward(candidate, problem, grad_output, tensors, output, output_mask)
        if candidate.family == "mma":
            return mma_launch.backward(candidate, problem, grad_output, tensors, output, output_mask)
        return simt_launch.backward(candidate, problem, grad_output, tensors, output, output_mask)


def depthwise_forward(tensors: DepthwiseTensors, arguments: DepthwiseArguments, backend: str) -> Tensor | None:
    """`forward`, of a depthwise convolution alone."""
    _check_depthwise(tensors, arguments)
    x, weight, bias = tensors
    problem = depthwise_problem_of("forward", tensors, arguments)
    candidate = choose(problem, x.device, backend, _try_depthwise_forward, arguments, tensors)
    if candidate.family == "reference":
        return None
    with launching(problem, x.device, candidate):
        return depthwise_launch.forward(candidate, problem, x, weight, bias)


def depthwise_backward(
    grad_output: Tensor,
    tensors: DepthwiseTensors,
    output: Tensor | None,
    arguments: DepthwiseArguments,
    backend: str,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """`backward`, of a depthwise convolution alone: the gradients of x, weight and bias."""
    _check_depthwise(tensors, arguments)
    x, weight, bias = tensors
    problem = depthwise_problem_of("backward", tensors, arguments)
    _check_like("grad_output", grad_output, x, (problem.N, problem.K, problem.out_h, problem.out_w))
    if output is not None:
        _check_like("output", output, x, (problem.N, problem.K, problem.out_h, problem.out_w))
    trial = _try_depthwise_backward
    candidate = choose(problem, x.device, backend, trial, arguments, (grad_output, *tensors, output))
    if candidate.family == "reference":
        return None
    return _depthwise_backward(candidate, problem, grad_output, tensors, output, output_mask)


def _depthwise_backward(
    candidate: Candidate,
    problem: DepthwiseProblem,
    grad_output: Tensor,
    tensors: DepthwiseTensors,
    output: Tensor | None,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    x, weight, bias = tensors
    from_output = ACTIVATIONS[problem.mid_activation].from_output
    with launching(problem, x.device, candidate):
        if candidate.steps and output is not None and from_output is not None:
            # Cheaper than the step that would compute the forward again.
            grad_output = from_output(grad_output, output)
            candidate, problem = replace(candidate, steps=()), replace(problem, mid_activation=None)
        return depthwise_launch.backward(candidate, problem, x, weight, bias, grad_output, output_mask)


# What `choice.py` measures: a candidate, PyTorch's own convolutions among them, on tensors of its own. A backward is
# measured for the gradients of x and the weights, whichever of them a call asks for.


def _try_forward(candidate: Candidate, problem: Problem, arguments: Arguments, tensors: Tensors) -> object:
    if candidate.family == "reference":
        return as_output(tensors[0], convolutions.forward(*tensors, *arguments))
    return _forward(candidate, problem, tensors)


def _try_backward(candidate: Candidate, problem: Problem, arguments: Arguments, tensors: tuple) -> object:
    mask = (True, True, True, False, False, False)
    if candidate.family == "reference":
        return convolutions.backward(*tensors, *arguments, mask)
    grad_output, *inputs, output = tensors
    return _backward(candidate, problem, grad_output, tuple(inputs), output, mask)


def _try_depthwise_forward(
    candidate: Candidate, problem: DepthwiseProblem, arguments: DepthwiseArguments, tensors: DepthwiseTensors
) -> object:
    x, weight, bias = tensors
    if candidate.family == "reference":
        return as_output(x, convolutions.depthwise_forward(*tensors, *arguments))
    with launching(problem, x.device, candidate):
        return depthwise_launch.forward(candidate, problem, x, weight, bias)


def _try_depthwise_backward(
    candidate: Candidate, problem: DepthwiseProblem, arguments: DepthwiseArguments, tensors: tuple
) -> object:
    mask = (True, True, False)
    if candidate.family == "reference":
        return convolutions.depthwise_backward(*tensors, *arguments, mask)
    grad_output, *inputs, output = tensors
    return _depthwise_backward(candidate, problem, grad_output, tuple(inputs), output, mask)


def _check(tensors: Tensors, arguments: Arguments) -> None:
    """Refuses what a kernel must not see: the op may be called directly, with anything."""
    names = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")
    specs = (
        None if tensor is None else TensorSpec.of(name, tensor) for name, tensor in zip(names, tensors, strict=True)
    )
    check_cached(*specs, *arguments)


def _check_depthwise(tensors: DepthwiseTensors, arguments: DepthwiseArguments) -> None:
    names = ("x", "weight", "bias")
    specs = (
        None if tensor is None else TensorSpec.of(name, tensor) for name, tensor in zip(names, tensors, strict=True)
    )
    check_depthwise_cached(*specs, *arguments)


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected the output's shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def problem_of(direction: str, tensors: Tensors, arguments: Arguments) -> Problem:
    """The problem that a checked call is."""
    x, depthwise_weight, pointwise_weight, _, _, residual = tensors
    n, channels, height, width = x.shape
    kernel = tuple(depthwise_weight.shape[2:])
    out_h, out_w = output_size((height, width), kernel, arguments.stride, arguments.padding, arguments.dilation)
    return Problem(
        direction=direction,
        N=n,
        C=channels,
        H=height,
        W=width,
        F=pointwise_weight.shape[0],
        multiplier=depthwise_weight.shape[0] // channels,
        kernel=kernel,
        stride=arguments.stride,
        padding=arguments.padding,
        dilation=_dilation(arguments.dilation, kernel),
        out_h=out_h,
        out_w=out_w,
        dtype=str(x.dtype).removeprefix("torch."),
        layout="nhwc" if memory_format_of(x) == torch.channels_last else "nchw",
        pre_activation=arguments.pre_activation,
        mid_activation=arguments.mid_activation,
        activation=arguments.activation,
        residual=residual is not None,
        tf32=tf32(),
        aligned=aligned(x),
    )


def _dilation(dilation: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
    """That of more than one tap: one alone is where it is."""
    return tuple(1 if taps == 1 else apart for apart, taps in zip(dilation, kernel, strict=True))


def depthwise_problem_of(direction: str, tensors: DepthwiseTensors, arguments: DepthwiseArguments) -> DepthwiseProblem:
    """The problem that a checked call of a depthwise convolution is."""
    x, weight, _ = tensors
    n, channels, height, width = x.shape
    kernel = tuple(weight.shape[2:])
    out_h, out_w = output_size((height, width), kernel, arguments.stride, arguments.padding, arguments.dilation)
    return DepthwiseProblem(
        direction=direction,
        N=n,
        C=channels,
        H=height,
        W=width,
        multiplier=weight.shape[0] // channels,
        kernel=kernel,
        stride=arguments.stride,
        padding=arguments.padding,
        dilation=_dilation(arguments.dilation, kernel),
        out_h=out_h,
        out_w=out_w,
        dtype=str(x.dtype).removeprefix("torch."),
        layout="nhwc" if memory_format_of(x) == torch.channels_last else "nchw",
        pre_activation=arguments.pre_activation,
        mid_activation=arguments.activation,
        aligned=aligned(x),
    )
