"""The backward that the fused families share: three parts, which each family prepares in its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fused_sepconv.native.marshalling import Tensors

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Backward:
    """The gradients of x, depthwise_weight, pointwise_weight, bias, depthwise_bias and residual.

    None where the mask does not ask. A part that nothing is asked of is None.
    """

    mask: tuple[bool, ...]
    argument: Callable[[Tensor, Tensors, Tensor | None], tuple[Tensor, Tensor | None]]
    """(grad_output, tensors, output) → grad_z, and v where it was computed on the way."""
    to_weight: Callable[[Tensor, Tensors, Tensor | None], Gradients] | None
    """(grad_z, tensors, v or None) → the gradients of pointwise_weight and bias."""
    to_input: Callable[[Tensor, Tensors], Gradients] | None
    """(grad_z, tensors) → the gradients of x, depthwise_weight and depthwise_bias."""

    def __call__(
        self, grad_output: Tensor, tensors: Tensors, output: Tensor | None, kept: Tensor | None = None
    ) -> Gradients:
        _, _, _, want_bias, _, want_residual = self.mask
        grad_z, v = self.argument(grad_output, tensors, output)
        grad_pointwise = grad_bias = grad_x = grad_depthwise = grad_depthwise_bias = None
        if self.to_weight is not None:
            grad_pointwise, grad_bias = self.to_weight(grad_z, tensors, v)
        elif want_bias:
            grad_bias = grad_z.sum((0, 2, 3))
        if self.to_input is not None:
            grad_x, grad_depthwise, grad_depthwise_bias = self.to_input(grad_z, tensors)
        grad_residual = grad_z if want_residual else None
        return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_residual
