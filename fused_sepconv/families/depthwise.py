"""The depthwise kernels by themselves: those at the speed of memory, and the generic ones that serve every problem.

The fast kernels (csrc/kernels/depthwise_*.cuh) take 3x3, 5x5 and 7x7 in NHWC, in float32, float16 and bfloat16. This
module decides how they cut a problem, and knows to the byte what they then read and write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, gcd

from ..devices import Device
from ..problem import (
    ELEMENT_BYTES,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    Candidate,
    DepthwiseProblem,
    Instance,
    Kernels,
    Tiling,
)
from . import planes, simt
from .library import LIBRARY_DEPTHWISE_BANDWIDTH
from .planes import PlaneCut, PlaneTraits

BANDWIDTH_FRACTION = 0.88  # assumed, until measured: of a copy's bandwidth
SM_BANDWIDTH = 1.5  # assumed, until measured: what one SM can draw, of its share of the bandwidth
ISSUE_FRACTION = 0.7  # assumed, until measured: instructions issued, of the peak
BLOCK_SECONDS = 1.5e-6  # assumed, until measured: a block's start and its first rows' latency, which nothing covers
GROUP_SECONDS = 0.8e-6  # assumed, until measured: latency of a group's rows and of its barrier

COLUMNS = 4  # of a thread: kDepthwiseColumns in csrc/kernels/depthwise_strips.cuh
WARP = 32
DTYPES = ("float32", "float16", "bfloat16")
KERNELS = (3, 5, 7)
STRIDES = (1, 2)
LARGEST_SHARED_BYTES = 227 << 10

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Traits:
    """What is fixed when a fast kernel is compiled: `DepthwiseTraits` in csrc/kernels/depthwise_strips.cuh."""

    direction: str
    kernel: int
    stride: int  # after dilation is taken apart
    dtype: str

    @property
    def name(self) -> str:
        return f"depthwise_{self.direction}_nhwc_{self.kernel}x{self.kernel}_s{self.stride}_{self.dtype}"

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    @property
    def rows(self) -> int:
        """A group's: of the output in the forward, of x in the backward."""
        return 4 if self.forward and self.stride == 1 else 2

    @property
    def lane_channels(self) -> int:
        return 1 if self.kernel == 7 and not self.forward else 4 // ELEMENT_BYTES[self.dtype]

    @property
    def chunk(self) -> int:
        return WARP * self.lane_channels

    @property
    def pixel_bytes(self) -> int:
        return self.chunk * ELEMENT_BYTES[self.dtype]

    @property
    def max_warps(self) -> int:
        return 10 if self.forward and self.kernel != 7 else 8

    @property
    def registers(self) -> int:
        return _REGISTERS[self.direction][self.kernel, self.lane_channels]

    # The window: rows or columns of x in the forward, of the output's gradient in the backward.

    def window(self, count: int) -> int:
        """What `count` neighbouring rows or columns need of it."""
        if self.forward:
            return (count - 1) * self.stride + self.kernel
        return (count - 1 + self.kernel - 1) // self.stride + 1

    def window_step(self, count: int) -> int:
        """How far it moves when they move by `count`."""
        return count * self.stride if self.forward else count // self.stride

    def window_start(self, first: int) -> int:
        """Where it begins for those from `first` on, which the stride divides in the backward."""
        return first * self.stride if self.forward else (first - self.kernel + 1) // self.stride

    def shared_bytes(self, warps: int, pre_activation: bool) -> int:
        """Dynamic shared memory of a block: two windows of rows, and a group of outputs on their way out (forward) or
        two of x, raw and active (backward)."""
        columns = warps * COLUMNS
        groups = 1 if self.forward else 4 if pre_activation else 2
        pixels = 2 * self.window(self.rows) * self.window(columns) + groups * self.rows * columns
        return pixels * self.pixel_bytes

    @property
    def instructions(self) -> float:
        """Of a thread a group, about: window reads and conversions, multiply-adds, copies and stores."""
        values = self.rows * COLUMNS * self.lane_channels
        window = self.window(self.rows) * self.window(COLUMNS) * (1 + self.lane_channels)
        multiply_adds = values * self.kernel**2 if self.forward else 2 * values * self.kernel**2 / self.stride**2
        return window + multiply_adds + 4 * values + 60


# A thread's, at most, by kernel size and channels of a lane: what nvcc gave, on the architecture where it is most.
_REGISTERS = {
    "forward": {(3, 1): 96, (3, 2): 96, (5, 1): 96, (5, 2): 168, (7, 1): 128, (7, 2): 208},
    "backward": {(3, 1): 96, (3, 2): 128, (5, 1): 136, (5, 2): 208, (7, 1): 184},
}

