"""The words of planning: what a problem is, and what a candidate for running it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fused_sepconv.planning.devices import Device

ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

INT32_MAX = 2**31 - 1  # the most blocks of a grid, and the largest coordinate of the kernels

# `benchmarks/first_minutes.py --apply` puts what was measured in place of these.
LAUNCH_SECONDS = 3e-6  # assumed, until measured: a kernel's share of launching and draining
LIBRARY_BANDWIDTH = 0.85  # assumed, until measured: what a plain kernel reaches of a copy's bandwidth


TOO_LARGE = "a dimension is too large for 32-bit coordinates"


@dataclass(frozen=True, kw_only=True)
class _Convolution:
    """The fields of both problems. Sizes in elements."""

    direction: str  # "forward" or "backward"
    N: int
    C: int
    H: int
    W: int
    multiplier: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    out_h: int
    out_w: int
    dtype: str
    layout: str  # "nhwc" or "nchw": which dimension of x is the fastest
    pre_activation: str | None = None
    mid_activation: str | None = None  # of a depthwise convolution by itself: its activation
    aligned: bool = True  # x's address and strides allow accesses of 16 bytes along its fastest dimension

    @property
    def K(self) -> int:
        """Channels of the depthwise result."""
        return self.C * self.multiplier

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return self.N * self.out_h * self.out_w

    @property
    def reach(self) -> int:
        """The largest coordinate that a kernel counts with, features left out."""
        top, bottom, left, right = self.padding
        return max(self.H + top + bottom, self.W + left + right, self.K, self.taps)

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    def bytes_of(self, elements: int) -> int:
        return elements * self.element_bytes

    @property
    def x_bytes(self) -> int:
        return self.bytes_of(self.N * self.C * self.H * self.W)

    @property
    def intermediate_bytes(self) -> int:
        """The depthwise result, which a fused kernel never writes."""
        return self.bytes_of(self.pixels * self.K)

    @property
    def depthwise_flops(self) -> int:
        """The taps of a forward; each gradient takes as many."""
        return 2 * self.pixels * self.K * self.taps


@dataclass(frozen=True, kw_only=True)
class Problem(_Convolution):
    """One call in one direction: everything that a choice of kernel may depend on."""

    F: int
    activation: str | None = None
    residual: bool = False
    tf32: bool = False  # float32 convolutions may use TF32
    saved: bool = False  # the depthwise result: a forward gives it besides y, a backward is given it

    @property
    def reach(self) -> int:
        return max(super().reach, self.F)

    @property
    def y_bytes(self) -> int:
        return self.bytes_of(self.pixels * self.F)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_of(self.K * (self.taps + self.F))

    @property
    def pointwise_flops(self) -> int:
        return 2 * self.pixels * self.K * self.F

    @property
    def least_bytes(self) -> int:
        """Bytes that the call must move at the least: each of its tensors once, the depthwise result only where it is
        saved."""
        if self.direction == "forward":
            kept = self.intermediate_bytes if self.saved else 0
            return self.x_bytes + self.weight_bytes + self.y_bytes * (2 if self.residual else 1) + kept
        return 2 * (self.x_bytes + self.weight_bytes) + self.y_bytes

    def floor_seconds(self, device: Device) -> float:
        """Seconds that no kernel can beat: moving, product and taps overlap, and each runs at the device's peak.

        A backward has two products; the taps it has three times, as the depthwise result is computed again. Strict
        float32 has no tensor cores: the product is the CUDA cores' work, like the taps.
        """
        products, sweeps = (1, 1) if self.direction == "forward" else (2, 3)
        product = products * self.pointwise_flops / device.matrix(self.dtype, self.tf32)
        taps = sweeps * self.depthwise_flops / device.fma(self.dtype)
        if self.dtype == "float32" and not self.tf32:
            product += taps
        return max(self.least_bytes / device.bandwidth, product, taps)

    def depthwise(self, direction: str) -> DepthwiseProblem:
        """The depthwise convolution in it, by itself."""
        shared = {field.name: getattr(self, field.name) for field in fields(_Convolution)}
        return DepthwiseProblem(**{**shared, "direction": direction})

    def __str__(self) -> str:
        """Such as "728->728@19 3x3 forward, N 64, bfloat16 nhwc"."""
        return f"{self.C}->{self.F}@{_size_and_kernel(self)}"


@dataclass(frozen=True, kw_only=True)
class DepthwiseProblem(_Convolution):
    """One call of a depthwise convolution by itself, in one direction."""

    normalised: bool = False  # x is scaled and shifted first, a channel (families/depthwise/normalised.py)

    @property
    def y_bytes(self) -> int:
        return self.intermediate_bytes

    @property
    def weight_bytes(self) -> int:
        return self.bytes_of(self.K * self.taps)

    @property
    def flops(self) -> int:
        return self.depthwise_flops

    @property
    def least_bytes(self) -> int:
        if self.direction == "forward":
            return self.x_bytes + self.weight_bytes + self.y_bytes
        return 2 * (self.x_bytes + self.weight_bytes) + self.y_bytes

    def floor_seconds(self, device: Device) -> float:
        sweeps = 1 if self.direction == "forward" else 2
        return max(self.least_bytes / device.bandwidth, sweeps * self.flops / device.fma(self.dtype))

    def __str__(self) -> str:
        channels = f"{self.C}" if self.multiplier == 1 else f"{self.C}x{self.multiplier}"
        return f"depthwise {channels}@{_size_and_kernel(self)}"


def _size_and_kernel(problem: Problem | DepthwiseProblem) -> str:
    size = f"{problem.H}" if problem.H == problem.W else f"{problem.H}x{problem.W}"
    kernel = f"{problem.kernel[0]}x{problem.kernel[1]}"
    return f"{size} {kernel} {problem.direction}, N {problem.N}, {problem.dtype} {problem.layout}"


@dataclass(frozen=True)
class Kernels:
    """The instances of the native module that can run on a device; where none can, why."""

    instances: frozenset[str]
    why_none: str = ""


@dataclass(frozen=True)
class Instance:
    """A kernel of the native module as it is compiled (tests hold this against what the binary says)."""

    name: str
    threads: int  # a block; where the plan chooses, at most
    shared_bytes: int  # dynamic shared memory a block; where the plan chooses, at most
    registers: int  # a thread's, at most: what the launch bounds leave it


@dataclass(frozen=True)
class Splits:
    """A sum over all output pixels, cut into parts that blocks sum side by side."""

    parts: int
    pixels_per_part: int


@dataclass(frozen=True)
class NhwcTiling:
    """How a depthwise kernel cuts a problem: `NhwcTiling` in csrc/params.h, which says what each is."""

    phases_h: int
    phases_w: int
    column_tiles: int
    tile_columns: int
    first_row: int
    first_column: int
    groups: int
    groups_per_part: int
    parts: int
    warps: int
    shared_bytes: int


@dataclass(frozen=True)
class NchwTiling:
    """How a depthwise kernel for NCHW cuts a problem: `NchwTiling` in csrc/params.h, which says what each is."""

    images: int
    rows: int
    bands: int
    first_row: int
    first_column: int
    columns: int
    units_per_part: int
    parts: int
    shared_bytes: int


@dataclass(frozen=True)
class MmaTiling:
    """How a tensor-core kernel cuts the output: `MmaTiling` in csrc/params.h."""

    rows: int
    columns: int
    blocks: int
    stages: int


@dataclass(frozen=True)
class MmaWeightTiling:
    """How the tensor-core gradient of the pointwise weight cuts a problem: `MmaWeightTiling` in csrc/params.h."""

    columns: int
    cells: int
    feature_warps: int
    channel_warps: int
    stages: int
    parts: int


@dataclass(frozen=True)
class MmaInputTiling:
    """How the tensor-core backward towards x cuts the images: `MmaInputTiling` in csrc/params.h."""

    strips: int
    part: int
    parts: int
    stages: int


AnyTiling = NhwcTiling | NchwTiling | MmaTiling | MmaWeightTiling | MmaInputTiling


def slowest(seconds: Mapping[str, float]) -> str:
    """The name of what takes longest, of what goes on side by side."""
    return max(seconds, key=seconds.__getitem__)


def mostly(steps: Iterable[tuple[str, float]]) -> str:
    """The bound that most of the time goes to, of steps that follow one another: (bound, seconds) of each."""
    totals: dict[str, float] = {}
    for bound, seconds in steps:
        totals[bound] = totals.get(bound, 0.0) + seconds
    return slowest(totals)


@dataclass(frozen=True)
class Work:
    """A kernel's share of a candidate: what bounds it, its device memory in bytes, its flop, its predicted seconds."""

    bound: str
    bytes: int = 0
    flops: int = 0
    seconds: float = LAUNCH_SECONDS


