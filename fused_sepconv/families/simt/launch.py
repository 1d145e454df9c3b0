"""Launches the SIMT family: the fused forward, and the steps of its backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import Tensors, address, contiguous, conv_shape, image_of, stream_of
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Problem, Splits
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import empty_output


def forward(candidate: Candidate, problem: Problem, tensors: Tensors, grad_output: Tensor | None = None) -> Tensor:
    """y, or with grad_output the gradient of the last activation's argument."""
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual = tensors
    y = empty_output(x, (problem.N, problem.F, problem.out_h, problem.out_w))
    if problem.N == 0:
        return y
    weights = contiguous(depthwise_weight, pointwise_weight, depthwise_bias, bias)
    loader.load().forward(
        candidate.name,
        conv_shape(problem),
        image_of(x),
        *map(address, weights),
        image_of(residual),
        image_of(grad_output),
        image_of(y),
        (0, 0, 0, 0),
        stream_of(x.device),
    )
    return y


def backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The six gradients, None where not asked for: the steps of `BackwardParams` in csrc/params.h that they need."""
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, want_residual = output_mask
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, _ = tensors
    grad_z = _gradient_of_argument(candidate, problem, grad_output, tensors, output)
    run = Steps(problem, x, depthwise_weight, pointwise_weight, depthwise_bias, grad_z)

    grad_x = grad_depthwise = grad_depthwise_bias = grad_pointwise = grad_bias = None
    if want_x or want_depthwise or want_depthwise_bias:
        grad_t = empty_output(x, (problem.N, problem.K, problem.out_h, problem.out_w))
        run.step("intermediate", grad_t=grad_t)
        if want_x:
            grad_x = torch.empty_like(x)
            run.step("input", grad_t=grad_t, grad_x=grad_x)
        grad_depthwise, grad_depthwise_bias = run.split_sums(
            "depthwise_weight",
            candidate.depthwise_splits,
            depthwise_weight if want_depthwise else None,
            depthwise_bias if want_depthwise_bias else None,
            grad_t=grad_t,
        )
    if want_pointwise:
        grad_pointwise, grad_bias = run.split_sums(
            "pointwise_weight", candidate.pointwise_splits, pointwise_weight, bias if want_bias else None
        )
    elif want_bias:
        grad_bias = grad_z.sum((0, 2, 3))
    return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_z if want_residual else None


def _gradient_of_argument(
    candidate: Candidate, problem: Problem, grad_output: Tensor, tensors: Tensors, output: Tensor | None
) -> Tensor:
    """The gradient of the last activation's argument z: read from the output, or at z computed again."""
    activation = ACTIVATIONS[problem.activation]
    if problem.activation is None:
        return grad_output
    if output is not None and activation.from_output is not None:
        return activation.from_output(grad_output, output)
    # The forward kernel, with grad_output: z is never rounded to the tensors' dtype on the way.
    candidate = replace(candidate, name=candidate.name.replace("simt_backward", "simt_forward"))
    return forward(candidate, problem, tensors, grad_output)


class Steps:
    """The launches of one backward: what they share, and how a split sum becomes a gradient."""

    def __init__(
        self,
        problem: Problem | DepthwiseProblem,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor | None = None,
        depthwise_bias: Tensor | None = None,
        grad_z: Tensor | None = None,
    ) -> None:
        self._problem = problem
        self._x, self._grad_z = x, grad_z
        self._weights = contiguous(depthwise_weight, pointwise_weight, depthwise_bias)

    def step(
        self,
        name: str,
        *,
        grad_t: Tensor | None = None,
        grad_x: Tensor | None = None,
        partial_weight: Tensor | None = None,
        partial_bias: Tensor | None = None,
        splits: Splits | None = None,
    ) -> None:
        if self._problem.N == 0:
            return
        loader.load().backward(
            f"simt_backward_{name}_{self._problem.dtype}_{self._problem.layout}",
            conv_shape(self._problem),
            image_of(self._x),
            *map(address, self._weights),
            image_of(self._grad_z),
            image_of(grad_t),
            image_of(grad_x),
            address(partial_weight),
            address(partial_bias),
            splits.pixels_per_part if splits else 0,
            splits.parts if splits else 0,
            (0, 0, 0, 0, 0),
            stream_of(self._x.device),
        )

    def split_sums(
        self, name: str, splits: Splits | None, weight: Tensor | None, bias: Tensor | None, grad_t: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a weight and a bias, None for None: partial sums, then their ordered reduction."""
        if (weight is None and bias is None) or splits is None:
            return None, None
        if self._problem.N == 0:
            return tuple(None if like is None else torch.zeros_like(like) for like in (weight, bias))
        compute = torch.float64 if self._x.dtype == torch.float64 else torch.float32
        partials = [
            None if like is None else torch.empty(splits.parts, like.numel(), dtype=compute, device=like.device)
            for like in (weight, bias)
        ]
        self.step(name, grad_t=grad_t, partial_weight=partials[0], partial_bias=partials[1], splits=splits)
        return tuple(
            None if part is None else reduced(part, like) for part, like in zip(partials, (weight, bias), strict=True)
        )


def reduced(partials: Tensor, like: Tensor) -> Tensor:
    """The sum over the parts, in their order, in the shape and dtype of the weight whose gradient it is."""
    parts, count = partials.shape[0], like.numel()
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    loader.load().reduce(
        f"reduce_splits_{str(like.dtype).removeprefix('torch.')}",
        address(partials),
        address(out),
        count,
        parts,
        stream_of(like.device),
    )
    return out
