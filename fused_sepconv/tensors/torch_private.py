"""The private names of PyTorch that the operators lean on, and what happens in a PyTorch without them.

Without the first five, which are how PyTorch's own `torch.autograd.Function.apply` and its functorch rule work and have
stood since 2.0, the operators' derivatives can't be had: the import fails and says which name is missing. Without
`_addmm_activation` a product and its relu are two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
    from torch._C import _AutoDispatchBelowAutograd as AutoDispatchBelowAutograd
    from torch._functorch.utils import enable_single_level_autograd_function as single_level_autograd_function
    from torch._VF import _unpack_dual
    from torch.autograd.forward_ad import _current_level  # noqa: F401 - it changes: in_forward_mode reads the module
    from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_mode_enabled
except ImportError as error:
    raise ImportError(
        f"fused_sepconv uses names inside PyTorch that this one, {torch.__version__}, does not have: {error}. "
        "It is tested with PyTorch 2.6 to 2.14"
    ) from error

__all__ = [
    "AutoDispatchBelowAutograd",
    "addmm_relu",
    "are_functorch_transforms_active",
    "has_tangent",
    "in_forward_mode",
    "set_forward_mode_enabled",
    "single_level_autograd_function",
]


def in_forward_mode() -> bool:
    """Whether a forward-mode level was entered in Python."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is dual. Costs a view of it."""
    return _unpack_dual(tensor, level=0).tangent is not None


def addmm_relu(bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """relu(bias + rows @ columns), the relu in the product's epilogue where PyTorch offers that."""
    fused = getattr(torch, "_addmm_activation", None)
    return torch.addmm(bias, rows, columns).relu_() if fused is None else fused(bias, rows, columns)
