"""The tensor-core family: the fused forward by mma.sync (csrc/mma/forward.cuh), sm_80 and newer.

float16, bfloat16, and float32 where convolutions may use TF32; NHWC. This module decides how it cuts the output, and
knows what its threads then ask of memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from fused_sepconv.families.depthwise.plan import inner_stride
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import (
    ELEMENT_BYTES,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    Candidate,
    Instance,
    Kernels,
    MmaTiling,
    Problem,
    slowest,
)

L2_BANDWIDTH = 1.4  # assumed, until measured: what L2 gives, of the device memory's bandwidth
ISSUE_FRACTION = 0.7  # assumed, until measured: instructions issued, of the peak
OVERLAP = 0.75  # assumed, until measured: of the shorter of arithmetic and matrix work, what the longer one hides
MOST_HALO = 1.3  # bytes of x that may be read for each 128 features, of x's own, where that still fills the device
BLOCK_SECONDS = 3e-6  # assumed, until measured: a block's weights and first slabs, which nothing covers

# `MmaTraits` in csrc/mma/tiles.cuh, `MmaForwardTraits` in csrc/mma/forward.cuh.
WARPS = 8
THREADS = 32 * WARPS
CELLS = 16  # of a tile
CELL_COLUMNS = 4
STAGES = (4, 3, 2)  # the most that fit
LARGEST_SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class Shape:
    """What a tile of the output has at most."""

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
# Of a pixel's channels that are convolved and multiplied at a time. 128 take fewer instructions, but shared memory has
# room for two or three stages of them only where the patch is small.
SLAB_BYTES = {kind: 128 if kind == "3x3" else 64 for kind in SHAPES}

_OPERANDS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "tf32"}

INSTANCES = {
    name: Instance(name, THREADS, LARGEST_SHARED_BYTES, registers=255)
    for name in (
        f"mma_forward_{kind}_{shape}_{operand}"
        for kind, shapes in SHAPES.items()
        for shape in shapes
        for operand in _OPERANDS.values()
    )
}

_INT32 = 2**31 - 1


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fused forward in the tiling that is predicted to be the fastest; the backward is mma_backward.py's, and
    NCHW mma_nchw.py's."""
    if problem.direction != "forward" or problem.layout != "nhwc":
        return []
    kind, operand = kind_of(problem), operand_of(problem.dtype)
    names = {shape: f"mma_forward_{kind}_{shape}_{operand}" for shape in SHAPES[kind]}
    if refusal := why_not(problem, names.values(), kernels):
        return [Candidate("mma", f"mma_forward_{kind}_{operand}", refusal=refusal)]
    cuts = [cut for shape in names for cut in _cuts(problem, device, shape) if cut.stages]
    if not cuts:
        refusal = f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"
        return [Candidate("mma", f"mma_forward_{kind}_{operand}", refusal=refusal)]
    lean = [cut for cut in cuts if cut.amplification <= MOST_HALO and cut.tiles >= device.sms]
    cut = min(lean or cuts, key=lambda cut: (cut.seconds, cut.requested_bytes))
    name = names[cut.shape]
    if (cut.tiles + device.sms) * (cut.slabs + 1) > _INT32:
        return [Candidate("mma", name, refusal=f"{cut.tiles} tiles of {cut.slabs} slabs: more than 32 bits number")]
    return [
        Candidate(
            family="mma",
            name=name,
            bytes=cut.device_bytes,
            requested_bytes=cut.requested_bytes,
            flops=cut.flops,
            blocks=cut.blocks,
            waves=cut.tiles / device.sms,
            shared_bytes=cut.shared_bytes(cut.stages),
            predicted_seconds=cut.seconds,
            bound=slowest(cut.times),
            tiling=MmaTiling(cut.rows, cut.columns, cut.blocks, cut.stages),
            note=f"{cut.feature_tiles} x {cut.shape.features} features, "
            f"tiles of {cut.rows}x{cut.columns} pixels, halo {cut.halo:.2f}, {cut.stages} stages",
        )
    ]


def kind_of(problem: Problem) -> str:
    """The kernel sizes and strides that an instance is compiled for; "any" serves the rest."""
    (kh, kw), (sh, sw) = problem.kernel, inner_stride(problem)
    if kh != kw or kh not in (3, 5, 7) or sh != sw or sh > 2:
        return "any"
    return f"{kh}x{kw}" + ("_stride2" if sh == 2 else "")


def operand_of(dtype: str) -> str:
    """What instances call the operands of mma.sync."""
    return _OPERANDS.get(dtype, dtype)


