"""The emulated kernels, plain or checked, in place of whatever native module the package has found."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.native import loader, marshalling
from fused_sepconv.ops import eager, launching
from fused_sepconv.planning.plan import Plan
from fused_sepconv.planning.problem import Candidate
from tests.cuda_on_cpu.build import build_native

SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


@functools.cache
def _file(checked: bool) -> str:
    return str(build_native("checked" if checked else "plain"))


def _forget() -> None:
    """What the package remembers of its native module, from the finding of it to the structs that it made."""
    loader._search.cache_clear()
    eager.clear()
    launching._kernels_off_cuda.cache_clear()
    marshalling.conv_shape.cache_clear()
    marshalling.tilings_of.cache_clear()


@contextmanager
def emulated_kernels(checked: bool) -> Iterator[ModuleType]:
    """Within the context, CPU tensors run through the emulated device code; gives its module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_SEPCONV_NATIVE", _file(checked))
        _forget()
        try:
            with fused_sepconv.use_backend("fused"):
                yield loader.load()
        finally:
            patch.undo()
            _forget()


def in_every_schedule(native: ModuleType, run: Callable[[], Iterable[Tensor | None]]) -> list[Tensor]:
    """run()'s tensors, whose bits must be the same in every order; where accesses are checked a race shows in any."""
    results = []
    for order, seed in SCHEDULES[:2] if native.is_checked() else SCHEDULES:
        native.set_schedule(order, seed)
        results.append([tensor for tensor in run() if tensor is not None])
    native.set_schedule("forward", 0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


@contextmanager
def planned_for(
    sms: int, widest: bool = False, tile: mma_forward.Shape | None = None, through: str = ""
) -> Iterator[None]:
    """Within the context calls are planned for as if on a device of so many SMs: fewer blocks, that do more.

    With `widest`, depthwise kernels get the widest tiles, and so the most warps, that the plan would compare; with
    `tile`, tensor-core kernels get tiles of that shape where there are such kernels; with `through`, the backend
    "fused" runs a candidate with that kernel among its steps where the preferred family has one.
    """
    here, cuts = launching._here, depthwise.cuts

    def smaller(device_type: str, index: int | None) -> tuple:
        device, kernels = here(device_type, index)
        # Plans are remembered by device.
        return dataclasses.replace(device, sms=sms, name=f"{sms} SMs, {widest=}, {tile=!s}"), kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_here", smaller)
        if widest:
            patch.setattr(depthwise, "cuts", lambda *arguments: itertools.islice(cuts(*arguments), 1))
        if tile is not None:
            shapes = {
                kind: (tile,) if tile in all_shapes else all_shapes for kind, all_shapes in mma_forward.SHAPES.items()
            }
            patch.setattr(mma_forward, "SHAPES", shapes)
        if through:
            patch.setattr(Plan, "choose", functools.partialmethod(_choose_through, Plan.choose, through))
        eager.clear()
        try:
            yield
        finally:
            eager.clear()


def _choose_through(plan: Plan, choose: Callable, kernel: str, backend: str, family: str | None = None) -> Candidate:
    for candidate in plan.candidates:
        runs = not candidate.refusal and candidate.family == family and backend == "fused"
        if runs and kernel in (step.name for step in candidate.steps):
            return candidate
    return choose(plan, backend, family)
