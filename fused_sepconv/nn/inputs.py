"""Checks that modules make of their input and of who compiles them, beyond those of the functions."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn


# torch.fx leaves it as one call in what it traces: what it looks at in x, a traced x has not.
@torch.fx.wrap
def check_channels(x: Tensor, channels: int, dims: int = 2) -> Tensor:
    """x, if it is an image (`dims` 2) or a sequence (1) of so many channels; what is neither is refused by the op.

    A function infers the depth multiplier from the weight, so a module of 6 channels would accept 2 or 3.

    Raises:
        ValueError: an x of another number of channels.
    """
    if isinstance(x, Tensor) and not x.is_nested and x.dim() > dims and x.shape[-dims - 1] != channels:
        sizes = ("L",) if dims == 1 else ("H", "W")
        forms = (", ".join(map(str, (*batch, channels, *sizes))) for batch in (("N",), ()))
        raise ValueError(f"x: expected ({') or ('.join(forms)}), got {tuple(x.shape)}")
    return x


def refuse_script(module: nn.Module) -> NoReturn:
    """Raises what `torch.jit.script` is to say of a module of this package."""
    raise RuntimeError(
        f"torch.jit.script cannot compile a {type(module).__name__}: call fused_sepconv.restore_convs(model) first, "
        "which turns a model (or a copy of it) into PyTorch's own convolutions, with the same keys and results"
    )


def padding_sides_of(conv: Any) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that `nn.Conv2d` pads with other than zeros: it is settled at its construction."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return top, bottom, left, right


def parameters_of(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A convolution's weight and bias. `nn.Module`'s own way to them takes five times as long."""
    parameters = conv._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:  # plain attributes, as a replica of `nn.DataParallel` has
        return conv.weight, conv.bias
