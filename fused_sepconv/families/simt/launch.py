"""Launches of the SIMT family: the fused forward, and the steps of its backward.

Each class prepares its launches once, for a problem and the strides of its tensors; a call allocates and launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.backward import Backward, Gradients
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import (
    NO_STRIDES,
    Tensors,
    addresses,
    conv_shape,
    cuda_stream,
    stream_of,
    strides_of,
    tiling_of,
)
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, MmaWeightTiling, Problem, Splits
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import output_strides


class Forward:
    """y of a fused forward, or, given grad_output, the gradient of the last activation's argument z."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, grad_output: Tensor | None = None):
        x, *weights, residual = tensors
        self._shape = (problem.N, problem.F, problem.out_h, problem.out_w)
        self._strides = output_strides(x, self._shape)
        self._index = x.device.index
        # Whether all can be read where they are: the signature that this is prepared for decides.
        given = residual if residual is None else self.image(residual)
        self._in_place = given is residual and all(w is None or self.weight(w) is w for w in weights)
        self._launch = loader.load().ForwardLaunch(
            candidate.name,
            conv_shape(problem),
            tiling_of(candidate.tiling, 4),
            x.stride(),
            strides_of(given),
            strides_of(grad_output),
            self._strides,
        )

    @staticmethod
    def weight(weight: Tensor) -> Tensor:
        """A weight or bias as the kernel reads it. It is small: one with odd strides is copied."""
        return weight.contiguous()

    @staticmethod
    def image(image: Tensor) -> Tensor:
        """A residual as the kernel reads it: in any strides."""
        return image

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
        if not self._in_place:
            depthwise_weight, pointwise_weight = self.weight(depthwise_weight), self.weight(pointwise_weight)
            bias = None if bias is None else self.weight(bias)
            depthwise_bias = None if depthwise_bias is None else self.weight(depthwise_bias)
            residual = None if residual is None else self.image(residual)
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


def prepare_backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    mask: tuple[bool, ...],
) -> Backward:
    """The steps of `BackwardParams` in csrc/params.h."""
    want_x, want_depthwise, want_pointwise, _, want_depthwise_bias, _ = mask
    return Backward(
        mask,
        _ArgumentGradient(candidate, problem, grad_output, tensors, output),
        _PointwiseWeightGradient(candidate, problem, tensors, mask) if want_pointwise else None,
        _InputGradients(candidate, problem, tensors, mask) if want_x or want_depthwise or want_depthwise_bias else None,
    )


class _ArgumentGradient:
    """grad_z; where it is not read from the output, by the forward kernel, which never rounds z on the way."""

    def __init__(
        self, candidate: Candidate, problem: Problem, grad_output: Tensor, tensors: Tensors, output: Tensor | None
    ) -> None:
        self._from_output = ACTIVATIONS[problem.activation].from_output
        self._again = None
        if problem.activation is not None and (output is None or self._from_output is None):
            forward = replace(candidate, name=candidate.name.replace("simt_backward", "simt_forward"))
            self._again = Forward(forward, problem, tensors, grad_output)

    def __call__(self, grad_output: Tensor, tensors: Tensors, output: Tensor | None) -> tuple[Tensor, None]:
        if self._again is not None:
            return self._again(*tensors, grad_output), None
        return self._from_output(grad_output, output), None


class _PointwiseWeightGradient:
    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, mask: tuple[bool, ...]) -> None:
        x, _, pointwise_weight, bias, _, _ = tensors
        like = pointwise_weight, bias if mask[3] else None
        self._sums = SplitSums("pointwise_weight", problem, x, candidate.pointwise_splits, *like)

    def __call__(self, grad_z: Tensor, tensors: Tensors, v: None) -> Gradients:
        return self._sums(tensors[0], contiguous_weights(tensors), grad_z=grad_z)


