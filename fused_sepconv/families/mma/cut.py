"""The part that the plans of all tensor-core kernels have in common: why none can run, and how a cut becomes a
candidate.

A cut says how a kernel divides a problem among blocks. Of those that fit, the plan takes the one with the least to ask
of memory among the fastest. Its prediction is the launch, and beside it the larger of what moves and what the busiest
SM computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from fused_sepconv.families.depthwise.plan import inner_stride
from fused_sepconv.planning.devices import LARGEST_SHARED_BYTES, Device
from fused_sepconv.planning.problem import (
    INT32_MAX,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    TOO_LARGE,
    AnyTiling,
    Candidate,
    Instance,
    Kernels,
    Problem,
    slowest,
)

MATRIX_FRACTION = 0.7  # assumed, until measured: ours, of what mma.sync reaches
AS_FAST = 1.08  # a prediction is no more exact than that

# In csrc/mma: `MmaTraits`, `MmaWeightTraits` and `MmaInputTraits`.
WARPS = 8
THREADS = 32 * WARPS

OPERANDS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "tf32"}
"""The operands of mma.sync by the dtype of the tensors, as instances call them."""


def instance(name: str, registers: int = 255) -> Instance:
    """A tensor-core kernel; the plan decides how much shared memory it has."""
    return Instance(name, THREADS, LARGEST_SHARED_BYTES, registers)


def why_not(problem: Problem, names: Iterable[str], kernels: Kernels) -> str:
    """Why tensor-core kernels can't run a problem; empty if they can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in OPERANDS:
        return f"the tensor-core kernels do not compute in {problem.dtype}"
    if problem.dtype == "float32" and not problem.tf32:
        return "float32 on tensor cores is TF32, which PyTorch's flags for convolutions do not allow"
    for what, channels in (("x", problem.C), ("y", problem.F)):
        if problem.bytes_of(channels) % 16:
            return f"the {channels} channels of {what} are no multiple of 16 bytes"
    if not problem.aligned:
        return "x is not aligned to 16 bytes, or its channels are not contiguous"
    for name in names:
        if name not in kernels.instances:
            return f"the native module has no instance {name}"
    return TOO_LARGE if problem.reach > INT32_MAX // 2 else ""


def too_large(problem: Problem) -> str:
    """Why a kernel that numbers vectors of 16 bytes in 31 bits can't run a problem; empty if it can.

    Half of the numbers are left, as x's pixels may lie apart.
    """
    if problem.bytes_of(max(problem.H * problem.W * problem.C, problem.F * problem.K)) > 8 * INT32_MAX:
        return "an image, or the pointwise weight, is too large for 32-bit offsets"
    return ""


def no_room(device: Device) -> str:
    return f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"


@dataclass(frozen=True)
class Cut:
    """A problem, cut for a device. An axis is 0 down, 1 across."""

    problem: Problem
    device: Device

    def phases(self, axis: int) -> int:
        """Undilated convolutions side by side (csrc/common/phases.cuh)."""
        return self.problem.dilation[axis] * inner_stride(self.problem)[axis] // self.problem.stride[axis]

    def lines_read(self, axis: int, firsts: Iterable[int], count: int) -> int:
        """Rows or columns of an image that tiles read in all phases, those that they share once for each.

        `firsts` are the tiles' first outputs in a phase; each reads `count` rows or columns from there on.
        """
        p = self.problem
        pitch, size, before = p.dilation[axis], (p.H, p.W)[axis], p.padding[2 * axis]
        step = pitch * inner_stride(p)[axis]
        origins = [p.stride[axis] * phase - before for phase in range(self.phases(axis))]
        places = [origin + step * first for first in firsts for origin in origins]
        # How many of place, place + pitch, ... are in 0 to size - 1.
        return sum(max(0, min(count, -((place - size) // pitch)) - max(0, -(place // pitch))) for place in places)

    def sm_seconds(self, matrix: int, taps: int) -> float:
        """Seconds for so many multiply-adds on an SM, of the product and of the taps; they share its schedulers."""
        device = self.device
        matrix_rate = device.matrix_sync(self.problem.dtype) * MATRIX_FRACTION
        return 2 * device.sms * (matrix / matrix_rate + taps / device.fma_float32)

    @property
    def moved_bytes(self) -> int:
        """Device memory beside the arithmetic."""
        return self.device_bytes

    @property
    def times(self) -> dict[str, float]:
        """Seconds of what goes on side by side."""
        moving = self.moved_bytes / (self.device.bandwidth * LIBRARY_BANDWIDTH)
        return {"memory": moving, "the SMs": self.busiest_sm}

    @property
    def after(self) -> float:
        """Seconds of what follows the kernel."""
        return 0.0

    @property
    def seconds(self) -> float:
        return LAUNCH_SECONDS + max(self.times.values()) + self.after

    def candidate(self, name: str, tiling: AnyTiling, waves: float, note: str) -> Candidate:
        return Candidate(
            "mma",
            name,
            bytes=self.device_bytes,
            requested_bytes=self.requested_bytes,
            flops=self.flops,
            blocks=self.blocks,
            waves=waves,
            shared_bytes=self.shared_bytes,
            predicted_seconds=self.seconds,
            bound=slowest(self.times),
            tiling=tiling,
            note=note,
        )


AnyCut = TypeVar("AnyCut", bound=Cut)


def among_fast(cuts: Sequence[AnyCut], what: Callable[[AnyCut], Any]) -> AnyCut:
    """The cut with the least of something, among those that are about as fast as the fastest."""
    fastest = min(cut.seconds for cut in cuts)
    return min((cut for cut in cuts if cut.seconds <= AS_FAST * fastest), key=lambda cut: (what(cut), cut.seconds))


def aligned(value: int) -> int:
    """Whole 128 bytes."""
    return ceil(value / 128) * 128
