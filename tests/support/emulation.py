"""The emulated kernels, plain or checked, in place of whatever native module the package has found."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

import fused_sepconv
from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.native import loader, marshalling
from fused_sepconv.ops import launching
from tests.cuda_on_cpu.build import build_native

SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


@functools.cache
def _file(checked: bool) -> str:
    return str(build_native("checked" if checked else "plain"))


def _forget() -> None:
    """What the package remembers of its native module, from the finding of it to the structs that it made."""
    loader._search.cache_clear()
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


@contextmanager
def planned_for(sms: int, widest: bool = False, tile: mma_forward.Shape | None = None) -> Iterator[None]:
    """Within the context CPU tensors are planned for as if on a device of so many SMs: fewer blocks, that do more.

    With `widest`, depthwise kernels get the widest tiles, and so the most warps, that the plan would compare; with
    `tile`, tensor-core kernels get tiles of that shape where there are such kernels.
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
        yield
