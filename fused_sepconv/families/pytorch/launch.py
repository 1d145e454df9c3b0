"""Runs PyTorch's own convolutions as a family like the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fused_sepconv.families.pytorch import composed, convolutions
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Problem
from fused_sepconv.tensors.memory_format import as_output

Gradients = tuple[Tensor | None, ...]


def _separable_arguments(problem: Problem) -> tuple[Any, ...]:
    activations = (problem.pre_activation, problem.mid_activation, problem.activation)
    return (problem.stride, problem.padding, problem.dilation, *activations)


def _depthwise_arguments(problem: DepthwiseProblem) -> tuple[Any, ...]:
    return problem.stride, problem.padding, problem.dilation, problem.pre_activation, problem.mid_activation


def separable_forward(candidate: Candidate, problem: Problem, tensors: tuple) -> Callable[..., Any]:
    """y of both convolutions, and the depthwise result where the problem is to save it."""
    return composed.separable(problem, tensors, problem.saved)


class SeparableBackward:
    """The six gradients of both convolutions."""

    def __init__(
        self, candidate: Candidate, problem: Problem, grad_output: Tensor, tensors: tuple, output: Any, mask: tuple
    ) -> None:
        self._arguments, self._mask = _separable_arguments(problem), mask

    def __call__(
        self, grad_output: Tensor, tensors: tuple, output: Tensor | None, kept: Tensor | None = None
    ) -> Gradients:
        return convolutions.backward(grad_output, *tensors, output, *self._arguments, self._mask, kept)


class DepthwiseForward:
    """y of the depthwise convolution."""

    def __init__(self, candidate: Candidate, problem: DepthwiseProblem, tensors: tuple) -> None:
        self._arguments = _depthwise_arguments(problem)

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        return as_output(tensors[0], convolutions.depthwise_forward(*tensors, *self._arguments))


class DepthwiseBackward:
    """The three gradients of the depthwise convolution."""

    def __init__(
        self,
        candidate: Candidate,
        problem: DepthwiseProblem,
        grad_output: Tensor,
        tensors: tuple,
        output: Any,
        mask: tuple,
    ) -> None:
        self._arguments, self._mask = _depthwise_arguments(problem), mask

    def __call__(self, grad_output: Tensor, tensors: tuple, output: Tensor | None) -> Gradients:
        return convolutions.depthwise_backward(grad_output, *tensors, output, *self._arguments, self._mask)