def elementwise(device: Device, byte_count: int, bound: str = "elementwise passes") -> Work:
    """A pass of PyTorch's that moves so many bytes, or another kernel as plain."""
    return Work(bound, byte_count, 0, LAUNCH_SECONDS + byte_count / (device.bandwidth * LIBRARY_BANDWIDTH))


def combined(work: Sequence[Work]) -> dict[str, Any]:
    """The fields of the candidate that runs these kernels one after another."""
    return {
        "bytes": sum(kernel.bytes for kernel in work),
        "flops": sum(kernel.flops for kernel in work),
        "predicted_seconds": sum(kernel.seconds for kernel in work),
        "bound": mostly((kernel.bound, kernel.seconds) for kernel in work),
    }


@dataclass(frozen=True)
class Candidate:
    """Something that could run a problem, with what it moves and computes on the plan's device, or why it can't."""

    family: str  # "pytorch" or a family of kernels
    name: str  # the instance, or "pytorch"
    bytes: int = 0  # device memory, read + written
    requested_bytes: int = 0  # what threads ask of memory, where it is known: the rest of it comes from L2
    flops: int = 0
    blocks: int = 0
    waves: float = 0.0  # blocks over those that the device holds at once
    shared_bytes: int = 0
    # Ranks candidates: the sum over its kernels of a launch and of bytes or flop, whichever take longer, at the share
    # of the device's ceiling that kernels of its kind reach. No latency is in it.
    predicted_seconds: float = float("inf")
    bound: str = ""  # what most of that time goes to
    measured_seconds: float | None = None  # on the device
    refusal: str = ""  # why it can't run; empty if it can
    excluded: str = ""  # why "auto" leaves it out on this device: it failed there, or its result was wrong
    depthwise_splits: Splits | None = None  # of a backward: how its two sums over the pixels are cut
    pointwise_splits: Splits | None = None
    tiling: AnyTiling | None = None  # of the depthwise and the tensor-core kernels
    # The kernels that a call runs, where it runs several. Of a depthwise backward: the forward that takes the gradient
    # through the mid-activation first, where its own kernel does not.
    steps: tuple[Candidate, ...] = ()
    pointwise: str = ""  # how PyTorch runs the 1x1, where it does
    recomputes: bool = False  # of a backward: it runs the depthwise forward again, as the result was not saved
    note: str = ""  # what else is worth telling

    @property
    def work(self) -> Work:
        """The whole of it, as a part of another candidate."""
        bound = self.bound if self.steps else f"{self.bound} in {self.name}"
        return Work(bound, self.bytes, self.flops, self.predicted_seconds)
