"""Launches of the SIMT family: the fused forward, and the steps of its backward.

Each class prepares its launches once, for a problem and the strides of its tensors; a call allocates and launches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import Tensors, address, conv_shape, cuda_stream, stream_of, strides_of
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Problem, Splits
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import output_strides

Gradients = tuple[Tensor | None, ...]


class Forward:
    """y of a fused forward, or, given grad_output, the gradient of the last activation's argument z."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, grad_output: Tensor | None = None):
        x, *_, residual = tensors
        self._shape = (problem.N, problem.F, problem.out_h, problem.out_w)
        self._strides = output_strides(x, self._shape)
        self._index = x.device.index
        self._launch = loader.load().ForwardLaunch(
            candidate.name,
            conv_shape(problem),
            (0, 0, 0, 0),
            x.stride(),
            strides_of(residual),
            strides_of(grad_output),
            self._strides,
        )

    def __call__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        bias: Tensor | None,
        depthwise_bias: Tensor | None,
        residual: Tensor | None,
        grad_output: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
        if not self._shape[0]:
            return y
        # The weights are small: a view with odd strides is copied rather than strided through.
        depthwise_weight, pointwise_weight = depthwise_weight.contiguous(), pointwise_weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        depthwise_bias = None if depthwise_bias is None else depthwise_bias.contiguous()
        self._launch(
            x.data_ptr(),
            depthwise_weight.data_ptr(),
            pointwise_weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if depthwise_bias is None else depthwise_bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            0 if grad_output is None else grad_output.data_ptr(),
            y.data_ptr(),
            0 if self._index is None else cuda_stream(self._index),
        )
        return y


