"""Two modules that must be the same: one forward and backward of each, compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def run(module: nn.Module, x: Tensor, **extra: Tensor) -> dict[str, Tensor | None]:
    """Result and every gradient of one forward and backward, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x, **extra)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype))
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_alike(actual: dict, expected: dict, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            close = {"rtol": tolerance, "atol": tolerance, "msg": lambda m, n=name: f"{n}: {m}"}
            torch.testing.assert_close(actual[name], value, **close)


def assert_twins(ours: nn.Module, theirs: nn.Module, x: Tensor, **extra: Tensor) -> None:
    """In float64, where alike means alike."""
    assert_alike(run(ours, x, **extra), run(theirs, x, **extra))
