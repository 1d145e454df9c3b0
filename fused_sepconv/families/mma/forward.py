"""The tensor-core family: the fused forward by mma.sync (csrc/mma/forward.cuh), sm_80 and newer.

float16, bfloat16, and float32 where convolutions may use TF32; NHWC. This module decides how it cuts the output, and
knows what its threads then ask of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from fused_sepconv.families.depthwise.plan import inner_stride
from fused_sepconv.families.mma import cut as mma
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import INT32_MAX, Candidate, Kernels, MmaTiling, Problem

MOST_HALO = 1.3  # bytes of x that may be read for each 128 features, of x's own, where that still fills the device

# `MmaTraits` in csrc/mma/tiles.cuh, `MmaForwardTraits` in csrc/mma/forward.cuh.
CELLS = 16  # of a tile
CELL_COLUMNS = 4
STAGES = (4, 3, 2)  # the most that fit


@dataclass(frozen=True)
class Shape:
    """The size of a tile of the output, at most."""

    pixels: int
    features: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.features}"

    @property
    def cell_rows(self) -> int:
        return self.pixels // CELLS // CELL_COLUMNS


WIDE, NARROW = Shape(128, 256), Shape(256, 128)
SHAPES = {
    "3x3": (WIDE, NARROW),
    "3x3_stride2": (WIDE, NARROW),
    "5x5": (WIDE,),
    "5x5_stride2": (WIDE,),
    "7x7": (WIDE,),
    "7x7_stride2": (WIDE,),
    "any": (WIDE,),
}
# Bytes of a pixel's channels that are convolved and multiplied at a time. 128 take fewer instructions, but shared
# memory has room for two or three stages of them only where the patch is small.
SLAB_BYTES = {kind: 128 if kind == "3x3" else 64 for kind in SHAPES}

INSTANCES = {
    name: mma.instance(name)
    for kind, shapes in SHAPES.items()
    for shape in shapes
    for operand in mma.OPERANDS.values()
    for name in (f"mma_forward_{kind}_{shape}_{operand}",)
}


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fused forward in the tiling that is predicted to be the fastest; the backward is in backward.py, and NCHW in
    nchw.py."""
    if problem.direction != "forward" or problem.layout != "nhwc":
        return []
    kind, operand = kind_of(problem), mma.OPERANDS.get(problem.dtype, problem.dtype)
    names = {shape: f"mma_forward_{kind}_{shape}_{operand}" for shape in SHAPES[kind]}
    refusal = mma.why_not(problem, names.values(), kernels) or mma.too_large(problem)
    cuts = [] if refusal else [cut for shape in names for cut in _cuts(problem, device, shape) if cut.stages]
    if not cuts:
        return [Candidate("mma", f"mma_forward_{kind}_{operand}", refusal=refusal or mma.no_room(device))]
    lean = [cut for cut in cuts if cut.amplification <= MOST_HALO and cut.tiles >= device.sms]
    cut = mma.among_fast(lean or cuts, lambda cut: cut.requested_bytes)
    name = names[cut.shape]
    if (cut.tiles + device.sms) * (cut.slabs + 1) > INT32_MAX:
        return [Candidate("mma", name, refusal=f"{cut.tiles} tiles of {cut.slabs} slabs: more than 32 bits number")]
    note = f"{cut.feature_tiles} x {cut.shape.features} features, tiles of {cut.rows}x{cut.columns} pixels, "
    tiling = MmaTiling(cut.rows, cut.columns, cut.blocks, cut.stages)
    note += f"halo {cut.halo:.2f}, {cut.stages} stages"
    return [cut.candidate(name, tiling, cut.tiles / device.sms, note)]


def kind_of(problem: Problem) -> str:
    """The kernel sizes and strides that an instance is compiled for; "any" is for the rest."""
    (kh, kw), (sh, sw) = problem.kernel, inner_stride(problem)
    if kh != kw or kh not in (3, 5, 7) or sh != sw or sh > 2:
        return "any"
    return f"{kh}x{kw}" + ("_stride2" if sh == 2 else "")


