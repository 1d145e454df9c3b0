"""Whether a separable convolution's forward saves the depthwise result for its backward.

Where PyTorch's own convolutions or our depthwise kernel run, that result is in memory anyway; a backward without it
would run the depthwise forward again. What is saved is v, or t where the mid-activation's derivative needs t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_sepconv.ops import launching
from fused_sepconv.ops.backend import asks_the_plan
from fused_sepconv.ops.torch_internals import expected_size, without_modes
from fused_sepconv.tensors.activations import ACTIVATIONS

if TYPE_CHECKING:
    from fused_sepconv.ops.operators import Operator


def saves(
    operator: Operator,
    tensors: tuple[Tensor | None, ...],
    arguments: Any,
    backend: str,
    save: bool | None,
    mask: tuple[bool, ...],
) -> bool:
    """Whether a call saves it; `mask` says of each input whether its gradient may be asked for.

    `save` is None for "auto": where the backward would run the depthwise forward again, and saving is faster by the
    plan. True: wherever the depthwise result can be had and the gradients read it.
    """
    if save is False or not operator.saves_intermediate or not _is_read(arguments, mask):
        return False
    if not asks_the_plan(tensors[0], backend):
        return True  # PyTorch's own two convolutions would run the first one again
    described, sizes = as_meta(tensors), [expected(argument) for argument in arguments[:3]]
    if described is None or None in sizes:  # sizes that only a run will know
        return save is True
    problem = operator.problem_of("forward", described, type(arguments)(*sizes, *arguments[3:]))
    return launching.saving_pays(problem, tensors[0].device, backend, forced=save is True)


def _is_read(arguments: Any, mask: tuple[bool, ...]) -> bool:
    """Whether these gradients need the depthwise result."""
    want_x, want_depthwise, want_pointwise, _, want_depthwise_bias, _ = mask
    computes_z = ACTIVATIONS[arguments.activation].from_output is None and any(mask)
    through_mid = arguments.mid_activation is not None and (want_x or want_depthwise or want_depthwise_bias)
    return want_pointwise or computes_z or through_mid


def as_meta(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """Tensors to plan for: those of a call, or, where a compiler traces it, others like them, with the sizes that it
    expects; None where it expects none."""
    if all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return tensors
    found: list[Tensor | None] = []
    with without_modes():
        for tensor in tensors:
            if tensor is None:
                found.append(None)
                continue
            sizes, strides = expected(tensor.shape), expected(tensor.stride())
            if sizes is None or strides is None:
                return None
            found.append(torch.empty_strided(sizes, strides, dtype=tensor.dtype, device="meta"))
    return tuple(found)


def expected(sizes: tuple[int | torch.SymInt, ...]) -> tuple[int, ...] | None:
    """What a compiler expects of sizes; None where it expects nothing of one of them."""
    expected = tuple(expected_size(size) for size in sizes)
    return None if None in expected else expected