class Backward:
    """The gradients of a fused call, None where not asked for: the steps of `BackwardParams` in csrc/params.h."""

    def __init__(
        self,
        candidate: Candidate,
        problem: Problem,
        grad_output: Tensor,
        tensors: Tensors,
        output: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        x, depthwise_weight, pointwise_weight, bias, depthwise_bias, _ = tensors
        self._mask = mask
        self._activation = ACTIVATIONS[problem.activation]
        self._again = None
        if problem.activation is not None and (output is None or self._activation.from_output is None):
            # The forward kernel, with grad_output: z is never rounded to the tensors' dtype on the way.
            forward = replace(candidate, name=candidate.name.replace("simt_backward", "simt_forward"))
            self._again = Forward(forward, problem, tensors, grad_output)
        self._shape = (problem.N, problem.K, problem.out_h, problem.out_w)
        self._strides = output_strides(x, self._shape)
        want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, _ = mask
        self._intermediate = self._input = self._depthwise = self._pointwise = None
        if want_x or want_depthwise or want_depthwise_bias:
            self._intermediate = Step("intermediate", problem, x)
            self._input = Step("input", problem, x) if want_x else None
            self._depthwise = SplitSums(
                "depthwise_weight",
                problem,
                x,
                candidate.depthwise_splits,
                depthwise_weight if want_depthwise else None,
                depthwise_bias if want_depthwise_bias else None,
            )
        if want_pointwise:
            self._pointwise = SplitSums(
                "pointwise_weight",
                problem,
                x,
                candidate.pointwise_splits,
                pointwise_weight,
                bias if want_bias else None,
            )

    def __call__(
        self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, kept: Tensor | None = None
    ) -> Gradients:
        _, _, _, want_bias, _, want_residual = self._mask
        x = tensors[0]
        if self._again is not None:
            grad_z = self._again(*tensors, grad_output)
        elif self._activation.from_output is not None:
            grad_z = self._activation.from_output(grad_output, output)
        weights = [None if t is None else t.contiguous() for t in (tensors[1], tensors[2], tensors[4])]
        grad_x = grad_depthwise = grad_depthwise_bias = grad_pointwise = grad_bias = None
        if self._intermediate is not None:
            grad_t = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
            self._intermediate(x, weights, grad_z=grad_z, grad_t=grad_t)
            if self._input is not None:
                grad_x = torch.empty_like(x)
                self._input(x, weights, grad_t=grad_t, grad_x=grad_x)
            grad_depthwise, grad_depthwise_bias = self._depthwise(x, weights, grad_t=grad_t)
        if self._pointwise is not None:
            grad_pointwise, grad_bias = self._pointwise(x, weights, grad_z=grad_z)
        elif want_bias:
            grad_bias = grad_z.sum((0, 2, 3))
        grad_residual = grad_z if want_residual else None
        return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_residual


class Step:
    """One launch of a backward. Its gradients may come in any strides: a launch is prepared for each that was met."""

    def __init__(self, name: str, problem: Problem | DepthwiseProblem, x: Tensor, splits: Splits | None = None) -> None:
        self._instance = f"simt_backward_{name}_{problem.dtype}_{problem.layout}"
        self._problem, self._splits, self._x_strides = problem, splits, x.stride()
        self._launches: dict[tuple, Any] = {}

    def __call__(
        self,
        x: Tensor,
        weights: list[Tensor | None],
        *,
        grad_z: Tensor | None = None,
        grad_t: Tensor | None = None,
        grad_x: Tensor | None = None,
        partial_weight: Tensor | None = None,
        partial_bias: Tensor | None = None,
    ) -> None:
        """`weights` are depthwise_weight, pointwise_weight and depthwise_bias, contiguous."""
        if not self._problem.N:
            return
        strides = strides_of(grad_z), strides_of(grad_t), strides_of(grad_x)
        launch = self._launches.get(strides)
        if launch is None:
            splits = self._splits or Splits(0, 0)
            launch = self._launches[strides] = loader.load().BackwardLaunch(
                self._instance,
                conv_shape(self._problem),
                (0, 0, 0, 0, 0),
                splits.pixels_per_part,
                splits.parts,
                self._x_strides,
                *strides,
            )
        depthwise_weight, pointwise_weight, depthwise_bias = weights
        launch(
            x.data_ptr(),
            address(depthwise_weight),
            address(pointwise_weight),
            address(depthwise_bias),
            address(grad_z),
            address(grad_t),
            address(grad_x),
            address(partial_weight),
            address(partial_bias),
            stream_of(x.device.index),
        )


class SplitSums:
    """The gradients of a weight and a bias, None for None: partial sums by one step, then their ordered reductions."""

    def __init__(
        self,
        name: str,
        problem: Problem | DepthwiseProblem,
        x: Tensor,
        splits: Splits | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self._wanted = splits is not None and (weight is not None or bias is not None)
        if self._wanted:
            self._step = Step(name, problem, x, splits) if problem.N else None
            self._sums = [None if like is None else Reduction(splits.parts, like) for like in (weight, bias)]

    def __call__(
        self, x: Tensor, weights: list[Tensor | None], **gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self._wanted:
            return None, None
        if self._step is None:
            return tuple(None if sums is None else sums.zeros(x) for sums in self._sums)
        partials = [None if sums is None else sums.empty(x) for sums in self._sums]
        self._step(x, weights, **gradients, partial_weight=partials[0], partial_bias=partials[1])
        return tuple(None if sums is None else sums(part) for sums, part in zip(self._sums, partials, strict=True))


class Reduction:
    """A sum over parts, in their order, in the shape and dtype of the tensor whose gradient it is."""

    def __init__(self, parts: int, like: Tensor) -> None:
        self._parts, self._shape, self._count, self._dtype = parts, like.shape, like.numel(), like.dtype
        self._compute = torch.float64 if like.dtype == torch.float64 else torch.float32
        instance = f"reduce_splits_{str(like.dtype).removeprefix('torch.')}"
        self._launch = loader.load().ReduceLaunch(instance, self._count, parts)

    def empty(self, x: Tensor) -> Tensor:
        """Memory for the parts, (parts, count), where x is."""
        return torch.empty((self._parts, self._count), dtype=self._compute, device=x.device)

    def zeros(self, x: Tensor) -> Tensor:
        """The sum over no parts."""
        return torch.zeros(self._shape, dtype=self._dtype, device=x.device)

    def __call__(self, partials: Tensor) -> Tensor:
        out = torch.empty(self._shape, dtype=self._dtype, device=partials.device)
        self._launch(partials.data_ptr(), out.data_ptr(), stream_of(partials.device.index))
        return out
