"""Prepares PyTorch's own convolutions as a family like the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fused_sepconv.families.pytorch import composed, convolutions
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Problem

Gradients = tuple[Tensor | None, ...]


def separable_forward(candidate: Candidate, problem: Problem, tensors: tuple) -> Callable[..., Any]:
    """y of both convolutions, and the depthwise result where the problem is to save it."""
    return composed.separable(problem, tensors, problem.saved)


def separable_backward(
    candidate: Candidate, problem: Problem, grad_output: Tensor, tensors: tuple, output: Any, mask: tuple
) -> Callable[..., Gradients]:
    """The six gradients of both convolutions."""
    places = (problem.pre_activation, problem.mid_activation, problem.activation)
    arguments = (problem.stride, problem.padding, problem.dilation, *places, mask)
    return lambda grad_output, tensors, output, kept=None: convolutions.backward(
        grad_output, *tensors, output, *arguments, kept
    )


def depthwise_forward(candidate: Candidate, problem: DepthwiseProblem, tensors: tuple) -> Callable[..., Tensor]:
    """y of the depthwise convolution."""
    return composed.depthwise(problem, tensors, problem.mid_activation)


def depthwise_backward(
    candidate: Candidate, problem: DepthwiseProblem, grad_output: Tensor, tensors: tuple, output: Any, mask: tuple
) -> Callable[..., Gradients]:
    """The three gradients of the depthwise convolution."""
    places = problem.pre_activation, problem.mid_activation
    arguments = (problem.stride, problem.padding, problem.dilation, *places, mask)
    return lambda grad_output, tensors, output: convolutions.depthwise_backward(
        grad_output, *tensors, output, *arguments
    )
