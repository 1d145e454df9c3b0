"""Launches of the depthwise kernels by themselves: for `depthwise_conv2d`, and as the split family's steps.

Each class prepares its launches once, for a problem and x's strides; a call allocates and launches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.simt.launch import Reductions, SplitSums, Step
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import (
    NO_STRIDES,
    Strides,
    addresses,
    conv_shape,
    cuda_stream,
    stream_of,
    tilings_of,
)
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Splits
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import aligned, memory_format_of, output_strides

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Forward:
    """mid_act(t) with t = depthwise(pre_act(x)) + bias, or, given grad_output, the gradient of t."""

    def __init__(self, candidate: Candidate, problem: DepthwiseProblem, tensors: tuple[Tensor | None, ...]) -> None:
        x = tensors[0]
        self._candidate, self._problem, self._x_strides = candidate, problem, x.stride()
        self._layout, self._index = memory_format_of(x), x.device.index
        self._shape = (problem.N, problem.K, problem.out_h, problem.out_w)
        self._strides = output_strides(x, self._shape)
        self._plain = self._launch(NO_STRIDES)
        self._with_grad: dict[Strides, Any] = {}

    def _launch(self, grad_output: Strides) -> Any:
        return loader.load().DepthwiseForwardLaunch(
            self._candidate.name,
            conv_shape(self._problem),
            *tilings_of(self._candidate.tiling),
            self._x_strides,
            grad_output,
            self._strides,
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor | None = None) -> Tensor:
        y = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
        if not self._shape[0]:
            return y
        launch = self._plain
        if grad_output is not None:
            grad_output = readable(grad_output, self._layout, self._candidate)
            strides = grad_output.stride()
            launch = self._with_grad.get(strides)
            if launch is None:
                launch = self._with_grad[strides] = self._launch(strides)
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        launch(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if grad_output is None else grad_output.data_ptr(),
            y.data_ptr(),
            0 if self._index is None else cuda_stream(self._index),
        )
        return y


class Backward:
    """The gradients of x, weight and bias, None where not asked for, from the gradient of the output."""

    def __init__(
        self,
        candidate: Candidate,
        problem: DepthwiseProblem,
        grad_output: Tensor | None,
        tensors: tuple[Tensor | None, ...],
        output: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        x, weight, bias = tensors
        from_output = ACTIVATIONS[problem.mid_activation].from_output
        self._from_output = self._through_mid = None
        if candidate.steps and output is not None and from_output is not None:
            self._from_output = from_output  # cheaper than the step that would compute the forward again
        elif candidate.steps:
            (step,) = candidate.steps
            self._through_mid = Forward(step, problem, tensors)
        if candidate.steps:
            candidate, problem = replace(candidate, steps=()), replace(problem, mid_activation=None)
        kind = OnePass if candidate.family == "depthwise" and problem.N else Generic
        self._gradients = kind(candidate, problem, x, weight, bias, mask)

    def __call__(self, grad_output: Tensor, tensors: tuple[Tensor | None, ...], output: Tensor | None) -> Gradients:
        if self._from_output is not None:
            grad_output = self._from_output(grad_output, output)
        elif self._through_mid is not None:
            grad_output = self._through_mid(*tensors, grad_output)
        return self._gradients(grad_output, *tensors)


class Generic:
    """The gradients by the SIMT kernels, a launch each."""

    def __init__(
        self,
        candidate: Candidate,
        problem: DepthwiseProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        want_x, want_weight, want_bias = mask
        splits = candidate.depthwise_splits or Splits(1, 1)  # a fast kernel's candidate, of a batch of 0
        self._input = Step("input", problem, x) if want_x else None
        self._sums = SplitSums(
            "depthwise_weight", problem, x, splits, weight if want_weight else None, bias if want_bias else None
        )

    def __call__(self, grad_t: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        weights = [weight.contiguous(), None, None]
        grad_x = None
        if self._input is not None:
            grad_x = torch.empty_like(x)
            self._input(x, weights, grad_t=grad_t, grad_x=grad_x)
        return grad_x, *self._sums(x, weights, grad_t=grad_t)


class OnePass:
    """The gradients by one fast kernel, and the ordered reductions of its parts."""

    def __init__(
        self,
        candidate: Candidate,
        problem: DepthwiseProblem,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        self._candidate, self._problem = candidate, problem
        self._layout, self._x_strides = memory_format_of(x), x.stride()
        self._want_x, want_weight, want_bias = mask
        like = weight if want_weight else None, bias if want_bias else None
        self._sums = Reductions(candidate.tiling.parts, *like)
        self._launches: dict[tuple[Strides, Strides], Any] = {}

    def __call__(self, grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        grad_output = readable(grad_output, self._layout, self._candidate)
        grad_x = torch.empty_like(x) if self._want_x else None
        strides = grad_output.stride(), NO_STRIDES if grad_x is None else grad_x.stride()
        launch = self._launches.get(strides)
        if launch is None:
            launch = self._launches[strides] = loader.load().DepthwiseBackwardLaunch(
                self._candidate.name,
                conv_shape(self._problem),
                *tilings_of(self._candidate.tiling),
                self._x_strides,
                *strides,
            )
        partials = self._sums.empty(x)
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        launch(*addresses(x, weight, bias, grad_output, grad_x, *partials), stream_of(x.device.index))
        return grad_x, *self._sums(partials)


def readable(grad: Tensor, layout: torch.memory_format, candidate: Candidate) -> Tensor:
    """A gradient as the candidate's kernel can read it: the fast ones want x's layout, aligned; copied if it is not."""
    if candidate.family != "depthwise" or (memory_format_of(grad) == layout and aligned(grad)):
        return grad
    return torch.empty_like(grad, memory_format=layout).copy_(grad)
