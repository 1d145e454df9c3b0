"""The gradient of the pointwise weight on the tensor cores (csrc/mma/backward_pointwise_weight.cuh).

float16, bfloat16, and float32 where convolutions may use TF32; NHWC, sm_80 and newer. This module decides how it cuts
the output and the weight, and knows what its threads then ask of memory. backward.py makes a backward of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from math import ceil

from fused_sepconv.families.depthwise.plan import inner_stride
from fused_sepconv.families.mma import cut as mma
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import INT32_MAX, Candidate, Kernels, MmaWeightTiling, Problem, elementwise

# `MmaWeightTraits` in csrc/mma/weight_tiles.cuh.
RUN = 4  # neighbouring output pixels of a row: the columns of a cell
WARP_TILE = 64  # features and channels of a warp
LINE_BYTES = 128  # of a pixel in a slab
CHUNKS = LINE_BYTES // 16
RUNS = (8, 16, 32)  # rows of all cells of a tile
MOST_STAGES = 4
MOST_FEATURE_WARPS = 4
_ITEM_BYTES, _ITEMS = 24, 8

MOST_WAVES = 4  # of blocks, that are compared

CELL_ROWS = {"3x3": 4, "3x3_stride2": 2, "any": 2}

INSTANCES = {
    name: mma.instance(name)
    for kind in CELL_ROWS
    for operand in mma.OPERANDS.values()
    for name in (f"mma_backward_pointwise_weight_{kind}_{operand}",)
}


def best(problem: Problem, device: Device, kernels: Kernels) -> Candidate:
    """The step in the cut that is predicted to be the fastest, its ordered reduction included; or why it can't run."""
    operand = mma.OPERANDS.get(problem.dtype, problem.dtype)
    name = f"mma_backward_pointwise_weight_{_kind(problem)}_{operand}"
    refusal = mma.why_not(problem, [name, f"reduce_splits_{problem.dtype}"], kernels) or mma.too_large(problem)
    if problem.bytes_of(problem.F * problem.out_h * problem.out_w) > 8 * INT32_MAX:
        refusal = refusal or "an image of y is too large for 32-bit places"
    fitting = [] if refusal else list(_cuts(problem, device))
    cuts = [cut for cut in fitting if cut.pixel_tiles <= INT32_MAX // 2]
    if not cuts:
        refusal = refusal or ("more tiles of pixels than 32 bits number" if fitting else mma.no_room(device))
        return Candidate("mma", name, refusal=refusal)
    cut = mma.among_fast(cuts, lambda cut: cut.requested_bytes)
    parts = max(cut.parts, 1)
    tiling = MmaWeightTiling(cut.columns, cut.cells, cut.feature_warps, cut.channel_warps, cut.stages, parts)
    note = f"{cut.feature_tiles} x {cut.channel_tiles} tiles of {cut.features} x {cut.channels}, {cut.parts} parts of "
    note += f"{ceil(cut.pixel_tiles / parts)} tiles of {cut.pixels} pixels, strips of {cut.columns} columns, "
    return cut.candidate(name, tiling, cut.blocks / device.sms, f"{note}{cut.stages} stages")


def _kind(problem: Problem) -> str:
    """The kernel sizes and strides that an instance is compiled for; "any" is for the rest."""
    strides = inner_stride(problem)
    if problem.kernel != (3, 3) or problem.multiplier != 1 or strides not in ((1, 1), (2, 2)):
        return "any"
    return "3x3" if strides == (1, 1) else "3x3_stride2"


def _cuts(problem: Problem, device: Device) -> Iterator[Cut]:
    """Every even division of a phase's width into strips, with a few blocks, and as many stages as fit."""
    width = ceil(problem.out_w / mma.Cut(problem, device).phases(1))
    across = max(1, ceil(width / RUN))
    strips = {ceil(across / count) for count in range(1, across + 1)}
    cell_rows = CELL_ROWS[_kind(problem)]
    depth = 16 if problem.element_bytes == 2 else 8
    for runs, feature_warps in product(RUNS, _warps(problem.F, MOST_FEATURE_WARPS)):
        for channel_warps in _warps(problem.K, mma.WARPS // feature_warps):
            if mma.WARPS // (feature_warps * channel_warps) > runs * RUN // depth:
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


@dataclass(frozen=True)
class Cut(mma.Cut):
    """A problem as strips, tiles of runs, and blocks of warps cut it."""

    columns: int
    cells: int
    feature_warps: int
    channel_warps: int
    stages: int

    @property
    def features(self) -> int:
        """Features of a block."""
        return WARP_TILE * self.feature_warps

    @property
    def channels(self) -> int:
        """Channels of a block."""
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
        """Pixels of a tile."""
        return self.cells * self.cell_rows * RUN

    @property
    def _vector(self) -> int:
        return 16 // self.problem.element_bytes

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
        return ceil((self.problem.out_h, self.problem.out_w)[axis] / self.phases(axis))

    @property
    def _down(self) -> int:
        return ceil(self._rows_of_cells * self._across / self.cells)

    @property
    def _strips(self) -> int:
        return ceil(self._longest(1) / self.columns)

    @cached_property
    def pixel_tiles(self) -> int:
        p = self.problem
        return p.N * self.phases(0) * self.phases(1) * self._strips * self._down

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
        if (side_by_side := self.feature_warps * self.channel_warps) < mma.WARPS:
            sums = side_by_side * WARP_TILE * WARP_TILE * 4
        return max(mma.aligned(resident) + intermediate + self.stages * stage, sums)

    @cached_property
    def parts(self) -> int:
        """Parts of the sum over the pixels: whole waves of blocks, as many as are the fastest with what they write."""
        if not self.pixel_tiles:
            return 0
        counts = {
            min(max(1, waves * self.device.sms // self.weight_tiles), self.pixel_tiles)
            for waves in range(1, MOST_WAVES + 1)
        }
        return min(sorted(counts), key=lambda parts: self._work(parts) + self._reduction(parts))

    @cached_property
    def _pixels_read(self) -> int:
        """Pixels of an image that the tiles of all phases read, those that they share once for each."""
        rows = [tile * self.cells // self._across * self.cell_rows for tile in range(self._down)]
        columns = range(0, self._strips * self.columns, self.columns)
        return self.lines_read(0, rows, self._patch[0]) * self.lines_read(1, columns, self._patch[1])

    @property
    def _bytes_of_pixel(self) -> int:
        """Bytes of a pixel of x that the blocks of a part and a tile of features read: some twice, by a multiplier."""
        p = self.problem
        starts = range(0, self.channel_tiles * self.channels, self._slab)
        firsts = (start // p.multiplier // self._vector * self._vector for start in starts)
        return sum(16 * min(CHUNKS, max(0, p.C - first) // self._vector) for first in firsts)

    @cached_property
    def requested_bytes(self) -> int:
        """Bytes that the threads ask of memory, biases and the reduction left out: halos, and what other blocks of a
        part have read, come from L2."""
        p = self.problem
        x = p.N * self._pixels_read * self._bytes_of_pixel * self.feature_tiles
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
        """Flop of whole tiles: the depthwise part is done again for each tile of features."""
        taps = self.problem.taps
        return 2 * self.weight_tiles * self.pixel_tiles * self.pixels * self.channels * (self.features + taps)

    @property
    def moved_bytes(self) -> int:
        return self.problem.x_bytes + self.problem.y_bytes + self._partial_bytes(self.parts)

    @property
    def blocks(self) -> int:
        return self.weight_tiles * self.parts

    @property
    def busiest_sm(self) -> float:
        return self._work(self.parts)

    @property
    def after(self) -> float:
        return self._reduction(self.parts)

    def _reduction(self, parts: int) -> float:
        """Seconds of the ordered sum over the parts."""
        p = self.problem
        return elementwise(self.device, self._partial_bytes(parts) + p.bytes_of(p.F * p.K)).seconds

    def _work(self, parts: int) -> float:
        """Seconds of the busiest SM: the last wave of blocks takes as long as a full one."""
        tiles = ceil(self.weight_tiles * parts / self.device.sms) * ceil(self.pixel_tiles / max(parts, 1))
        values = tiles * self.pixels * self.channels
        return self.sm_seconds(values * self.features, values * self.problem.taps)
