"""The activations that a separable convolution may carry at its three places, one table.

All of them map 0 to 0: zero padding is the same before and after the pre-activation, and kernels rely on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation: how to apply it and how to differentiate it.

    ``backward(grad, z)`` is ``grad * act'(z)`` as PyTorch's own autograd computes it. ``from_output(grad, y)``, where
    it exists, is the same read from ``y = act(z)``, so that z need not be kept or computed again: for activations of
    straight pieces, whose derivative only asks on which piece z lies. (elu's is y + 1 below 0, but in 16 bits a y near
    -1 keeps so few digits of it that the gradient strayed 13 times as far as PyTorch's.)
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    from_output: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def piecewise_linear(self) -> bool:
        """Whether act'' is 0 wherever it exists: then the second derivative needs no z either."""
        return self.from_output is not None


def _identity(z: Tensor) -> Tensor:
    return z


def _identity_backward(grad: Tensor, z: Tensor) -> Tensor:
    return grad


def _relu_backward(grad: Tensor, z_or_y: Tensor) -> Tensor:
    return _aten.threshold_backward(grad, z_or_y, 0)


def _relu6_backward(grad: Tensor, z_or_y: Tensor) -> Tensor:
    # 0 at both corners, as hardtanh's derivative is in PyTorch; z and y agree on which side of them they are.
    return _aten.hardtanh_backward(grad, z_or_y, 0.0, 6.0)


def _elu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return _aten.elu_backward(grad, 1.0, 1.0, 1.0, False, z)


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() or _are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return _aten.silu_backward(grad, z)
    sigmoid = torch.sigmoid(z)  # aten::silu_backward is not differentiable, and takes 0.3 times as long
    return grad * (sigmoid * (1 + z * (1 - sigmoid)))


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(_identity, _identity_backward, _identity_backward),
    "relu": Activation(F.relu, _relu_backward, _relu_backward),
    "relu6": Activation(F.relu6, _relu6_backward, _relu6_backward),
    "elu": Activation(F.elu, _elu_backward),
    "silu": Activation(F.silu, _silu_backward),
    "hardswish": Activation(F.hardswish, _aten.hardswish_backward),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
}

NAMES = ", ".join(repr(name) for name in ACTIVATIONS)