class _InputGradients:
    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, mask: tuple[bool, ...]) -> None:
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        want_x, want_weight, _, _, want_bias, _ = mask
        self._shape = (problem.N, problem.K, problem.out_h, problem.out_w)
        self._strides = output_strides(x, self._shape)
        self._intermediate = Step("intermediate", problem, x)
        self._input = Step("input", problem, x) if want_x else None
        like = depthwise_weight if want_weight else None, depthwise_bias if want_bias else None
        self._sums = SplitSums("depthwise_weight", problem, x, candidate.depthwise_splits, *like)

    def __call__(self, grad_z: Tensor, tensors: Tensors) -> Gradients:
        x, weights = tensors[0], contiguous_weights(tensors)
        grad_t = torch.empty_strided(self._shape, self._strides, dtype=x.dtype, device=x.device)
        self._intermediate(x, weights, grad_z=grad_z, grad_t=grad_t)
        grad_x = None
        if self._input is not None:
            grad_x = torch.empty_like(x)
            self._input(x, weights, grad_t=grad_t, grad_x=grad_x)
        return grad_x, *self._sums(x, weights, grad_t=grad_t)


def contiguous_weights(tensors: Tensors) -> list[Tensor | None]:
    """depthwise_weight, pointwise_weight and depthwise_bias, contiguous."""
    return [None if t is None else t.contiguous() for t in (tensors[1], tensors[2], tensors[4])]


class Step:
    """One launch of a backward. Its gradients may come in any strides: a launch is prepared for each that was met.

    `name` is that of a SIMT step, or with a tiling an instance.
    """

    def __init__(
        self,
        name: str,
        problem: Problem | DepthwiseProblem,
        x: Tensor,
        splits: Splits | None = None,
        tiling: MmaWeightTiling | None = None,
    ) -> None:
        self._instance = name if tiling else f"simt_backward_{name}_{problem.dtype}_{problem.layout}"
        self._problem, self._splits, self._x_strides, self._tiling = problem, splits, x.stride(), tiling
        self._index = x.device.index
        self._launches: dict[tuple, Any] = {}

    def __call__(
        self,
        x: Tensor,
        weights: Sequence[Tensor | None],
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
        strides = (
            NO_STRIDES if grad_z is None else grad_z.stride(),
            NO_STRIDES if grad_t is None else grad_t.stride(),
            NO_STRIDES if grad_x is None else grad_x.stride(),
        )
        launch = self._launches.get(strides)
        if launch is None:
            splits = self._splits or Splits(0, 0)
            launch = self._launches[strides] = loader.load().BackwardLaunch(
                self._instance,
                conv_shape(self._problem),
                tiling_of(self._tiling, 5),
                splits.pixels_per_part,
                splits.parts,
                self._x_strides,
                *strides,
            )
        given = addresses(x, *weights, grad_z, grad_t, grad_x, partial_weight, partial_bias)
        launch(*given, 0 if self._index is None else cuda_stream(self._index))


class SplitSums:
    """The gradients of a weight and a bias, None for None: partial sums by one step, then their ordered reductions."""

    def __init__(
        self,
        name: str,
        problem: Problem | DepthwiseProblem,
        x: Tensor,
        splits: Splits,
        weight: Tensor | None,
        bias: Tensor | None,
        tiling: MmaWeightTiling | None = None,
    ) -> None:
        self._sums = Reductions(splits.parts, weight, bias)
        self._step = Step(name, problem, x, splits, tiling) if problem.N else None
        self._wanted = weight is not None or bias is not None

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor | None], **gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if self._step is None or not self._wanted:
            return self._sums.zeros(x)
        partials = self._sums.empty(x)
        self._step(x, weights, **gradients, partial_weight=partials[0], partial_bias=partials[1])
        return self._sums(partials)


class Reductions:
    """The ordered sums over parts of a weight's and a bias's gradient, None for None."""

    def __init__(self, parts: int, weight: Tensor | None, bias: Tensor | None) -> None:
        self._weight = None if weight is None else Reduction(parts, weight)
        self._bias = None if bias is None else Reduction(parts, bias)

    def empty(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._weight, self._bias
        return None if weight is None else weight.empty(x), None if bias is None else bias.empty(x)

    def zeros(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._weight, self._bias
        return None if weight is None else weight.zeros(x), None if bias is None else bias.zeros(x)

    def __call__(self, partials: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._weight, self._bias
        return None if weight is None else weight(partials[0]), None if bias is None else bias(partials[1])


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
