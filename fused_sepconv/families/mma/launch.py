"""Launches of the tensor-core family: the fused forward, and the steps of its backward.

Each class prepares its launches once, for a problem and the strides of its tensors; a call allocates and launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.backward import Backward, Gradients
from fused_sepconv.families.mma import nchw
from fused_sepconv.families.simt import launch as simt
from fused_sepconv.families.split import launch as split
from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import Tensors, addresses, conv_shape, stream_of, tiling_of
from fused_sepconv.planning.problem import Candidate, MmaInputTiling, Problem, Splits
from fused_sepconv.tensors.memory_format import as_nhwc, as_output


def _readable(image: Tensor) -> Tensor:
    """An image as the kernels can read it, NHWC and aligned to 16 bytes: copied if it is not.

    (Its channels fill whole vectors, or no kernel of this family was chosen.)
    """
    if image.is_contiguous(memory_format=torch.channels_last) and image.data_ptr() % 16 == 0:
        return image
    return as_nhwc(image)


def _vectors(weight: Tensor) -> Tensor:
    """A weight or bias that can be read 16 bytes at a time; the few that are not aligned are copied."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


class Forward(simt.Forward):
    """y, of NHWC images."""

    weight = staticmethod(_vectors)
    image = staticmethod(_readable)


class ForwardOfNchw:
    """y, of NCHW images: the kernel for NHWC between conversions there and back."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors) -> None:
        self._forward = Forward(candidate, nchw.as_nhwc(problem), (as_nhwc(tensors[0]), *tensors[1:]))

    def __call__(self, x: Tensor, *others: Tensor | None) -> Tensor:
        return as_output(x, self._forward(as_nhwc(x), *others))


def prepare_forward(candidate: Candidate, problem: Problem, tensors: Tensors) -> Forward | ForwardOfNchw:
    """The forward for the problem's layout."""
    kind = Forward if problem.layout == "nhwc" else ForwardOfNchw
    return kind(candidate, problem, tensors)


def prepare_backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    mask: tuple[bool, ...],
) -> Backward | BackwardOfNchw:
    """The backward for the problem's layout."""
    if problem.layout == "nchw":
        return BackwardOfNchw(candidate, problem, grad_output, tensors, output, mask)
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, _ = mask
    weight_step, again, input_step = candidate.steps
    intermediate = split.Intermediate(again, problem, tensors)
    to_weight = to_input = None
    if want_pointwise:
        to_weight = PointwiseWeightGradient(weight_step, problem, tensors, want_bias)
    wanted = (want_x, want_depthwise, want_depthwise_bias)
    if any(wanted):
        fused = isinstance(input_step.tiling, MmaInputTiling)
        to_input = (
            InputGradients(input_step, problem, tensors, wanted)
            if fused
            else split.InputGradients(candidate, input_step, problem, tensors, wanted)
        )
    return Backward(mask, split.ArgumentGradient(candidate, problem, intermediate, output), to_weight, to_input)


class BackwardOfNchw:
    """The six gradients of NCHW images: the kernels for NHWC between conversions there and back."""

    def __init__(
        self,
        candidate: Candidate,
        problem: Problem,
        grad_output: Tensor,
        tensors: Tensors,
        output: Tensor | None,
        mask: tuple[bool, ...],
    ) -> None:
        tensors = (as_nhwc(tensors[0]), *tensors[1:])
        self._backward = prepare_backward(candidate, nchw.as_nhwc(problem), grad_output, tensors, output, mask)

    def __call__(
        self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, kept: Tensor | None = None
    ) -> Gradients:
        x = tensors[0]
        output = None if output is None else as_nhwc(output)
        grad_x, *others = self._backward(as_nhwc(grad_output), (as_nhwc(x), *tensors[1:]), output)
        return None if grad_x is None else torch.empty_like(x).copy_(grad_x), *others


class PointwiseWeightGradient(simt.SplitSums):
    """The gradients of the pointwise weight, (F, K, 1, 1), and if wanted of the last bias, (F), from grad_z."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, want_bias: bool = False) -> None:
        x, _, pointwise_weight, bias, _, _ = tensors
        like = pointwise_weight, bias if want_bias else None
        super().__init__(candidate.name, problem, x, Splits(candidate.tiling.parts, 0), *like, candidate.tiling)

    def __call__(self, grad_z: Tensor, tensors: Tensors, v: Tensor | None = None) -> Gradients:
        return super().__call__(tensors[0], simt.contiguous_weights(tensors), grad_z=_readable(grad_z))


class InputGradients:
    """The gradients of x, depthwise_weight and depthwise_bias, None where the mask does not ask, from grad_z.

    `candidate` is of backward_input.py.
    """

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, mask: tuple[bool, bool, bool]) -> None:
        _, depthwise_weight, _, _, depthwise_bias, _ = tensors
        self._want_x, want_weight, want_bias = mask
        self._candidate, self._problem = candidate, problem
        self._sums = simt.Reductions(
            candidate.tiling.parts if problem.N else 1,
            depthwise_weight if want_weight else None,
            depthwise_bias if want_bias else None,
        )
        self._launches: dict[tuple, Any] = {}

    def __call__(self, grad_z: Tensor, tensors: Tensors) -> Gradients:
        x, depthwise_weight, pointwise_weight, _, _, _ = tensors
        if not self._problem.N:
            return torch.zeros_like(x) if self._want_x else None, *self._sums.zeros(x)
        grad_z = _readable(grad_z)
        grad_x = torch.empty_like(x) if self._want_x else None
        # The kernel writes where it reads, and its offsets are as wide as the plan has checked for an x without gaps.
        x = _readable(x)
        strides = x.stride(), grad_z.stride()
        launch = self._launches.get(strides)
        if launch is None:
            launch = self._launches[strides] = loader.load().MmaInputLaunch(
                self._candidate.name, conv_shape(self._problem), tiling_of(self._candidate.tiling, 4), *strides
            )
        partials = self._sums.empty(x)
        depthwise_weight, pointwise_weight = depthwise_weight.contiguous(), _vectors(pointwise_weight)
        given = addresses(x, depthwise_weight, pointwise_weight, grad_z, grad_x, *partials)
        launch(*given, stream_of(x.device.index))
        return grad_x, *self._sums(partials)
