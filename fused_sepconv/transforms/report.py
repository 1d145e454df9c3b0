"""What a function that swaps a model's modules did, and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ReplacementReport:
    """`str()` is a readable list."""

    replaced: tuple[str, ...]
    """Names of the modules that are new, or that run what they ran in another way."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of the candidates that were left as they are."""

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)}", *(f"  {name}" for name in self.replaced)]
        lines += [f"left as they are: {len(self.skipped)}", *(f"  {name}: {reason}" for name, reason in self.skipped)]
        return "\n".join(lines)


def check_model(model: Any) -> None:
    """Refuses what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
