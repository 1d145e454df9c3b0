"""What every launch needs: which kernels can run where, and a call as the native module takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _native, autotune
from .devices import DEVICES, Device, cuda_device
from .memory_format import memory_format_of
from .plan import Plan, plan
from .problem import Candidate, DepthwiseProblem, Kernels, PlaneTiling, Problem, Tiling

Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual."""

_family: str | None = None


@contextmanager
def preferring(family: str | None) -> Iterator[None]:
    """Within the context the backend "fused" runs this family's kernels where they can: for tests and measurements."""
    global _family
    previous, _family = _family, family
    try:
        yield
    finally:
        _family = previous


def choose(
    problem: Problem | DepthwiseProblem,
    device: torch.device,
    backend: str,
    trial: autotune.Trial | None = None,
    arguments: Any = None,
    tensors: tuple[Tensor | None, ...] = (),
) -> Candidate:
    """What runs a problem on a device under a backend.

    `trial(candidate, problem, arguments, tensors)` runs a candidate: with it, autotuning can time what "auto" chooses
    from, on tensors like these.
    """
    planned = plan(problem, *_here(device.type, device.index))
    tuner = autotune.tuner
    if tuner is not None and backend == "auto" and trial is not None and _tunable(planned):
        found = tuner.known(problem, device)
        if found is None:
            with on_device(device):
                found = tuner.decide(planned, device, trial, arguments, tensors)
        return found.chosen
    return planned.choose(backend, _family)


def plan_for(problem: Problem | DepthwiseProblem, device: torch.device) -> Plan:
    """The plan of a problem where its tensors are, with what autotuning has measured of it."""
    planned = plan(problem, *_here(device.type, device.index))
    if autotune.tuner is not None and _tunable(planned):
        with on_device(device):
            return autotune.tuner.recall(planned, device)
    return planned


def _tunable(planned: Plan) -> bool:
    """Whether autotuning knows the device, as the plan does: NVIDIA's GPUs."""
    return bool(planned.device.source)


def _here(device_type: str, index: int | None) -> tuple[Device, Kernels]:
    """A device's ceilings, and the kernels that can run on its tensors."""
    if device_type == "cuda" and torch.version.hip is None:
        index = torch.cuda.current_device() if index is None else index
        return cuda_device(index), _cuda_kernels(index)
    # Its ceilings are not known: an H200's fill the fields, and no source means that they decide and show nothing.
    return replace(DEVICES["H200"], name=f"a {device_type} device", source=""), _kernels_off_cuda(device_type)


_usable: dict[int, Kernels] = {}


def _cuda_kernels(index: int) -> Kernels:
    """The kernels that the driver can run on a device. Asked until it answers: a failure may pass."""
    if index not in _usable:
        native = _native.load()
        if native is None:
            return Kernels(frozenset(), _native.why_missing())
        if native.build_info()["emulated"]:
            return Kernels(frozenset(), "the native module that was loaded is the CPU emulation, for CPU tensors")
        try:
            # Fails where the driver is too old, or the build has no code for this architecture.
            with torch.cuda.device(index):
                _usable[index] = Kernels(frozenset(native.attributes()))
        except RuntimeError as error:
            return Kernels(frozenset(), str(error))
    return _usable[index]


@lru_cache(maxsize=8)
def _kernels_off_cuda(device_type: str) -> Kernels:
    native = _native.load()
    if device_type == "cpu" and native is not None and native.build_info()["emulated"]:
        return Kernels(frozenset(instance["name"] for instance in native.instances()))
    if device_type == "cuda":
        return Kernels(frozenset(), "this PyTorch is built for ROCm; the kernels are for NVIDIA GPUs")
    return Kernels(frozenset(), f"x is on a {device_type} device; the kernels are for CUDA tensors")


def contiguous(*weights: Tensor | None) -> list[Tensor | None]:
    """The weights are small: a view with odd strides is copied rather than strided through."""
    return [None if weight is None else weight.contiguous() for weight in weights]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def image_of(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0, 0, 0)) if tensor is None else (tensor.data_ptr(), tensor.stride())


def stream_of(device: torch.device) -> int:
    """The handle of the stream that PyTorch would use now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """The native module launches on the current device: this makes it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=4096)
def conv_shape(problem: Problem | DepthwiseProblem) -> Any:
    """The problem as `csrc/params.h` has it."""
    native = _native.load()
    shape = native.ConvShape()
    shape.N, shape.C, shape.H, shape.W = problem.N, problem.C, problem.H, problem.W
    shape.K, shape.F, shape.multiplier = problem.K, getattr(problem, "F", 0), problem.multiplier
    shape.out_h, shape.out_w = problem.out_h, problem.out_w
    shape.kernel_h, shape.kernel_w = problem.kernel
    shape.stride_h, shape.stride_w = problem.stride
    shape.pad_top, _, shape.pad_left, _ = problem.padding
    shape.dilation_h, shape.dilation_w = problem.dilation
    for place in ("pre_activation", "mid_activation", "activation"):
        setattr(shape, place, getattr(native.Activation, getattr(problem, place, None) or "none"))
    return shape


@lru_cache(maxsize=4096)
def tilings_of(tiling: Tiling | PlaneTiling | None) -> tuple[Any, Any]:
    """The tiling as `csrc/params.h` has it, for NHWC and for NCHW; all zeros for what the kernel does not take."""
    native = _native.load()
    made = native.DepthwiseTiling(), native.PlaneTiling()
    for kind, native_tiling in zip((Tiling, PlaneTiling), made, strict=True):
        for field in fields(kind):
            setattr(native_tiling, field.name, getattr(tiling, field.name) if isinstance(tiling, kind) else 0)
    return made


def aligned(image: Tensor) -> bool:
    """Whether the fast kernels can read an image 16 bytes at a time: pixels of an NHWC one, or an NCHW one whole.

    Not where one image spans more than 31 bits can number in units of 16 bytes, as a view with gaps may.
    """
    if image.data_ptr() % 16:
        return False
    if memory_format_of(image) != torch.channels_last:
        return image.is_contiguous()
    size = image.element_size()
    steps = {dim: stride * size for dim, stride in enumerate(image.stride()) if dim != 1 and image.shape[dim] > 1}
    reach = sum((image.shape[dim] - 1) * step for dim, step in steps.items() if dim > 1)
    return image.stride(1) == 1 and all(step % 16 == 0 for step in steps.values()) and reach < 16 << 31


def tf32() -> bool:
    """Whether PyTorch's float32 convolutions may use TF32 now."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)  # the new flag, which knows the old one's setting too
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