def why_not(problem: Problem, names: Iterable[str], kernels: Kernels) -> str:
    """Why tensor-core kernels can't run a problem; empty if they can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in _OPERANDS:
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
    top, bottom, left, right = problem.padding
    if max(problem.H + top + bottom, problem.W + left + right, problem.K, problem.F, problem.taps) > _INT32 // 2:
        return "a dimension is too large for 32-bit coordinates"
    # The kernel numbers vectors of 16 bytes in 31 bits; half of them, as x's pixels may lie apart.
    if max(problem.bytes_of(problem.H * problem.W * problem.C), problem.bytes_of(problem.F * problem.K)) > 8 * _INT32:
        return "an image, or the pointwise weight, is too large for 32-bit offsets"
    return ""


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
class Cut:
    """A problem as tiles of rows x columns output pixels (of a phase) cut it."""

    problem: Problem
    device: Device
    shape: Shape
    rows: int
    columns: int

    @property
    def feature_tiles(self) -> int:
        return ceil(self.problem.F / self.shape.features)

    @property
    def slab_bytes(self) -> int:
        """Of a pixel."""
        return SLAB_BYTES[kind_of(self.problem)]

    @property
    def chunks(self) -> int:
        """The same in 16 bytes."""
        return self.slab_bytes // 16

    @property
    def slab(self) -> int:
        """Channels."""
        return self.slab_bytes // ELEMENT_BYTES[self.problem.dtype]

    @property
    def slabs(self) -> int:
        return ceil(self.problem.K / self.slab)

    def _phases(self, axis: int) -> int:
        return self.problem.dilation[axis] * inner_stride(self.problem)[axis] // self.problem.stride[axis]

    def _across(self, axis: int) -> int:
        """Tiles of a phase; an axis is 0 down, 1 across."""
        outputs = (self.problem.out_h, self.problem.out_w)[axis]
        return ceil(ceil(outputs / self._phases(axis)) / (self.rows, self.columns)[axis])

    def _patch(self, axis: int) -> int:
        """Input rows or columns of a tile."""
        return ((self.rows, self.columns)[axis] - 1) * inner_stride(self.problem)[axis] + self.problem.kernel[axis]

    @property
    def pixel_tiles(self) -> int:
        tiles = [self._phases(axis) * self._across(axis) for axis in (0, 1)]
        return self.problem.N * tiles[0] * tiles[1]

    @property
    def tiles(self) -> int:
        return self.pixel_tiles * self.feature_tiles

    @property
    def blocks(self) -> int:
        return min(self.tiles, self.device.sms)

    @cached_property
    def _patch_pixels(self) -> int:
        """What a patch takes: rows of an even number of pixels, and as many pixels as all threads copy."""
        at_once = THREADS // self.chunks
        return ceil(self._patch(0) * ceil(self._patch(1) / 2) * 2 / at_once) * at_once

    def shared_bytes(self, stages: int) -> int:
        """`MmaForwardLayout`: the places of the patch's pixels, two tiles of operand A, and the stages."""
        operands = 2 * self.shape.pixels * self.slab_bytes
        slab = (self._patch_pixels + self.problem.taps + 1) * self.slab_bytes
        stage = self.shape.features * self.slab_bytes + _aligned(slab)
        return _aligned(self._patch_pixels * 4) + operands + stages * stage

    @cached_property
    def stages(self) -> int:
        """Of the ring in shared memory; 0 where it does not fit."""
        return next((n for n in STAGES if self.shared_bytes(n) <= self.device.shared_bytes), 0)

    def _rows_read(self, axis: int) -> int:
        """Rows or columns of an image that all tiles of all phases read, those that they share once for each."""
        p, outputs = self.problem, (self.rows, self.columns)[axis]
        pitch, size, before = p.dilation[axis], (p.H, p.W)[axis], p.padding[2 * axis]
        step = inner_stride(p)[axis] * outputs
        total = 0
        for phase in range(self._phases(axis)):
            for tile in range(self._across(axis)):
                first = p.stride[axis] * phase - before + pitch * step * tile
                begin, end = max(0, -(first // pitch)), min(self._patch(axis), -((first - size) // pitch))
                total += max(0, end - begin)
        return total

    @cached_property
    def halo(self) -> float:
        """Pixels that all tiles read, of x's own."""
        return self._rows_read(0) * self._rows_read(1) / (self.problem.H * self.problem.W)

    @property
    def amplification(self) -> float:
        """Bytes of x that are read, of x's own, for each 128 features."""
        return self.halo * self.feature_tiles / ceil(self.problem.F / 128)

    @property
    def _bytes_of_pixel(self) -> int:
        """What all slabs read of a pixel of x: with a depth multiplier, some chunks more than once."""
        vector = self.slab // self.chunks
        firsts = (slab * self.slab // self.problem.multiplier // vector * vector for slab in range(self.slabs))
        return sum(16 * min(self.chunks, (self.problem.C - first) // vector) for first in firsts)

    @property
    def requested_bytes(self) -> int:
        """What the threads ask of memory, biases left out; halos and later slabs of features come from L2."""
        p = self.problem
        pixels = p.N * self._rows_read(0) * self._rows_read(1)
        x = pixels * self.feature_tiles * self._bytes_of_pixel
        weights = self.pixel_tiles * p.bytes_of(p.F * p.K) + self.tiles * p.bytes_of(p.K * p.taps)
        return x + weights + p.y_bytes * (2 if p.residual else 1)

    @property
    def device_bytes(self) -> int:
        p = self.problem
        return p.x_bytes + p.weight_bytes + p.y_bytes * (2 if p.residual else 1)

    @property
    def flops(self) -> int:
        """Of whole tiles: the depthwise part is done again for each tile along F."""
        shape = self.shape
        return 2 * self.tiles * self.slabs * self.slab * shape.pixels * (self.problem.taps + shape.features)

    @property
    def seconds(self) -> float:
        """Device memory, L2 or the SMs, whichever takes longest."""
        return LAUNCH_SECONDS + (BLOCK_SECONDS if self.tiles else 0) + max(self.times.values())

    @property
    def times(self) -> dict[str, float]:
        """What goes on side by side; the last wave of tiles takes an SM as long as a full one."""
        device = self.device
        longest, slab_seconds = self._of_slab_on_an_sm
        work = ceil(self.tiles / device.sms) * (self.slabs * slab_seconds + self._issue_seconds(self._of_tile))
        return {
            "memory": self.device_bytes / (device.bandwidth * LIBRARY_BANDWIDTH),
            "L2": self.requested_bytes / (device.bandwidth * L2_BANDWIDTH),
            f"the SMs' {longest}": work,
        }

    def _issue_seconds(self, instructions: float) -> float:
        """Of every warp of a block, on an SM with four schedulers."""
        return WARPS * instructions / 4 / ISSUE_FRACTION / self.device.clock

    @property
    def _of_slab_on_an_sm(self) -> tuple[str, float]:
        """What takes longest of a slab of a tile, and the seconds of all of it: but for a part they overlap."""
        device, shape = self.device, self.shape
        flops = 2 * shape.pixels * shape.features * self.slab
        return overlapping(
            {
                "instructions": self._issue_seconds(self._of_slab),
                "matrix work": flops / (device.matrix_sync(self.problem.dtype) / device.sms),
                "shared memory": self._shared_cycles / device.clock,
            }
        )

    @property
    def _window(self) -> int:
        """Words of a patch that a thread reads for its cell."""
        (kh, kw), (sh, sw) = self.problem.kernel, inner_stride(self.problem)
        if kind_of(self.problem) == "any":
            return kh * kw * self.shape.cell_rows * CELL_COLUMNS
        return ((self.shape.cell_rows - 1) * sh + kh) * ((CELL_COLUMNS - 1) * sw + kw)

    @property
    def _shared_cycles(self) -> float:
        """Of a slab, at 128 bytes a cycle: what goes in, the windows and taps, operand A, both operands."""
        copied = (self._patch_pixels + self.shape.features) * self.slab_bytes / 128
        passes, parts = self._passes_and_parts
        cell = self.shape.cell_rows * CELL_COLUMNS
        return copied + WARPS * (passes * (self._window + cell) + self.problem.taps + 1 + parts * 16 * 4)

    @property
    def _passes_and_parts(self) -> tuple[int, int]:
        """Cells of a thread, and 64 bytes of channels: what a slab's depthwise and matrix work consist of."""
        return CELLS * self.slab_bytes // 4 // THREADS, self.slab_bytes // 64

    @property
    def _of_slab(self) -> float:
        """Instructions of a warp a slab: a fit to what nvcc 13.0 made for sm_90a. With 3x3 in 16 bits, 128 x 256, and a
        patch of 192 pixels, it takes 583 to convolve, 180 to multiply (128 of them mma.sync), and 275 to copy."""
        p = self.problem
        passes, parts = self._passes_and_parts
        narrow = ELEMENT_BYTES[p.dtype] == 2
        channels, unpack = (2, 2) if narrow else (1, 0)
        cell = self.shape.cell_rows * CELL_COLUMNS
        # A word of the window is loaded, made positive or not, and unpacked; a result is packed and stored.
        each = cell * p.taps * channels + self._window * (2 + unpack) + 2 * cell + 17
        convolve = passes * each + p.taps * (1 + unpack) + 10
        multiply = parts * (64 + 16 + (0 if narrow else 32)) + 20
        copies = (self._patch_pixels * 13 + self.shape.features * 5) * self.chunks / THREADS + 157
        return convolve + multiply + copies

    @property
    def _of_tile(self) -> int:
        """The same a tile: where it lies, its first sums, and the epilogue."""
        plain = not self.problem.residual and self.problem.activation is None
        return 730 if plain else 1500


def overlapping(seconds: dict[str, float], overlap: float = OVERLAP) -> tuple[str, float]:
    """What takes longest on an SM, and how long all of it takes: of the second longest, `overlap` is hidden."""
    longest, second, *_ = sorted(seconds.values(), reverse=True)
    return slowest(seconds), longest + (1 - overlap) * second


def _aligned(value: int) -> int:
    return ceil(value / 128) * 128
