"""The depthwise kernels for a normalised tensor (`families/depthwise/normalised.py`) as a function with gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.depthwise import normalised
from fused_sepconv.ops import launching, problems
from fused_sepconv.ops.arguments import DepthwiseArguments
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem
from tests.support.cases import four_sides, pair


def problem_of(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, pre_activation: str | None
) -> DepthwiseProblem:
    """The forward problem; `dataclasses.replace` makes the backward's."""
    stride, dilation = pair(stride), pair(dilation)
    sides = four_sides(padding, tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, dilation)
    arguments = DepthwiseArguments(stride, sides, dilation, pre_activation, None)
    return problems.depthwise_problem_of("forward", (x, weight, None), arguments)


def planned(problem: DepthwiseProblem, x: Tensor) -> Candidate:
    """What runs a problem where x is; a RuntimeError with the reason where nothing does."""
    candidate = normalised.candidate(problem, *launching.device_and_kernels(x.device))
    if candidate.refusal:
        raise RuntimeError(candidate.refusal)
    return candidate


def normalised_depthwise(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    pre_activation: str | None = None,
) -> Tensor:
    """`tests.support.cases.normalised_convolution` by our kernels, with every tensor's gradient."""
    problem = problem_of(x, weight, stride, padding, dilation, pre_activation)
    return _Normalised.apply(problem, x, scale, shift, weight, bias)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        problem: DepthwiseProblem,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.problem = replace(problem, direction="backward")
        ctx.save_for_backward(x, scale, shift, weight, bias)
        run = normalised.Forward(planned(problem, x), problem, x)
        return run(x, scale.float(), shift.float(), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, bias = ctx.saved_tensors
        mean = x.float().mean((0, 2, 3))
        mask = (True, bias is not None)
        run = normalised.Backward(planned(ctx.problem, x), ctx.problem, x, weight, bias, mask)
        grad_weight, grad_bias, dz, sum_dz, sum_dz_xmu = run(grad_t, x, scale.float(), shift.float(), mean, weight)
        grad_x = (dz.float() * scale.float().view(-1, 1, 1)).to(x.dtype)
        grad_scale = sum_dz_xmu + mean * sum_dz
        return None, grad_x, grad_scale.to(scale.dtype), sum_dz.to(shift.dtype), grad_weight, grad_bias
