"""From a problem to a plan: which kernel runs, why, and what it is expected to cost. Pure: no GPU, no native module.

`plan(problem, device, kernels)` makes a candidate of everything that could run, PyTorch's own two convolutions among
them. A candidate that can't run carries its `refusal`. The fastest predicted one that can is chosen.

Predictions count device bytes, flop, whole waves of blocks and launches. The fractions of a ceiling that a family
reaches are assumptions until rows in benchmarks/results/ replace them; each says so where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from .devices import Device

ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

LAUNCH_SECONDS = 3e-6  # assumed: a kernel's share of launching and draining
LIBRARY_BANDWIDTH = 0.85  # assumed: PyTorch's element-wise kernels, of a copy's bandwidth
# cuDNN's NHWC depthwise kernel has been measured 3.5 to 7 times slower than a plain good one (on a B200; see also
# pytorch/pytorch#18631); PyTorch's native NCHW one is taken to be alike.
LIBRARY_DEPTHWISE_BANDWIDTH = 0.2
LIBRARY_MATRIX = 0.75  # assumed: cuBLAS on these shapes, of its peak
SIMT_FMA = 0.35  # assumed: register tiles of 4 x 4 and taps read through L1, of the FMA peak
SIMT_BLOCKS_PER_SM = 2  # what the launch bounds of the matrix products ask for; the lighter kernels hold more
SPLIT_PIXELS = 256  # fewest output pixels that are worth a part of their own in a split sum

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Problem:
    """One call in one direction: everything that a choice of kernel may depend on. Sizes in elements."""

    direction: str  # "forward" or "backward"
    N: int
    C: int
    H: int
    W: int
    F: int
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
    mid_activation: str | None = None
    activation: str | None = None
    residual: bool = False
    tf32: bool = False  # float32 convolutions may use TF32

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

    def bytes_of(self, elements: int) -> int:
        return elements * ELEMENT_BYTES[self.dtype]

    @property
    def x_bytes(self) -> int:
        return self.bytes_of(self.N * self.C * self.H * self.W)

    @property
    def intermediate_bytes(self) -> int:
        """The depthwise result, which a fused kernel never writes."""
        return self.bytes_of(self.pixels * self.K)

    @property
    def y_bytes(self) -> int:
        return self.bytes_of(self.pixels * self.F)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_of(self.K * (self.taps + self.F))

    @property
    def depthwise_flops(self) -> int:
        return 2 * self.pixels * self.K * self.taps

    @property
    def pointwise_flops(self) -> int:
        return 2 * self.pixels * self.K * self.F

    def __str__(self) -> str:
        """Such as "728->728@19 3x3 forward, N 64, bfloat16 nhwc"."""
        size = f"{self.H}" if self.H == self.W else f"{self.H}x{self.W}"
        kernel = f"{self.kernel[0]}x{self.kernel[1]}"
        return f"{self.C}->{self.F}@{size} {kernel} {self.direction}, N {self.N}, {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Kernels:
    """Which instances of the native module can run on a device; where none can, why."""

    instances: frozenset[str]
    why_none: str = ""


@dataclass(frozen=True)
class Instance:
    """A kernel of the native module as it is compiled (a test holds this against what the module says)."""

    name: str
    threads: int  # a block
    shared_bytes: int  # dynamic shared memory a block


# The SIMT family's block, `SimtTraits` in csrc/kernels/simt_product.cuh: a tile of 64 x 64, computed in slabs of 16.
SIMT_TILE = 64
SIMT_DEPTH = 16
SIMT_THREADS = 256
_PLACE_BYTES = 16  # struct Place: where an output pixel lies


def _simt_instances() -> list[Instance]:
    instances = []
    for dtype in ELEMENT_BYTES:
        compute_bytes = 8 if dtype == "float64" else 4
        slab = SIMT_DEPTH * 2 * (SIMT_TILE + 4) * compute_bytes
        for layout in ("nhwc", "nchw"):
            shared = {
                "simt_forward": slab + SIMT_TILE * _PLACE_BYTES,
                "simt_backward_intermediate": slab + SIMT_TILE * _PLACE_BYTES,
                "simt_backward_input": 0,
                "simt_backward_depthwise_weight": SIMT_THREADS * compute_bytes,
                "simt_backward_pointwise_weight": slab + SIMT_DEPTH * _PLACE_BYTES,
            }
            instances += [Instance(f"{name}_{dtype}_{layout}", SIMT_THREADS, size) for name, size in shared.items()]
        instances.append(Instance(f"reduce_splits_{dtype}", SIMT_THREADS, 0))
    return instances


INSTANCES = {instance.name: instance for instance in _simt_instances()}


@dataclass(frozen=True)
class Splits:
    """A sum over all output pixels, cut into parts that blocks sum side by side."""

    parts: int
    pixels_per_part: int


@dataclass(frozen=True)
class Candidate:
    """Something that could run a problem, with its predicted cost on the plan's device, or why it can't."""

    family: str  # "reference" or a family of kernels
    name: str  # the instance, or "reference"
    bytes: int = 0  # device memory, read + written
    flops: int = 0
    blocks: int = 0
    waves: float = 0.0  # blocks over those that the device holds at once
    shared_bytes: int = 0
    predicted_seconds: float = float("inf")
    refusal: str = ""  # why it can't run; empty if it can
    depthwise_splits: Splits | None = None  # of a backward: how its two sums over the pixels are cut
    pointwise_splits: Splits | None = None


@dataclass(frozen=True)
class Plan:
    """All candidates of a problem on a device, the fastest predicted first, those that can't run last.

    Where nothing is known of the device's speed, PyTorch's own convolutions come first: a well-kept library.
    """

    problem: Problem
    device: Device
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """What "auto" runs."""
        return self.candidates[0]

    def choose(self, backend: str) -> Candidate:
        """What a backend runs; under "fused" a RuntimeError with the reasons where no kernel can."""
        if backend == "auto":
            return self.chosen
        for candidate in self.candidates:
            if (candidate.family == "reference") == (backend == "reference") and not candidate.refusal:
                return candidate
        reasons = "; ".join(dict.fromkeys(c.refusal for c in self.candidates if c.refusal))
        raise RuntimeError(f'use_backend("fused"): no kernel serves {self.problem}: {reasons}')

    def __str__(self) -> str:
        lines = [f"{self.problem} on {self.device.name}"]
        for candidate in self.candidates:
            mark = "->" if candidate is self.chosen else "  "
            if not candidate.refusal and not self.device.source:
                lines.append(f"  {mark} {candidate.name}: runs (no figures of this device to predict from)")
            elif candidate.refusal:
                lines.append(f"  {mark} {candidate.name}: can't run: {candidate.refusal}")
            else:
                lines.append(
                    f"  {mark} {candidate.name}: predicted {candidate.predicted_seconds * 1e6:.1f} us, "
                    f"{candidate.bytes / 1e6:.1f} MB, {candidate.flops / 1e9:.2f} Gflop"
                    + (f", {candidate.blocks} blocks in {candidate.waves:.2f} waves" if candidate.blocks else "")
                )
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def plan(problem: Problem, device: Device, kernels: Kernels) -> Plan:
    """The plan of a problem; never empty, as PyTorch's own convolutions serve every legal one."""
    candidates = [_reference(problem, device), *_simt(problem, device, kernels)]
    if device.source:
        candidates.sort(key=lambda candidate: (bool(candidate.refusal), candidate.predicted_seconds))
    return Plan(problem, device, tuple(candidates))