ALL_TRAITS = tuple(
    Traits(direction, kernel, stride, dtype)
    for direction in ("forward", "backward")
    for kernel in KERNELS
    for stride in STRIDES
    for dtype in DTYPES
)

PLANE_TRAITS = tuple(PlaneTraits(t.direction, t.kernel, t.stride, t.dtype) for t in ALL_TRAITS)


def _instance(traits: Traits) -> Instance:
    shared_bytes = traits.shared_bytes(traits.max_warps, pre_activation=True)
    return Instance(traits.name, WARP * traits.max_warps, min(shared_bytes, LARGEST_SHARED_BYTES), traits.registers)


INSTANCES = {
    **{traits.name: _instance(traits) for traits in ALL_TRAITS},
    **{t.name: Instance(t.name, planes.THREADS, LARGEST_SHARED_BYTES, t.registers) for t in PLANE_TRAITS},
    **{
        name: Instance(name, simt.THREADS, 0, registers=64)
        for dtype in ELEMENT_BYTES
        for layout in ("nhwc", "nchw")
        for name in (f"simt_depthwise_forward_{dtype}_{layout}",)
    },
}


def candidates(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> list[Candidate]:
    """PyTorch's own, the generic kernels and, each with its reason where it can't, a fast one."""
    return [_reference(problem, device), _generic(problem, device, kernels), _fast(problem, device, kernels)]


def best(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    """The fast kernel where it can run, else the generic one; with a refusal where neither can."""
    fast = _fast(problem, device, kernels)
    return _generic(problem, device, kernels) if fast.refusal else fast


def _reference(problem: DepthwiseProblem, device: Device) -> Candidate:
    """PyTorch's own operators, one kernel each."""
    x, y = problem.x_bytes, problem.y_bytes
    plain = (2 * x if problem.pre_activation else 0) + (2 * y if problem.mid_activation else 0)
    depthwise, flops, launches = x + y + problem.weight_bytes, problem.flops, 1
    if problem.direction == "backward":
        # Of x and of the weight; where there is an activation, its gradient at a forward computed again.
        depthwise *= 3 if problem.mid_activation else 2
        plain += (3 * x if problem.pre_activation else 0) + (3 * y if problem.mid_activation else 0)
        flops *= 3 if problem.mid_activation else 2
        launches = 2
    launches += (problem.pre_activation is not None) + (problem.mid_activation is not None)
    seconds = depthwise / LIBRARY_DEPTHWISE_BANDWIDTH + plain / LIBRARY_BANDWIDTH
    return Candidate(
        family="reference",
        name="reference",
        bytes=depthwise + plain,
        flops=flops,
        predicted_seconds=seconds / device.bandwidth + launches * LAUNCH_SECONDS,
    )


# ---- the generic kernels


def _generic(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    """One thread an element: every kernel size, stride, dtype, layout and alignment."""
    suffix = f"_{problem.dtype}_{problem.layout}"
    forward = f"simt_depthwise_forward{suffix}"
    needed = [forward]
    if problem.direction == "backward":
        needed = [f"simt_backward_input{suffix}", f"simt_backward_depthwise_weight{suffix}"]
        needed += [f"reduce_splits_{problem.dtype}"] + ([forward] if problem.mid_activation else [])
    refusal = ""
    if missing := [name for name in needed if name not in kernels.instances]:
        refusal = kernels.why_none or f"the native module has no instance {missing[0]}"
    elements = max(problem.pixels * problem.K, problem.N * problem.C * problem.H * problem.W)
    if reason := _too_large(problem, ceil(elements / simt.THREADS)):
        refusal = refusal or reason
    if refusal:
        return Candidate("simt", needed[0], refusal=refusal)

    x, y = problem.x_bytes, problem.y_bytes
    steps = [(x + y + problem.weight_bytes, problem.flops)]
    splits = None
    if problem.direction == "backward":
        first = [(x + 2 * y, problem.flops)] if problem.mid_activation else []
        splits = simt.depthwise_splits(problem, device)
        partials = 2 * splits.parts * problem.K * (problem.taps + 1) * 4
        steps = [
            *first,
            (y + x * (2 if problem.pre_activation else 1), problem.flops),
            (x + y + partials, problem.flops),
        ]
    seconds = sum(
        LAUNCH_SECONDS
        + max(
            byte_count / (device.bandwidth * LIBRARY_BANDWIDTH),
            flops / (device.fma(problem.dtype) * GENERIC_FMA_FRACTION),
        )
        for byte_count, flops in steps
    )
    return Candidate(
        family="simt",
        name=needed[0],
        bytes=sum(byte_count for byte_count, _ in steps),
        flops=sum(flops for _, flops in steps),
        blocks=ceil(elements / simt.THREADS),
        waves=ceil(elements / simt.THREADS) / (device.sms * 8),
        predicted_seconds=seconds,
        depthwise_splits=splits,
    )


GENERIC_FMA_FRACTION = 0.05  # assumed, until measured: each multiply-add has its address, bounds and two loads


def _too_large(problem: DepthwiseProblem, blocks: int) -> str:
    top, bottom, left, right = problem.padding
    if max(problem.H + top + bottom, problem.W + left + right, problem.K, problem.taps) > _INT32 // 2:
        return "a dimension is too large for 32-bit coordinates"
    return f"{blocks} blocks are more than a grid holds" if blocks > _INT32 else ""


# ---- the fast kernels


def _fast(problem: DepthwiseProblem, device: Device, kernels: Kernels) -> Candidate:
    key = (problem.direction, problem.kernel[0], inner_stride(problem)[0], problem.dtype)
    traits = Traits(*key) if problem.layout == "nhwc" else PlaneTraits(*key)
    refusal = _fast_refusal(problem, traits, kernels)
    if refusal:
        return Candidate("depthwise", traits.name, refusal=refusal)
    predicted = [_predict(problem, device, cut) for cut in cuts(problem, traits, device)]
    if not predicted:
        refusal = f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"
        return Candidate("depthwise", traits.name, refusal=refusal)
    return min(predicted, key=lambda candidate: candidate.predicted_seconds)


def cuts(problem: DepthwiseProblem, traits: Traits | PlaneTraits, device: Device) -> Iterator[Cut | PlaneCut]:
    """Ways to cut a problem that are worth comparing."""
    if isinstance(traits, PlaneTraits):
        return planes.cuts(problem, traits, device)
    return (Cut(problem, traits, tiling) for tiling in _tilings(problem, traits, device))


def inner_stride(problem: DepthwiseProblem) -> tuple[int, int]:
    """The stride that is left in each phase of a dilated convolution: stride / gcd(stride, dilation)."""
    (sh, sw), (dh, dw) = problem.stride, problem.dilation
    return sh // gcd(sh, dh), sw // gcd(sw, dw)


def _fast_refusal(problem: DepthwiseProblem, traits: Traits | PlaneTraits, kernels: Kernels) -> str:
    """Why the fast kernels can't run a problem; empty if they can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in DTYPES:
        return f"the fast depthwise kernels do not compute in {problem.dtype}"
    kh, kw = problem.kernel
    sh, sw = inner_stride(problem)
    if kh != kw or kh not in KERNELS:
        return f"the fast depthwise kernels are for 3x3, 5x5 and 7x7, not {kh}x{kw}"
    if sh != sw or sh not in STRIDES:
        return f"the fast depthwise kernels are for stride 1 and 2, not {sh}x{sw} (dilation taken apart)"
    if problem.direction == "backward" and (problem.multiplier > 1 or (sh, sw) != problem.stride):
        return (
            "the fast depthwise backward is for a depth multiplier of 1, and strides that share no factor with dilation"
        )
    if problem.layout == "nchw" and problem.dilation != (1, 1):
        return "the fast depthwise kernels for NCHW are for a dilation of 1"
    if problem.layout == "nhwc" and (problem.C * problem.element_bytes % 16 or problem.K * problem.element_bytes % 16):
        return f"pixels of {problem.C} and {problem.K} channels are no multiple of 16 bytes"
    if not problem.aligned:
        return "x is not aligned to 16 bytes, or its channels (NHWC) or planes (NCHW) are not contiguous"
    if traits.name not in kernels.instances:
        return f"the native module has no instance {traits.name}"
    return _too_large(problem, 0)


@dataclass(frozen=True)
class Cut:
    """A problem as a tiling cuts it, and what of it passes through device memory."""

    problem: DepthwiseProblem
    traits: Traits
    tiling: Tiling

    @cached_property
    def chunks(self) -> int:
        return ceil(self.problem.K / self.traits.chunk)

    @property
    def blocks(self) -> int:
        return self.chunks * self.tiling.parts

    @property
    def total_groups(self) -> int:
        t = self.tiling
        return self.problem.N * t.phases_h * t.phases_w * t.column_tiles * t.groups

    @cached_property
    def input_bytes_of_pixel(self) -> int:
        """Of all chunks: what is read of a pixel of x. Whole pieces of 16 bytes, and shared channels once a chunk."""
        problem, chunk, piece = self.problem, self.traits.chunk, 16 // self.problem.element_bytes
        if problem.multiplier == 1:
            return problem.C * problem.element_bytes
        total = 0
        for first in range(0, problem.K, chunk):
            last = min(first + chunk, problem.K) - 1
            begin = first // problem.multiplier // piece * piece
            total += ceil((last // problem.multiplier + 1 - begin) / piece) * 16
        return total

    # What the window reads, of x in the forward, of the output's gradient in the backward. An axis: 0 down, 1 across.

    def _read(self, axis: int, phase: int, first: int, count: int) -> int:
        """How many rows or columns of the image there are among `count` of a window from `first` on."""
        p, t = self.problem, self.tiling
        if self.traits.forward:
            size, before = (p.H, p.W)[axis], p.padding[2 * axis]
            return _inside(p.stride[axis] * phase - before, p.dilation[axis], size, first, count)
        return _inside(phase, (t.phases_h, t.phases_w)[axis], (p.out_h, p.out_w)[axis], first, count)

    @cached_property
    def _columns(self) -> list[int]:
        """What each tile of each phase reads across, strips side by side."""
        t, traits = self.tiling, self.traits
        # The backward's rows in shared memory are as wide as its warps, the forward's as its tile.
        width = traits.window(t.tile_columns)
        return [
            self._read(1, phase, traits.window_start(t.first_column + tile * t.tile_columns), width)
            for phase in range(t.phases_w)
            for tile in range(t.column_tiles)
        ]

    def window_pixels(self) -> int:
        """Pixels that the windows read in all, those that parts and tiles share as often as they are read."""
        t, traits = self.tiling, self.traits
        step, height = traits.window_step(traits.rows), traits.window(traits.rows)
        start = traits.window_start(t.first_row)
        rows = [self._read(0, phase, start, (t.groups - 1) * step + height) for phase in range(t.phases_h)]
        pixels = self.problem.N * sum(self._columns) * sum(rows)
        if height == step:
            return pixels
        for number in range(t.groups_per_part, self.total_groups, t.groups_per_part):
            strip, group = divmod(number, t.groups)
            if group:  # a part begins inside a strip: what its window shares with the part before
                phase = strip // (t.column_tiles * t.phases_w) % t.phases_h
                halo = self._read(0, phase, start + group * step, height - step)
                pixels += halo * self._columns[strip % len(self._columns)]
        return pixels

    def bytes_by_tensor(self) -> dict[str, int]:
        """What passes through device memory, by the names of csrc/params.h. The weights count once a part, as the
        chunks of a part are in flight together."""
        problem, pixels = self.problem, self.window_pixels()
        weights = self.tiling.parts * problem.weight_bytes
        if self.traits.forward:
            return {
                "x": pixels * self.input_bytes_of_pixel,
                "depthwise_weight": weights,
                "y": problem.y_bytes,
            }
        return {
            "x": problem.x_bytes,
            "depthwise_weight": weights,
            "grad_t": pixels * problem.K * problem.element_bytes,
            "grad_x": problem.x_bytes,
            "partial_weight": 2 * self.tiling.parts * problem.K * problem.taps * 4,  # written, and read to be added
        }

    def bytes(self) -> int:
        return sum(self.bytes_by_tensor().values())


def _inside(origin: int, pitch: int, size: int, first: int, count: int) -> int:
    """How many of origin + i * pitch, i in [first, first + count), lie in [0, size)."""
    low = max(first, -(origin // pitch))  # ceil(-origin / pitch)
    high = min(first + count - 1, (size - 1 - origin) // pitch)
    return max(0, high - low + 1)


def _axis(problem: DepthwiseProblem, traits: Traits, axis: int) -> tuple[int, int, int]:
    """(phases, first, count): the rows (axis 0) or columns (1) of each phase that have to be gone through.

    Forward: of the output. Backward: of x, and of where the outputs' gradients are counted for the bias.
    """
    stride, dilation = problem.stride[axis], problem.dilation[axis]
    before, size = problem.padding[2 * axis], (problem.H, problem.W)[axis]
    phases = dilation // gcd(stride, dilation)
    outputs = ceil((problem.out_h, problem.out_w)[axis] / phases)
    if traits.forward:
        return phases, 0, outputs
    owner = (traits.kernel - 1) // 2
    first = min(ceil((before - stride * (phases - 1)) / dilation), owner)
    last = max((size - 1 + before) // dilation, stride * (outputs - 1) + owner)
    first -= first % stride
    return phases, first, last - first + 1


def _tilings(problem: DepthwiseProblem, traits: Traits, device: Device) -> Iterator[Tiling]:
    """Ways to cut a problem that are worth comparing: from wide tiles to narrow ones, from few blocks to many."""
    phases_h, first_row, height = _axis(problem, traits, 0)
    phases_w, first_column, width = _axis(problem, traits, 1)
    chunks = ceil(problem.K / traits.chunk)
    groups = ceil(height / traits.rows)
    seen = set()
    for tiles in range(ceil(width / (COLUMNS * traits.max_warps)), ceil(width / COLUMNS) + 1):
        columns = ceil(width / tiles)
        warps = ceil(columns / COLUMNS)
        if not traits.forward:
            columns = warps * COLUMNS
        shared_bytes = traits.shared_bytes(warps, problem.pre_activation is not None)
        if columns in seen or shared_bytes > device.shared_bytes:
            continue
        seen.add(columns)
        column_tiles = ceil(width / columns)
        concurrent = device.sms * device.blocks_per_sm(WARP * warps, traits.registers, shared_bytes)
        total = problem.N * phases_h * phases_w * column_tiles * groups
        wanted = {ceil(total / max(1, share * concurrent // chunks // 4)) for share in (2, 3, 4, 8)}
        wanted |= {ceil(w / groups) * groups for w in wanted}  # parts that end where strips end read no row twice
        for groups_per_part in sorted({max(1, min(w, total)) for w in wanted}):
            parts = max(1, ceil(total / groups_per_part))
            if chunks * parts > _INT32 or groups_per_part > _INT32:
                continue
            yield Tiling(
                phases_h=phases_h,
                phases_w=phases_w,
                column_tiles=column_tiles,
                tile_columns=columns,
                first_row=first_row,
                first_column=first_column,
                groups=groups,
                groups_per_part=groups_per_part,
                parts=parts,
                warps=warps,
                shared_bytes=shared_bytes,
            )
        if len(seen) == 12:
            return


def _predict(problem: DepthwiseProblem, device: Device, cut: Cut | PlaneCut) -> Candidate:
    """Whichever is slowest: the memory, the fullest SM's share of it or its instructions, or a block by itself, whose
    groups follow one another: other blocks on its SM cover what it waits."""
    traits, tiling = cut.traits, cut.tiling
    if isinstance(cut, PlaneCut):
        threads, steps, total = planes.THREADS, tiling.units_per_part, cut.units
        step_instructions = max(planes.items_of_unit(cut), threads) * traits.instructions
        columns_of_blocks = problem.K
    else:
        threads, steps, total = WARP * tiling.warps, tiling.groups_per_part, cut.total_groups
        step_instructions = threads * traits.instructions
        columns_of_blocks = cut.chunks
    steps = min(steps, max(total, 1))
    byte_count, blocks = cut.bytes(), cut.blocks
    launches = 1 if traits.forward else 3  # the backward's sums over the parts: of the weight, of the bias
    per_sm = device.blocks_per_sm(threads, traits.registers, tiling.shared_bytes)
    blocks_of_fullest = ceil(blocks / device.sms)
    waves = blocks / (device.sms * per_sm)
    issue_rate = device.fma_float32 / 2 / device.sms * ISSUE_FRACTION
    sm_bytes = blocks_of_fullest * steps * byte_count / max(columns_of_blocks * total, 1)
    seconds = max(
        byte_count / (device.bandwidth * BANDWIDTH_FRACTION),
        sm_bytes / (device.bandwidth / device.sms * SM_BANDWIDTH),
        blocks_of_fullest * steps * step_instructions / issue_rate,
        ceil(waves) * steps * (GROUP_SECONDS + step_instructions / issue_rate),
    )
    return Candidate(
        family="depthwise",
        name=traits.name,
        bytes=byte_count,
        flops=problem.flops * (1 if traits.forward else 2),
        blocks=blocks,
        waves=waves,
        shared_bytes=tiling.shared_bytes,
        predicted_seconds=launches * LAUNCH_SECONDS + BLOCK_SECONDS * ceil(waves) + seconds,
        tiling=tiling,
    )