def _cuts(problem: Problem, device: Device, shape: Shape) -> list[Cut]:
    """Every width of a tile in whole cells, each with a few heights: the tallest that it has cells for, and lower."""
    cuts = {}
    (dh, dw), (sh, sw) = problem.dilation, problem.stride
    inner_h, inner_w = inner_stride(problem)
    height = ceil(problem.out_h / (dh * inner_h // sh) / shape.cell_rows)  # of the longest phase, in cells
    width = ceil(problem.out_w / (dw * inner_w // sw) / CELL_COLUMNS)
    for columns in range(1, min(CELLS, width) + 1):
        tallest = min(height, CELLS // columns)
        for limit in {tallest, -(-tallest // 2), -(-tallest // 4), 1}:
            rows = ceil(height / ceil(height / limit))
            cuts[rows, columns] = Cut(problem, device, shape, rows * shape.cell_rows, columns * CELL_COLUMNS)
    return list(cuts.values())


@dataclass(frozen=True)
class Cut(mma.Cut):
    """A problem as tiles of rows x columns output pixels (of a phase) cut it."""

    shape: Shape
    rows: int
    columns: int

    @property
    def feature_tiles(self) -> int:
        return ceil(self.problem.F / self.shape.features)

    @property
    def slab_bytes(self) -> int:
        """Bytes of a pixel's slab of channels."""
        return SLAB_BYTES[kind_of(self.problem)]

    @property
    def chunks(self) -> int:
        """The same in 16 bytes."""
        return self.slab_bytes // 16

    @property
    def slab(self) -> int:
        """Channels."""
        return self.slab_bytes // self.problem.element_bytes

    @property
    def slabs(self) -> int:
        return ceil(self.problem.K / self.slab)

    def _across(self, axis: int) -> int:
        """Tiles of a phase; an axis is 0 down, 1 across."""
        outputs = (self.problem.out_h, self.problem.out_w)[axis]
        return ceil(ceil(outputs / self.phases(axis)) / (self.rows, self.columns)[axis])

    def _patch(self, axis: int) -> int:
        """Input rows or columns of a tile."""
        return ((self.rows, self.columns)[axis] - 1) * inner_stride(self.problem)[axis] + self.problem.kernel[axis]

    @property
    def pixel_tiles(self) -> int:
        tiles = [self.phases(axis) * self._across(axis) for axis in (0, 1)]
        return self.problem.N * tiles[0] * tiles[1]

    @property
    def tiles(self) -> int:
        return self.pixel_tiles * self.feature_tiles

    @property
    def blocks(self) -> int:
        return min(self.tiles, self.device.sms)

    @cached_property
    def _patch_pixels(self) -> int:
        """Pixels that a patch takes: rows of an even number of pixels, and as many pixels as all threads copy."""
        at_once = mma.THREADS // self.chunks
        return ceil(self._patch(0) * ceil(self._patch(1) / 2) * 2 / at_once) * at_once

    @property
    def shared_bytes(self) -> int:
        return self._shared_bytes(self.stages)

    def _shared_bytes(self, stages: int) -> int:
        """`MmaForwardLayout`: the places of the patch's pixels, two tiles of operand A, and the stages."""
        operands = 2 * self.shape.pixels * self.slab_bytes
        slab = (self._patch_pixels + self.problem.taps + 1) * self.slab_bytes
        stage = self.shape.features * self.slab_bytes + mma.aligned(slab)
        return mma.aligned(self._patch_pixels * 4) + operands + stages * stage

    @cached_property
    def stages(self) -> int:
        """Stages of the ring in shared memory; 0 where it does not fit."""
        return next((n for n in STAGES if self._shared_bytes(n) <= self.device.shared_bytes), 0)

    @cached_property
    def _pixels_read(self) -> int:
        """Pixels of an image that all tiles read, those that they share once for each."""
        firsts = [range(0, self._across(axis) * size, size) for axis, size in ((0, self.rows), (1, self.columns))]
        return self.lines_read(0, firsts[0], self._patch(0)) * self.lines_read(1, firsts[1], self._patch(1))

    @cached_property
    def halo(self) -> float:
        """Pixels that all tiles read, of x's own."""
        return self._pixels_read / (self.problem.H * self.problem.W)

    @property
    def amplification(self) -> float:
        """Bytes of x that are read, of x's own, for each 128 features."""
        return self.halo * self.feature_tiles / ceil(self.problem.F / 128)

    @property
    def _bytes_of_pixel(self) -> int:
        """Bytes that all slabs read of a pixel of x: with a depth multiplier, some chunks more than once."""
        vector = self.slab // self.chunks
        firsts = (slab * self.slab // self.problem.multiplier // vector * vector for slab in range(self.slabs))
        return sum(16 * min(self.chunks, (self.problem.C - first) // vector) for first in firsts)

    @property
    def requested_bytes(self) -> int:
        """Bytes that the threads ask of memory, biases left out; halos and later slabs of features come from L2."""
        p = self.problem
        x = p.N * self._pixels_read * self.feature_tiles * self._bytes_of_pixel
        weights = self.pixel_tiles * p.bytes_of(p.F * p.K) + self.tiles * p.bytes_of(p.K * p.taps)
        return x + weights + p.y_bytes * (2 if p.residual else 1)

    @property
    def device_bytes(self) -> int:
        return self.problem.least_bytes

    @property
    def flops(self) -> int:
        """Flop of whole tiles: the depthwise part is done again for each tile along F."""
        shape = self.shape
        return 2 * self.tiles * self.slabs * self.slab * shape.pixels * (self.problem.taps + shape.features)

    @property
    def busiest_sm(self) -> float:
        """Seconds; the last wave of tiles takes an SM as long as a full one."""
        values = ceil(self.tiles / self.device.sms) * self.slabs * self.slab * self.shape.pixels
        return self.sm_seconds(values * self.shape.features, values * self.problem.taps)