def _reference(problem: Problem, device: Device) -> Candidate:
    """PyTorch's own operators, one kernel each: every tensor goes through device memory between them."""
    x, t, y, weights = problem.x_bytes, problem.intermediate_bytes, problem.y_bytes, problem.weight_bytes
    matrix = device.matrix(problem.dtype, problem.tf32) * LIBRARY_MATRIX
    passes: list[tuple[int, float]] = []  # (bytes, seconds) of each kernel

    def elementwise(byte_count: int) -> None:
        passes.append((byte_count, byte_count / (device.bandwidth * LIBRARY_BANDWIDTH)))

    def depthwise(byte_count: int) -> None:
        passes.append((byte_count, byte_count / (device.bandwidth * LIBRARY_DEPTHWISE_BANDWIDTH)))

    def pointwise(byte_count: int) -> None:
        seconds = max(byte_count / (device.bandwidth * LIBRARY_BANDWIDTH), problem.pointwise_flops / matrix)
        passes.append((byte_count, seconds))

    # The forward, which the backward computes again up to the depthwise result.
    if problem.pre_activation:
        elementwise(2 * x)
    depthwise(x + t)
    if problem.mid_activation:
        elementwise(2 * t)
    flops = problem.depthwise_flops
    if problem.direction == "forward":
        pointwise(t + y + weights)
        flops += problem.pointwise_flops
        if problem.residual:
            elementwise(3 * y)
        if problem.activation:
            elementwise(2 * y)
    else:
        if problem.activation:
            elementwise(3 * y)
        pointwise(y + t + weights)  # of the depthwise result
        pointwise(y + t + weights)  # of the pointwise weight
        if problem.mid_activation:
            elementwise(3 * t)
        depthwise(t + x)  # of x
        depthwise(t + x)  # of the depthwise weight
        if problem.pre_activation:
            elementwise(3 * x)
        flops += 2 * problem.pointwise_flops + 2 * problem.depthwise_flops
    return Candidate(
        family="reference",
        name="reference",
        bytes=sum(byte_count for byte_count, _ in passes),
        flops=flops,
        predicted_seconds=sum(seconds + LAUNCH_SECONDS for _, seconds in passes),
    )


