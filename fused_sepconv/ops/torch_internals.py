"""Names of PyTorch's that are not public, each with what happens where it is missing. Imported here alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import _disable_current_modes

try:
    # How `torch.autograd.Function.apply` and its functorch rule work inside, as they have since 2.0. Without them the
    # operators have no derivatives, so the import fails.
    from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
    from torch._C import _AutoDispatchBelowAutograd as AutoDispatchBelowAutograd
    from torch._functorch.utils import enable_single_level_autograd_function as single_level_autograd_function
    from torch._VF import _unpack_dual
    from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_mode_enabled
    from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
except ImportError as error:
    raise ImportError(
        f"fused_sepconv uses names inside PyTorch that this one, {torch.__version__}, does not have: {error}. "
        "It is tested with PyTorch 2.7 to 2.14"
    ) from error

__all__ = [
    "AutoDispatchBelowAutograd",
    "SingleLevelFunction",
    "are_functorch_transforms_active",
    "below_subclasses",
    "decompositions",
    "expected_size",
    "has_global_hooks",
    "has_tangent",
    "in_forward_mode",
    "is_plain_state",
    "may_skip_dispatcher",
    "set_forward_mode_enabled",
    "single_level_autograd_function",
    "without_modes",
]

_C = torch._C
_NAMES = (
    "_dispatch_tls_local_exclude_set",
    "_dispatch_tls_local_include_set",
    "_get_tracing_state",
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
)
_complete = all(hasattr(_C, name) for name in _NAMES) and hasattr(forward_ad, "_current_level")
"""False where a name is missing: every call goes through the dispatcher then, as right, and slower."""

included_keys = getattr(_C, "_dispatch_tls_local_include_set", None)
excluded_keys = getattr(_C, "_dispatch_tls_local_exclude_set", None)
"""The keys that this thread adds and leaves out: modes, transforms, tracers and autocast change them. Read with
`raw_repr()`."""
_function_modes = getattr(_C, "_len_torch_function_stack", None)


def may_skip_dispatcher() -> bool:
    """Whether nobody wants to see the operator itself: no compiler, function mode, profiler or forward-mode derivative.

    The rest is in the dispatch keys of the thread and the tensors.
    """
    return (
        not torch.compiler.is_compiling()
        and _complete
        and forward_ad._current_level < 0  # as `in_forward_mode`, without its call
        and not _function_modes()
        and not _C._autograd._profiler_enabled()
    )


def is_plain_state() -> bool:
    """Whether no dispatch mode, `torch.func` transform or tracer is active."""
    return not (
        _C._len_torch_dispatch_stack() or are_functorch_transforms_active() or _C._get_tracing_state() is not None
    )


def in_forward_mode() -> bool:
    """Whether a forward-mode level was entered in Python."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is dual. Costs a view of it."""
    return _unpack_dual(tensor, level=0).tangent is not None


_KINDS = ("forward", "forward_pre", "backward", "backward_pre")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in _KINDS]  # as in 2.0 to 2.14


def has_global_hooks() -> bool:
    """Whether hooks for all modules are registered."""
    return any(_GLOBAL_HOOKS)


def below_subclasses() -> AbstractContextManager[Any]:
    """A context for kernels: a tensor subclass's own `__torch_function__` and `new_empty` are not asked again."""
    return _C.DisableTorchFunctionSubclass()


def decompositions(mode: proxy_tensor.ProxyTorchDispatchMode) -> Mapping[Any, Any]:
    """The decompositions that a tracer applies: its own since 2.13, before that the one table of all tracers. Where
    neither is there, exporters are given the operators themselves."""
    everybodys = getattr(proxy_tensor, "CURRENT_DECOMPOSITION_TABLE", {})
    return getattr(mode, "decomposition_table", everybodys)


def expected_size(size: int | torch.SymInt) -> int | None:
    """A size, or what a compiler expects of one that may change; None where it expects nothing."""
    return size if isinstance(size, int) else getattr(size.node, "hint", None)


def without_modes() -> AbstractContextManager[Any]:
    """Where tensors are what they say, for nobody else to see."""
    return _disable_current_modes()
