"""Launches of the split family: our depthwise kernels, and PyTorch's own 1x1 beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.families.backward import Backward, Gradients
from fused_sepconv.families.depthwise import launch as depthwise
from fused_sepconv.families.split.plan import convolution
from fused_sepconv.native.marshalling import Tensors
from fused_sepconv.planning.problem import Candidate, Problem
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import empty_output, output_strides

_IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu_,
    "relu6": lambda z: F.hardtanh_(z, 0.0, 6.0),
    "elu": F.elu_,
    "silu": lambda z: F.silu(z, inplace=True),
    "hardswish": lambda z: F.hardswish(z, inplace=True),
    "gelu": torch.ops.aten.gelu_,
}


class Forward:
    """y: the depthwise result through device memory, then the 1x1, residual and activation.

    Where the problem is to save it, (y, v), or t for v where the mid-activation's derivative needs t.
    """

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors) -> None:
        (step,) = candidate.steps
        inner = convolution(problem)
        self._intermediate = Intermediate(step, inner, tensors)
        self._saves = problem.saved
        self._strides = output_strides(tensors[0], (problem.N, problem.F, problem.out_h, problem.out_w))
        self._mid = None if inner is problem else ACTIVATIONS[problem.mid_activation].forward
        self._pointwise = Pointwise(candidate)
        self._activation = None if problem.activation is None else _IN_PLACE[problem.activation]

    def __call__(
        self,
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        bias: Tensor | None,
        depthwise_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Any:
        kept = v = self._intermediate.depthwise(x, depthwise_weight, depthwise_bias)
        if self._mid is not None:
            v = self._mid(kept)
        z = self._pointwise(v, pointwise_weight, bias)
        if residual is not None:
            z.add_(residual)
        y = z if self._activation is None else self._activation(z)
        if y.stride() != self._strides:
            y = torch.empty_strided(y.shape, self._strides, dtype=y.dtype, device=y.device).copy_(y)
        return (y, kept) if self._saves else y


def prepare_backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    mask: tuple[bool, ...],
) -> Backward | BackwardOfSaved:
    """The depthwise result is read where it was saved, else computed again at most once."""
    if problem.saved:
        return BackwardOfSaved(candidate, problem, tensors, output, mask)
    again, one_pass = candidate.steps
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, _ = mask
    intermediate = Intermediate(again, problem, tensors)
    to_weight = to_input = None
    if want_pointwise or want_bias:
        to_weight = WeightGradients(candidate, intermediate, (want_pointwise, want_bias))
    wanted = (want_x, want_depthwise, want_depthwise_bias)
    if any(wanted):
        to_input = InputGradients(candidate, one_pass, problem, tensors, wanted)
    return Backward(mask, ArgumentGradient(candidate, problem, intermediate, output), to_weight, to_input)


class BackwardOfSaved:
    """The six gradients from what the forward saved."""

    def __init__(
        self, candidate: Candidate, problem: Problem, tensors: Tensors, output: Tensor | None, mask: tuple[bool, ...]
    ) -> None:
        (step,) = candidate.steps
        inner = convolution(problem)
        self._mask = mask
        self._mid = None if inner is problem else ACTIVATIONS[problem.mid_activation]
        self._argument = ArgumentGradient(candidate, problem, None, output)
        self._pointwise = Pointwise(candidate)
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        wanted = mask[0], mask[1], mask[4]
        own = x, depthwise_weight, depthwise_bias
        self._depthwise = depthwise.Backward(step, inner.depthwise("backward"), None, own, None, wanted)

    def __call__(self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, kept: Tensor) -> Gradients:
        want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, want_residual = self._mask
        x, depthwise_weight, pointwise_weight, _, depthwise_bias, _ = tensors
        from_v = None if self._mid is None else self._mid.from_output
        v = kept if self._mid is None or from_v is not None else self._mid.forward(kept)
        grad_z, v = self._argument(grad_output, tensors, output, v)
        want_v = want_x or want_depthwise or want_depthwise_bias
        grad_v, grad_pointwise, grad_bias = self._pointwise.backward(
            grad_z, v, pointwise_weight, (want_v, want_pointwise, want_bias), x
        )
        grad_x = grad_depthwise = grad_depthwise_bias = None
        if want_v:
            grad_t = grad_v if self._mid is None else (from_v or self._mid.backward)(grad_v, kept)
            grad_x, grad_depthwise, grad_depthwise_bias = self._depthwise(
                grad_t, (x, depthwise_weight, depthwise_bias), None
            )
        grad_residual = grad_z if want_residual else None
        return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_residual


class Intermediate:
    """v, the depthwise result through the mid-activation."""

    def __init__(self, step: Candidate, problem: Problem, tensors: Tensors) -> None:
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        self.depthwise = depthwise.Forward(step, problem.depthwise("forward"), (x, depthwise_weight, depthwise_bias))

    def __call__(self, tensors: Tensors) -> Tensor:
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        return self.depthwise(x, depthwise_weight, depthwise_bias)


class ArgumentGradient:
    """The gradient of the last activation's argument z, and v where it is known: given, or computed again for z."""

    def __init__(
        self, candidate: Candidate, problem: Problem, intermediate: Intermediate | None, output: Tensor | None
    ) -> None:
        self._identity = problem.activation is None
        self._activation = ACTIVATIONS[problem.activation]
        self._from_output = self._activation.from_output if output is not None else None
        self._intermediate, self._pointwise = intermediate, Pointwise(candidate)

    def __call__(
        self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, v: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self._identity:
            return grad_output, v
        if self._from_output is not None:
            return self._from_output(grad_output, output), v
        _, _, pointwise_weight, bias, _, residual = tensors
        v = self._intermediate(tensors) if v is None else v
        z = self._pointwise(v, pointwise_weight, bias)
        return self._activation.backward(grad_output, z if residual is None else z.add_(residual)), v


class WeightGradients:
    """The gradients of the pointwise weight and the last bias, by PyTorch."""

    def __init__(self, candidate: Candidate, intermediate: Intermediate, mask: tuple[bool, bool]) -> None:
        self._pointwise, self._intermediate, self._mask = Pointwise(candidate), intermediate, mask

    def __call__(self, grad_z: Tensor, tensors: Tensors, v: Tensor | None) -> Gradients:
        if v is None and self._mask[0]:
            v = self._intermediate(tensors)
        return self._pointwise.backward(grad_z, v, tensors[2], (False, *self._mask), tensors[0])[1:]


class InputGradients:
    """The gradients of x, the depthwise weight and its bias: PyTorch's product, then the depthwise backward."""

    def __init__(
        self, candidate: Candidate, step: Candidate, problem: Problem, tensors: Tensors, mask: tuple[bool, bool, bool]
    ) -> None:
        x, depthwise_weight, _, _, depthwise_bias, _ = tensors
        self._pointwise = Pointwise(candidate)
        own = x, depthwise_weight, depthwise_bias
        self._depthwise = depthwise.Backward(step, problem.depthwise("backward"), None, own, None, mask)

    def __call__(self, grad_z: Tensor, tensors: Tensors) -> Gradients:
        x, depthwise_weight, pointwise_weight, _, depthwise_bias, _ = tensors
        grad_v, _, _ = self._pointwise.backward(grad_z, None, pointwise_weight, (True, False, False), x)
        return self._depthwise(grad_v, (x, depthwise_weight, depthwise_bias), None)


class Pointwise:
    """PyTorch's own 1x1 and its gradients: by "conv2d", or by "matmul" on an NHWC image's pixels as rows."""

    def __init__(self, candidate: Candidate) -> None:
        self._matmul = candidate.pointwise == "matmul"

    def __call__(self, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """z in a tensor of its own: (N, F, out_h, out_w)."""
        if not self._matmul:
            return F.conv2d(v, weight, bias)
        return _product(v, weight.flatten(1).t(), bias)

    def backward(
        self, grad_z: Tensor, v: Tensor | None, weight: Tensor, mask: tuple[bool, bool, bool], x: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the 1x1's input, weight and bias, None where the mask does not ask."""
        want_v, want_weight, want_bias = mask
        grad_v = None
        if self._matmul and want_v:
            grad_v = _product(grad_z, weight.flatten(1))
            mask = (False, want_weight, want_bias)
        if not any(mask):
            return grad_v, None, None
        if v is None:
            # Only the weight's gradient reads v; of this one, PyTorch looks at the shape and strides.
            n, _, height, width = grad_z.shape
            v = empty_output(x, (n, weight.shape[1], height, width))
        # The weight's gradient by a convolution in every dtype: it sums in float32, where a matrix product in 16 bits
        # may split its sum over all pixels into parts that it adds in 16 bits.
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_z, v, weight, [weight.shape[0]], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, mask
        )
        return grad_v if self._matmul else grad_input, grad_weight, grad_bias


def _product(image: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """The image, NHWC, of an image's pixels times a matrix, and a bias added to each. No copy of an NHWC image."""
    n, channels, height, width = image.shape
    rows = image.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix)
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)