def _simt(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The SIMT family: every legal problem in every dtype, on the CUDA cores."""
    forward = problem.direction == "forward"
    name = f"simt_{problem.direction}_{problem.dtype}_{problem.layout}"
    refusal = _simt_refusal(problem, name, device, kernels)
    if refusal:
        return [Candidate("simt", name, refusal=refusal)]
    return [_simt_forward(problem, name, device) if forward else _simt_backward(problem, name, device)]


def _simt_forward(problem: Problem, name: str, device: Device) -> Candidate:
    ((byte_count, blocks, block_flops),) = _simt_steps(problem, device)
    return Candidate(
        family="simt",
        name=name,
        bytes=byte_count,
        flops=blocks * block_flops,
        blocks=blocks,
        waves=blocks / _concurrent(device),
        shared_bytes=INSTANCES[name].shared_bytes,
        predicted_seconds=_simt_seconds(problem, device, byte_count, blocks, block_flops),
    )


def _simt_backward(problem: Problem, name: str, device: Device) -> Candidate:
    """All gradients: the steps of `BackwardParams` in csrc/params.h, one launch each."""
    steps = _simt_steps(problem, device)
    seconds = sum(_simt_seconds(problem, device, *step) for step in steps) + 4 * LAUNCH_SECONDS  # the reductions
    if problem.activation:
        seconds += LAUNCH_SECONDS + 3 * problem.y_bytes / (device.bandwidth * LIBRARY_BANDWIDTH)
    blocks = sum(blocks for _, blocks, _ in steps)
    return Candidate(
        family="simt",
        name=name,
        bytes=sum(byte_count for byte_count, _, _ in steps) + (3 * problem.y_bytes if problem.activation else 0),
        flops=sum(blocks * flops for _, blocks, flops in steps),
        blocks=blocks,
        waves=blocks / _concurrent(device),
        shared_bytes=INSTANCES[f"simt_backward_intermediate_{problem.dtype}_{problem.layout}"].shared_bytes,
        predicted_seconds=seconds,
        depthwise_splits=_splits(problem, device, _depthwise_tiles(problem)),
        pointwise_splits=_splits(problem, device, ceil(problem.K / SIMT_TILE) * ceil(problem.F / SIMT_TILE)),
    )


def _simt_steps(problem: Problem, device: Device) -> list[tuple[int, int, int]]:
    """(device bytes, blocks, flops of a block) of each launch; whole tiles are computed, tails included."""
    x, t, y, weights = problem.x_bytes, problem.intermediate_bytes, problem.y_bytes, problem.weight_bytes
    channel_tiles, feature_tiles = ceil(problem.K / SIMT_TILE), ceil(problem.F / SIMT_TILE)
    pixel_tiles = ceil(problem.pixels / SIMT_TILE)
    if problem.direction == "forward":
        # The depthwise part is done again for every slab of features.
        flops = 2 * SIMT_TILE * problem.K * (SIMT_TILE + problem.taps)
        return [(x + y * (2 if problem.residual else 1) + weights, pixel_tiles * feature_tiles, flops)]

    depthwise = _splits(problem, device, _depthwise_tiles(problem))
    pointwise = _splits(problem, device, channel_tiles * feature_tiles)
    compute_bytes = 8 if problem.dtype == "float64" else 4
    depthwise_partials = 2 * depthwise.parts * problem.K * (problem.taps + 1) * compute_bytes
    pointwise_partials = 2 * pointwise.parts * problem.F * (problem.K + 1) * compute_bytes
    intermediate = (
        y + t + weights + (x if problem.mid_activation else 0),
        pixel_tiles * channel_tiles,
        2 * SIMT_TILE * SIMT_TILE * (problem.F + (problem.taps if problem.mid_activation else 0)),
    )
    input_ = (
        t + x * (2 if problem.pre_activation else 1),
        ceil(problem.N * problem.C * problem.H * problem.W / SIMT_THREADS),
        2 * SIMT_THREADS * problem.taps * problem.multiplier,
    )
    depthwise_weight = (
        t + x + depthwise_partials,
        _depthwise_tiles(problem) * depthwise.parts,
        2 * depthwise.pixels_per_part * _depthwise_channels(problem) * (problem.taps + 1),
    )
    pointwise_weight = (
        y + x + weights + pointwise_partials,
        channel_tiles * feature_tiles * pointwise.parts,
        2 * pointwise.pixels_per_part * SIMT_TILE * (SIMT_TILE + problem.taps),
    )
    return [intermediate, input_, depthwise_weight, pointwise_weight]


def _depthwise_channels(problem: Problem) -> int:
    """Channels of a block of simt_backward_depthwise_weight: `SimtDepthwiseWeightTraits::kChannels`."""
    return 32 if problem.layout == "nhwc" else 4


def _depthwise_tiles(problem: Problem) -> int:
    return ceil(problem.K / _depthwise_channels(problem))


def _concurrent(device: Device) -> int:
    return device.sms * SIMT_BLOCKS_PER_SM


def _simt_seconds(problem: Problem, device: Device, byte_count: int, blocks: int, block_flops: int) -> float:
    """A launch: bytes or arithmetic, whichever takes longer; the last wave of blocks takes as long as a full one."""
    waves = ceil(blocks / _concurrent(device))
    arithmetic = waves * _concurrent(device) * block_flops / (device.fma(problem.dtype) * SIMT_FMA)
    return LAUNCH_SECONDS + max(byte_count / (device.bandwidth * LIBRARY_BANDWIDTH), arithmetic)


def _splits(problem: Problem, device: Device, tiles: int) -> Splits:
    """Enough parts to give every SM its blocks, each of at least SPLIT_PIXELS pixels and none empty."""
    wanted = max(1, min(ceil(_concurrent(device) / tiles), ceil(problem.pixels / SPLIT_PIXELS)))
    pixels_per_part = max(1, ceil(problem.pixels / wanted))
    return Splits(max(1, ceil(problem.pixels / pixels_per_part)), pixels_per_part)


def _simt_refusal(problem: Problem, name: str, device: Device, kernels: Kernels) -> str:
    """Why the family can't run a problem on a device; empty if it can."""
    suffix = f"_{problem.dtype}_{problem.layout}"
    needed = [name]
    if problem.direction == "backward":
        steps = ("intermediate", "input", "depthwise_weight", "pointwise_weight")
        needed = [f"simt_backward_{step}{suffix}" for step in steps] + [f"reduce_splits_{problem.dtype}"]
    missing = [instance for instance in needed if instance not in kernels.instances]
    if missing:
        return kernels.why_none or f"the native module has no instance {missing[0]}"
    shared_bytes = max(INSTANCES[instance].shared_bytes for instance in needed)
    if shared_bytes > device.shared_bytes:
        return f"needs {shared_bytes} bytes of shared memory a block, {device.name} has {device.shared_bytes}"
    top, bottom, left, right = problem.padding
    reach = max(problem.H + top + bottom, problem.W + left + right, problem.K, problem.F, problem.taps)
    if reach > _INT32 // 2:
        return "a dimension is too large for 32-bit coordinates"
    blocks = max(blocks for _, blocks, _ in _simt_steps(problem, device))
    return f"{blocks} blocks are more than a grid holds" if blocks > _INT32 else ""
