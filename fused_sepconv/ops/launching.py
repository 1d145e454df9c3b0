"""Finds which kernels can run where, and what runs a problem there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.native import loader
from fused_sepconv.native.marshalling import on_device
from fused_sepconv.planning import choice
from fused_sepconv.planning import plan as plans
from fused_sepconv.planning.devices import DEVICES, Device, cuda_device
from fused_sepconv.planning.plan import Plan, plan
from fused_sepconv.planning.problem import DepthwiseProblem, Kernels, Problem

_ALL_KERNELS = Kernels(frozenset(plans.INSTANCES))


class _Wish:
    """What the two contexts below ask for."""

    family: str | None = None
    meta: tuple[Device, Kernels] | None = None


wish = _Wish()


@contextmanager
def preferring(family: str | None) -> Iterator[None]:
    """Within the context the backend "fused" runs this family's kernels where they can: for tests and measurements."""
    previous, wish.family = wish.family, family
    try:
        yield
    finally:
        wish.family = previous


@contextmanager
def meta_planned_for(device: str) -> Iterator[None]:
    """Within the context meta tensors are planned for as if they were on this device, where every kernel is: to count
    what a step would move and save there."""
    previous, wish.meta = wish.meta, (DEVICES[device], _ALL_KERNELS)
    try:
        yield
    finally:
        wish.meta = previous


def choose(
    problem: Problem | DepthwiseProblem,
    device: torch.device,
    backend: str,
    trial: choice.Trial | None = None,
    arguments: Any = None,
    tensors: tuple[Tensor | None, ...] = (),
) -> choice.Decision:
    """Chooses what runs a problem on a device under a backend.

    `trial(candidate, problem, arguments, tensors)` runs a candidate: with it, what "auto" chooses from can be measured
    on tensors like these.
    """
    planned = plan(problem, *_here(device.type, device.index))
    if backend == "auto" and trial is not None and planned.device.source:
        return choice.decide(planned, device, trial, arguments, tensors)
    return choice.Decision(planned.choose(backend, wish.family), settled=True)


def saving_pays(problem: Problem, device: torch.device, backend: str, forced: bool = False) -> bool:
    """Whether a call whose forward is `problem` saves the depthwise result: where that is faster by the plan, or with
    `forced` wherever a forward that can runs."""
    here = _here(device.type, device.index)
    if not forced:
        return plans.saving_pays(problem, *here, backend, wish.family)
    return plan(replace(problem, saved=True), *here).runs(backend)


def plan_for(problem: Problem | DepthwiseProblem, device: torch.device) -> Plan:
    """The plan of a problem where its tensors are, with what was measured of it and excluded there."""
    planned = plan(problem, *_here(device.type, device.index))
    if not planned.device.source:
        return planned
    with on_device(device):
        return choice.recall(planned, device)


def device_and_kernels(device: torch.device) -> tuple[Device, Kernels]:
    """A device's ceilings, and the kernels that can run on its tensors."""
    return _here(device.type, device.index)


def _here(device_type: str, index: int | None) -> tuple[Device, Kernels]:
    if device_type == "cuda" and torch.version.hip is None:
        index = torch.cuda.current_device() if index is None else index
        return cuda_device(index), _cuda_kernels(index)
    if device_type == "meta" and wish.meta is not None:
        return wish.meta
    # Its ceilings are not known: an H200's fill the fields, and no source means that they decide and show nothing.
    return replace(DEVICES["H200"], name=f"a {device_type} device", source=""), _kernels_off_cuda(device_type)


def _cuda_kernels(index: int) -> Kernels:
    """The kernels that can run on a device: all of the build, once the device has answered."""
    native = loader.load()
    if native is not None and native.build_info()["emulated"]:
        return Kernels(frozenset(), "the native module that was loaded is the CPU emulation, for CPU tensors")
    with torch.cuda.device(index):
        reason = loader.why_not_on(index)
    return Kernels(frozenset(), reason) if reason else _compiled(native)


@lru_cache(maxsize=1)
def _compiled(native: ModuleType) -> Kernels:
    return Kernels(frozenset(instance["name"] for instance in native.instances()))


@lru_cache(maxsize=8)
def _kernels_off_cuda(device_type: str) -> Kernels:
    native = loader.load()
    if device_type == "cpu" and native is not None and native.build_info()["emulated"]:
        return Kernels(frozenset(instance["name"] for instance in native.instances()))
    if device_type == "cuda":
        return Kernels(frozenset(), "this PyTorch is built for ROCm; the kernels are for NVIDIA GPUs")
    return Kernels(frozenset(), f"x is on a {device_type} device; the kernels are for CUDA tensors")
