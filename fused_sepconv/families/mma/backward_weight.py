"""The gradient of the pointwise weight on the tensor cores (csrc/mma/backward_pointwise_weight.cuh).

float16, bfloat16, and float32 where convolutions may use TF32; NHWC, sm_80 and newer. This module decides how it cuts
the output and the weight, and knows what its threads then ask of memory. mma_backward.py makes a backward of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from math import ceil

from fused_sepconv.families.depthwise.plan import inner_stride
from fused_sepconv.families.mma.forward import (
    BLOCK_SECONDS,
    ISSUE_FRACTION,
    L2_BANDWIDTH,
    operand_of,
    overlapping,
    why_not,
)
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import (
    ELEMENT_BYTES,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    Candidate,
    Instance,
    Kernels,
    MmaWeightTiling,
    Problem,
    slowest,
)

# `MmaWeightTraits` in csrc/mma/weight_tiles.cuh.
WARPS = 8
THREADS = 32 * WARPS
RUN = 4  # neighbouring output pixels of a row: the columns of a cell
WARP_TILE = 64  # features and channels of a warp
LINE_BYTES = 128  # of a pixel in a slab
CHUNKS = LINE_BYTES // 16
RUNS_AT_ONCE = 4  # that a warp convolves, with the taps in its registers
RUNS = (8, 16, 32)  # rows of all cells of a tile
MOST_STAGES = 4
MOST_FEATURE_WARPS = 4
LARGEST_SHARED_BYTES = 227 << 10
_ITEM_BYTES, _ITEMS = 24, 8

MOST_WAVES = 4  # of blocks, that are compared

CELL_ROWS = {"3x3": 4, "3x3_stride2": 2, "any": 2}

INSTANCES = {
    name: Instance(name, THREADS, LARGEST_SHARED_BYTES, registers=255)
    for name in (
        f"mma_backward_pointwise_weight_{kind}_{operand}"
        for kind in CELL_ROWS
        for operand in ("bfloat16", "float16", "tf32")
    )
}

_INT32 = 2**31 - 1


def best(problem: Problem, device: Device, kernels: Kernels) -> Candidate:
    """The step in the cut that is predicted to be the fastest, its ordered reduction included; or why it can't run."""
    name = f"mma_backward_pointwise_weight_{_kind(problem)}_{operand_of(problem.dtype)}"
    reduction = f"reduce_splits_{problem.dtype}"
    if refusal := why_not(problem, [name, reduction], kernels):
        return Candidate("mma", name, refusal=refusal)
    if problem.bytes_of(problem.F * problem.out_h * problem.out_w) > 8 * _INT32:
        return Candidate("mma", name, refusal="an image of y is too large for 32-bit places")
    cuts = list(_cuts(problem, device))
    if not cuts:
        refusal = f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"
        return Candidate("mma", name, refusal=refusal)
    cuts = [cut for cut in cuts if cut.pixel_tiles <= _INT32 // 2]
    if not cuts:
        return Candidate("mma", name, refusal="more tiles of pixels than 32 bits number")
    cut = min(cuts, key=lambda cut: (cut.seconds, cut.requested_bytes))
    blocks = cut.weight_tiles * cut.parts
    return Candidate(
        family="mma",
        name=name,
        bytes=cut.device_bytes,
        requested_bytes=cut.requested_bytes,
        flops=cut.flops,
        blocks=blocks,
        waves=blocks / device.sms,
        shared_bytes=cut.shared_bytes,
        predicted_seconds=cut.seconds,
        bound=slowest(cut.times),
        tiling=MmaWeightTiling(
            cut.columns, cut.cells, cut.feature_warps, cut.channel_warps, cut.stages, max(cut.parts, 1)
        ),
        note=f"{cut.feature_tiles} x {cut.channel_tiles} tiles of {cut.features} x {cut.channels}, "
        f"{cut.parts} parts of {ceil(cut.pixel_tiles / max(cut.parts, 1))} tiles of {cut.pixels} pixels, "
        f"strips of {cut.columns} columns, {cut.stages} stages",
    )


def _kind(problem: Problem) -> str:
    """The kernel sizes and strides that an instance is compiled for; "any" serves the rest."""
    strides = inner_stride(problem)
    if problem.kernel != (3, 3) or problem.multiplier != 1 or strides not in ((1, 1), (2, 2)):
        return "any"
    return "3x3" if strides == (1, 1) else "3x3_stride2"


def _cuts(problem: Problem, device: Device) -> Iterator[Cut]:
    """Every even division of a phase's width into strips, with a few blocks, and as many stages as fit."""
    width = ceil(problem.out_w / _phases(problem, 1))
    across = max(1, ceil(width / RUN))
    strips = {ceil(across / count) for count in range(1, across + 1)}
    cell_rows = CELL_ROWS[_kind(problem)]
    depth = 16 if ELEMENT_BYTES[problem.dtype] == 2 else 8
    for runs, feature_warps in product(RUNS, _warps(problem.F, MOST_FEATURE_WARPS)):
        for channel_warps in _warps(problem.K, WARPS // feature_warps):
            if WARPS // (feature_warps * channel_warps) > runs * RUN // depth:
                continue  # a warp would have no pixels to multiply
            for cells_across in strips:
                sizes = (cells_across * RUN, runs // cell_rows, feature_warps, channel_warps)
                cuts = (Cut(problem, device, *sizes, stages) for stages in range(MOST_STAGES, 1, -1))
                yield from islice((cut for cut in cuts if cut.shared_bytes <= device.shared_bytes), 1)


def _warps(size: int, most: int) -> list[int]:
    """Warps side by side for a size: as many as it fills, and half of those."""
    warps = 1
    while warps < most and warps * WARP_TILE < size:
        warps *= 2
    return [warps] if warps == 1 else [warps, warps // 2]


def _phases(problem: Problem, axis: int) -> int:
    return problem.dilation[axis] * inner_stride(problem)[axis] // problem.stride[axis]


@dataclass(frozen=True)
class Cut:
    """A problem as strips, tiles of runs, and blocks of warps cut it."""

    problem: Problem
    device: Device
    columns: int
    cells: int
    feature_warps: int
    channel_warps: int
    stages: int

    @property
    def features(self) -> int:
        """Of a block."""
        return WARP_TILE * self.feature_warps

    @property
    def channels(self) -> int:
        """Of a block."""
        return WARP_TILE * self.channel_warps

    @property
    def feature_tiles(self) -> int:
        return ceil(self.problem.F / self.features)

    @property
    def channel_tiles(self) -> int:
        return ceil(self.problem.K / self.channels)

    @property
    def weight_tiles(self) -> int:
        return self.feature_tiles * self.channel_tiles

    @cached_property
    def cell_rows(self) -> int:
        return CELL_ROWS[_kind(self.problem)]

    @property
    def runs(self) -> int:
        """Rows of all cells of a tile."""
        return self.cells * self.cell_rows

    @cached_property
    def pixels(self) -> int:
        """Of a tile."""
        return self.cells * self.cell_rows * RUN

    @property
    def _vector(self) -> int:
        return 16 // ELEMENT_BYTES[self.problem.dtype]

    @property
    def _slab(self) -> int:
        return CHUNKS * self._vector

    @property
    def _slabs(self) -> int:
        return self.channels // self._slab

    @property
    def _across(self) -> int:
        """Cells of a row of a strip."""
        return self.columns // RUN

    @property
    def _rows_of_cells(self) -> int:
        return ceil(self._longest(0) / self.cell_rows)

    def _longest(self, axis: int) -> int:
        """Outputs of the longest phase; an axis is 0 down, 1 across."""
        return ceil((self.problem.out_h, self.problem.out_w)[axis] / _phases(self.problem, axis))

    @property
    def _down(self) -> int:
        return ceil(self._rows_of_cells * self._across / self.cells)

    @property
    def _strips(self) -> int:
        return ceil(self._longest(1) / self.columns)

    @cached_property
    def pixel_tiles(self) -> int:
        p = self.problem
        return p.N * _phases(p, 0) * _phases(p, 1) * self._strips * self._down

    @cached_property
    def _patch(self) -> tuple[int, int]:
        """Input rows and columns of a tile."""
        p, (inner_h, inner_w) = self.problem, inner_stride(self.problem)
        begins = 0 if self.cells % self._across == 0 else self._across - 1
        spanned = min((begins + self.cells - 1) // self._across + 1, self._rows_of_cells)
        return (spanned * self.cell_rows - 1) * inner_h + p.kernel[0], (self.columns - 1) * inner_w + p.kernel[1]

    @cached_property
    def shared_bytes(self) -> int:
        """`MmaWeightLayout`: taps and bias, what is known of tiles, two depthwise results, and the stages."""
        patch = self._patch[0] * self._patch[1]
        resident = (self.problem.taps + 1) * self.channels * 4 + _ITEMS * _ITEM_BYTES
        resident += (2 * patch + 2 * _ITEMS * self.runs) * 4
        intermediate = 2 * self._slabs * self.pixels * LINE_BYTES
        stage = (self._slabs * patch + self.features // self._slab * self.pixels) * LINE_BYTES
        sums = 0
        if (side_by_side := self.feature_warps * self.channel_warps) < WARPS:
            sums = side_by_side * WARP_TILE * WARP_TILE * 4
        return max(ceil(resident / 128) * 128 + intermediate + self.stages * stage, sums)

    @cached_property
    def parts(self) -> int:
        """Of the sum over the pixels: whole waves of blocks, as many as are the fastest with what they write."""
        if not self.pixel_tiles:
            return 0
        counts = {
            min(max(1, waves * self.device.sms // self.weight_tiles), self.pixel_tiles)
            for waves in range(1, MOST_WAVES + 1)
        }
        return min(sorted(counts), key=lambda parts: self._work(parts) + self._reduction(parts))

    def _rows_read(self) -> int:
        """Rows of an image that the tiles of all phases read, those that they share once for each tile."""
        p, (inner_h, _) = self.problem, inner_stride(self.problem)
        pitch, before = p.dilation[0], p.padding[0]
        total = 0
        for phase in range(_phases(p, 0)):
            for tile in range(self._down):
                row = tile * self.cells // self._across * self.cell_rows
                total += _inside(p.stride[0] * phase + pitch * inner_h * row - before, pitch, self._patch[0], p.H)
        return total

    def _columns_read(self) -> int:
        """The same of its columns, by the strips of all phases."""
        p, (_, inner_w) = self.problem, inner_stride(self.problem)
        pitch, before = p.dilation[1], p.padding[2]
        total = 0
        for phase in range(_phases(p, 1)):
            for strip in range(self._strips):
                first = p.stride[1] * phase + pitch * inner_w * strip * self.columns - before
                total += _inside(first, pitch, self._patch[1], p.W)
        return total

    @property
    def _bytes_of_pixel(self) -> int:
        """What the blocks of a part and a tile of features read of a pixel of x: with a multiplier, some twice."""
        p = self.problem
        starts = range(0, self.channel_tiles * self.channels, self._slab)
        firsts = (start // p.multiplier // self._vector * self._vector for start in starts)
        return sum(16 * min(CHUNKS, max(0, p.C - first) // self._vector) for first in firsts)

    @cached_property
    def requested_bytes(self) -> int:
        """What the kernel's threads ask of memory, biases and the reduction left out: halos, and what other blocks of a
        part have read, come from L2."""
        p = self.problem
        x = p.N * self._rows_read() * self._columns_read() * self._bytes_of_pixel * self.feature_tiles
        taps = self.feature_tiles * self.parts * p.bytes_of(p.K * p.taps)
        return x + p.y_bytes * self.channel_tiles + taps + self._partial_bytes(self.parts)

    def _partial_bytes(self, parts: int) -> int:
        return parts * self.problem.F * self.problem.K * 4

    @property
    def device_bytes(self) -> int:
        """With the reduction: each partial sum goes out and comes in again."""
        p = self.problem
        return p.x_bytes + p.y_bytes + p.weight_bytes + 2 * self._partial_bytes(self.parts)

    @property
    def flops(self) -> int:
        """Of whole tiles: the depthwise part is done again for each tile of features."""
        taps = self.problem.taps
        return 2 * self.weight_tiles * self.pixel_tiles * self.pixels * self.channels * (self.features + taps)

    @cached_property
    def seconds(self) -> float:
        """Device memory, L2 or the SMs, whichever takes longest, and then the reduction."""
        return LAUNCH_SECONDS + max(self.times.values()) + self._reduction(self.parts)

    @cached_property
    def times(self) -> dict[str, float]:
        """What goes on side by side, before the reduction."""
        device, p = self.device, self.problem
        memory = p.x_bytes + p.y_bytes + self._partial_bytes(self.parts)
        return {
            "memory": memory / (device.bandwidth * LIBRARY_BANDWIDTH),
            "L2": self.requested_bytes / (device.bandwidth * L2_BANDWIDTH),
            f"the SMs' {self._tile_on_an_sm[0]}": self._work(self.parts),
        }

    def _reduction(self, parts: int) -> float:
        p = self.problem
        moved = self._partial_bytes(parts) + p.bytes_of(p.F * p.K)
        return LAUNCH_SECONDS + moved / (self.device.bandwidth * LIBRARY_BANDWIDTH)

    def _work(self, parts: int) -> float:
        """Of the SM that has most: the last wave of blocks takes as long as a full one."""
        if not parts:
            return 0.0
        waves = ceil(self.weight_tiles * parts / self.device.sms)
        return waves * (BLOCK_SECONDS + ceil(self.pixel_tiles / parts) * self._tile_on_an_sm[1])

    @cached_property
    def _tile_on_an_sm(self) -> tuple[str, float]:
        """What takes longest of a tile of a block, and the seconds of all of it: but for a part they overlap."""
        device, p = self.device, self.problem
        issue = WARPS * self._instructions / 4 / ISSUE_FRACTION / device.clock
        multiply_adds = self.pixels * self.channels * p.taps / device.fma_lanes / device.clock
        matrix = 2 * self.pixels * self.features * self.channels / (device.matrix_sync(p.dtype) / device.sms)
        shared = self._shared_accesses / device.clock
        return overlapping({"instructions": max(issue, multiply_adds), "matrix work": matrix, "shared memory": shared})

    @property
    def _rounds(self) -> int:
        """Times that a warp convolves RUNS_AT_ONCE runs of a tile."""
        return ceil(self._slabs * self.runs // RUNS_AT_ONCE / WARPS)

    @property
    def _steps(self) -> int:
        """Of a warp through the pixels of a tile, of one mma.sync's depth each."""
        depth = 16 if ELEMENT_BYTES[self.problem.dtype] == 2 else 8
        return ceil(self.pixels // depth * self.feature_warps * self.channel_warps / WARPS)

    @cached_property
    def _window(self) -> int:
        """Words that a lane reads of the patch for a cell."""
        (kh, kw), (inner_h, inner_w) = self.problem.kernel, inner_stride(self.problem)
        if _kind(self.problem) == "any":
            return self.cell_rows * RUN * kh * kw
        return ((self.cell_rows - 1) * inner_h + kh) * ((RUN - 1) * inner_w + kw)

    @property
    def _instructions(self) -> float:
        """Of a warp a tile, about: as nvcc compiled 3x3 for sm_90a."""
        p = self.problem
        per_word = 4 // ELEMENT_BYTES[p.dtype]
        unpack = per_word if per_word == 2 else 0
        relu = 1 if p.pre_activation == "relu" else 0
        cell = self._window * (1 + unpack + relu) + self.cell_rows * (RUN * p.taps * per_word + 18) + 25
        if _kind(p) == "any":
            cell += 3 * self._window
        convolve = self._rounds * (RUNS_AT_ONCE // self.cell_rows * cell + p.taps + 30)
        multiply = self._steps * (55 if per_word == 2 else 122) + 15
        patch = self._slabs * (40 + 9 * ceil(self._patch[0] * self._patch[1] * CHUNKS / THREADS))
        grad = 15 + 59 * ceil(self.features // self._slab * self.runs * CHUNKS / THREADS)
        return convolve + multiply + patch + grad + 110

    @property
    def _shared_accesses(self) -> float:
        """Of 128 bytes, one a cycle, by the whole block a tile: of the convolution, of the operands, of the copies."""
        patch = self._slabs * self._patch[0] * self._patch[1]
        convolve = self._slabs * self.cells * (self._window + self.cell_rows * RUN)
        convolve += self._slabs * self.runs // RUNS_AT_ONCE * 2 * (self.problem.taps + 1)
        operands = WARPS * self._steps * 32  # eight loads of 512 bytes
        return convolve + operands + patch + self.features // self._slab * self.pixels


def _inside(first: int, pitch: int, count: int, size: int) -> int:
    """How many of the places first, first + pitch, ... are in 0 to size - 1."""
    begin, end = max(0, -(first // pitch)), min(count, -((first - size) // pitch))
    return max(0, end - begin)
