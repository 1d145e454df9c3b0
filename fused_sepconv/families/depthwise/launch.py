"""Launches the depthwise kernels by themselves: for `depthwise_conv2d`, and as the split family's steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_sepconv.families.simt.launch import Steps, reduced
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import address, contiguous, conv_shape, image_of, stream_of, tilings_of
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Splits
from fused_sepconv.tensors.memory_format import aligned, empty_output, memory_format_of


def forward(
    candidate: Candidate,
    problem: DepthwiseProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor | None = None,
) -> Tensor:
    """mid_act(t) with t = depthwise(pre_act(x)) + bias, or with grad_output the gradient of t."""
    y = empty_output(x, (problem.N, problem.K, problem.out_h, problem.out_w))
    if problem.N == 0:
        return y
    if grad_output is not None:
        grad_output = _readable(grad_output, x, candidate)
    weights = contiguous(weight, bias)
    loader.load().depthwise_forward(
        candidate.name,
        conv_shape(problem),
        *tilings_of(candidate.tiling),
        image_of(x),
        *map(address, weights),
        image_of(grad_output),
        image_of(y),
        stream_of(x.device),
    )
    return y


def backward(
    candidate: Candidate,
    problem: DepthwiseProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, None where not asked for, from that of the output."""
    want_x, want_weight, want_bias = output_mask
    for through_mid in candidate.steps:
        grad_output = forward(through_mid, problem, x, weight, bias, grad_output)
        problem = replace(problem, mid_activation=None)
    if candidate.family == "depthwise" and problem.N:
        return _one_pass(candidate, problem, x, weight, bias, grad_output, output_mask)
    steps = Steps(problem, x, weight)
    grad_x = None
    if want_x:
        grad_x = torch.empty_like(x)
        steps.step("input", grad_t=grad_output, grad_x=grad_x)
    splits = candidate.depthwise_splits or Splits(1, 1)  # a fast kernel's candidate, of a batch of 0
    sums = steps.split_sums(
        "depthwise_weight", splits, weight if want_weight else None, bias if want_bias else None, grad_t=grad_output
    )
    return grad_x, *sums


def _one_pass(
    candidate: Candidate,
    problem: DepthwiseProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    want_x, want_weight, want_bias = output_mask
    grad_x = torch.empty_like(x) if want_x else None
    # One sum a part: float32, as the kernels calculate.
    partials = [
        x.new_empty((candidate.tiling.parts, count), dtype=torch.float32) if wanted else None
        for count, wanted in ((problem.K * problem.taps, want_weight), (problem.K, want_bias))
    ]
    weights, grad_read = contiguous(weight, bias), _readable(grad_output, x, candidate)  # kept until the launch
    loader.load().depthwise_backward(
        candidate.name,
        conv_shape(problem),
        *tilings_of(candidate.tiling),
        image_of(x),
        *map(address, weights),
        image_of(grad_read),
        image_of(grad_x),
        *map(address, partials),
        stream_of(x.device),
    )
    return (
        grad_x,
        reduced(partials[0], weight) if want_weight else None,
        reduced(partials[1], bias) if want_bias else None,
    )


def _readable(grad: Tensor, x: Tensor, candidate: Candidate) -> Tensor:
    """A gradient as the candidate's kernel can read it: the fast ones want x's layout, aligned; copied if it is not."""
    if candidate.family != "depthwise":
        return grad
    layout = memory_format_of(x)
    return grad if memory_format_of(grad) == layout and aligned(grad) else _copied(grad, layout)


def _copied(grad: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty_like(grad, memory_format=layout).copy_(grad)
