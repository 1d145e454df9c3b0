"""The tensor-core family: the fused forward by mma.sync (csrc/kernels/tensor_forward.cuh), sm_80 and newer.

float16, bfloat16, and float32 where convolutions may use TF32; NHWC. This module decides how it cuts the output, and
knows what its threads then ask of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ..devices import Device
from ..problem import (
    ELEMENT_BYTES,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    Candidate,
    Instance,
    Kernels,
    Problem,
    TensorTiling,
)
from .depthwise import inner_stride

L2_BANDWIDTH = 1.4  # assumed, until measured: what L2 gives, of the device memory's bandwidth
ISSUE_FRACTION = 0.7  # assumed, until measured: instructions issued, of the peak
OVERLAP = 0.75  # assumed, until measured: of the shorter of arithmetic and matrix work, what the longer one hides
MOST_HALO = 1.3  # bytes of x that a slab of features may read, of x's own, where that still fills the device
BLOCK_SECONDS = 3e-6  # assumed, until measured: a block's weights and first slabs, which nothing covers

# `TensorForwardTraits` in csrc/kernels/tensor_forward.cuh.
WARPS = 8
RUN = 4  # neighbouring output pixels of a lane
RUNS = 64  # of a tile
FEATURES = 128  # of a tile
STAGES = 4
CHUNKS = 4  # of 16 bytes: the channels of a slab
SLAB_BYTES = 16 * CHUNKS
THREADS = 32 * WARPS
LARGEST_SHARED_BYTES = 227 << 10

KINDS = ("3x3", "3x3_stride2", "5x5", "5x5_stride2", "7x7", "7x7_stride2", "any")
_OPERANDS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "tf32"}

INSTANCES = {
    name: Instance(name, THREADS, LARGEST_SHARED_BYTES, registers=255)
    for name in (f"tensor_forward_{kind}_{operand}" for kind in KINDS for operand in _OPERANDS.values())
}

_INT32 = 2**31 - 1


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fused forward in the tiling that is predicted to be the fastest; the family has no backward of its own."""
    if problem.direction != "forward":
        return []
    name = f"tensor_forward_{_kind(problem)}_{_OPERANDS.get(problem.dtype, problem.dtype)}"
    if refusal := _refusal(problem, name, kernels):
        return [Candidate("tensor", name, refusal=refusal)]
    cuts = [cut for cut in _cuts(problem, device) if cut.shared_bytes <= device.shared_bytes]
    if not cuts:
        refusal = f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"
        return [Candidate("tensor", name, refusal=refusal)]
    lean = [cut for cut in cuts if cut.halo <= MOST_HALO and cut.tiles >= device.sms]
    cut = min(lean or cuts, key=lambda cut: (cut.seconds, cut.requested_bytes))
    if cut.tiles > _INT32:
        return [Candidate("tensor", name, refusal=f"{cut.tiles} tiles are more than 32 bits number")]
    return [
        Candidate(
            family="tensor",
            name=name,
            bytes=cut.device_bytes,
            requested_bytes=cut.requested_bytes,
            flops=cut.flops,
            blocks=cut.blocks,
            waves=cut.tiles / device.sms,
            shared_bytes=cut.shared_bytes,
            predicted_seconds=cut.seconds,
            tiling=TensorTiling(cut.rows, cut.columns, cut.blocks),
            note=f"{cut.feature_slabs} x {FEATURES} features, "
            f"tiles of {cut.rows}x{cut.columns} pixels, halo {cut.halo:.2f}",
        )
    ]


def _kind(problem: Problem) -> str:
    """The kernel sizes and strides that an instance is compiled for; "any" serves the rest."""
    (kh, kw), (sh, sw) = problem.kernel, inner_stride(problem)
    if kh != kw or kh not in (3, 5, 7) or sh != sw or sh > 2:
        return "any"
    return f"{kh}x{kw}" + ("_stride2" if sh == 2 else "")


def _refusal(problem: Problem, name: str, kernels: Kernels) -> str:
    """Why the family can't run a problem; empty if it can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in _OPERANDS:
        return f"the tensor-core kernels do not compute in {problem.dtype}"
    if problem.dtype == "float32" and not problem.tf32:
        return "float32 on tensor cores is TF32, which PyTorch's flags for convolutions do not allow"
    if problem.layout != "nhwc":
        return "the tensor-core kernels are for NHWC"
    for what, channels in (("x", problem.C), ("y", problem.F)):
        if problem.bytes_of(channels) % 16:
            return f"the {channels} channels of {what} are no multiple of 16 bytes"
    if not problem.aligned:
        return "x is not aligned to 16 bytes, or its channels are not contiguous"
    if name not in kernels.instances:
        return f"the native module has no instance {name}"
    top, bottom, left, right = problem.padding
    if max(problem.H + top + bottom, problem.W + left + right, problem.K, problem.F, problem.taps) > _INT32 // 2:
        return "a dimension is too large for 32-bit coordinates"
    return ""


def _cuts(problem: Problem, device: Device) -> list[Cut]:
    """Every width of a tile in whole runs, each with a few heights: the tallest that it has threads for, and lower."""
    cuts = {}
    (dh, dw), (sh, sw) = problem.dilation, problem.stride
    inner_h, inner_w = inner_stride(problem)
    height = ceil(problem.out_h / (dh * inner_h // sh))  # of the longest phase
    width = ceil(problem.out_w / (dw * inner_w // sw))
    for columns in range(RUN, min(RUN * RUNS, ceil(width / RUN) * RUN) + 1, RUN):
        tallest = min(height, RUNS // (columns // RUN))
        for limit in {tallest, -(-tallest // 2), -(-tallest // 4), 1}:
            rows = ceil(height / ceil(height / limit))
            cuts[rows, columns] = Cut(problem, device, rows, columns)
    return list(cuts.values())


@dataclass(frozen=True)
class Cut:
    """A problem as tiles of rows x columns output pixels (of a phase) cut it."""

    problem: Problem
    device: Device
    rows: int
    columns: int

    @property
    def feature_slabs(self) -> int:
        return ceil(self.problem.F / FEATURES)

    @property
    def slab(self) -> int:
        """Channels."""
        return SLAB_BYTES // ELEMENT_BYTES[self.problem.dtype]

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
        return self.pixel_tiles * self.feature_slabs

    @property
    def blocks(self) -> int:
        return min(self.tiles, self.device.sms)

    @property
    def shared_bytes(self) -> int:
        """`TensorForwardLayout`: taps and bias in float32, the patch's places, and the stages."""
        pixels = self._patch(0) * self._patch(1)
        resident = (self.problem.taps + 1) * self.slabs * self.slab * 4 + pixels * 4
        stage = _aligned(pixels * SLAB_BYTES) + FEATURES * SLAB_BYTES
        return _aligned(resident) + STAGES * stage

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

    @property
    def halo(self) -> float:
        """Pixels that all tiles read, of x's own."""
        return self._rows_read(0) * self._rows_read(1) / (self.problem.H * self.problem.W)

    @property
    def _bytes_of_pixel(self) -> int:
        """What all slabs read of a pixel of x: with a depth multiplier, some chunks more than once."""
        vector = self.slab // CHUNKS
        firsts = (slab * self.slab // self.problem.multiplier // vector * vector for slab in range(self.slabs))
        return sum(16 * min(CHUNKS, (self.problem.C - first) // vector) for first in firsts)

    @property
    def requested_bytes(self) -> int:
        """What the threads ask of memory, biases left out; halos and later slabs of features come from L2."""
        p = self.problem
        pixels = p.N * self._rows_read(0) * self._rows_read(1)
        x = pixels * self.feature_slabs * self._bytes_of_pixel
        weights = self.pixel_tiles * p.bytes_of(p.F * p.K) + self.blocks * p.bytes_of(p.K * p.taps)
        return x + weights + p.y_bytes * (2 if p.residual else 1)

    @property
    def device_bytes(self) -> int:
        p = self.problem
        return p.x_bytes + p.weight_bytes + p.y_bytes * (2 if p.residual else 1)

    @property
    def flops(self) -> int:
        """Of whole tiles: the depthwise part is done again for each slab of features."""
        pixels = RUN * RUNS
        return 2 * self.tiles * self.slabs * self.slab * pixels * (self.problem.taps + FEATURES)

    @property
    def seconds(self) -> float:
        """Device memory, L2 or the SMs, whichever takes longest; the last wave of tiles takes as long as a full one."""
        device = self.device
        memory = self.device_bytes / (device.bandwidth * LIBRARY_BANDWIDTH)
        l2 = self.requested_bytes / (device.bandwidth * L2_BANDWIDTH)
        work = ceil(self.tiles / device.sms) * self.slabs * self._slab_seconds
        return LAUNCH_SECONDS + (BLOCK_SECONDS if self.tiles else 0) + max(memory, l2, work)

    @property
    def _slab_seconds(self) -> float:
        """One slab of one tile on an SM: instructions and matrix work, which overlap but for a part."""
        device, p = self.device, self.problem
        clock = device.fma_float32 / (2 * 128 * device.sms)  # 128 multiply-adds a cycle
        issue = WARPS * self._instructions / 4 / ISSUE_FRACTION / clock
        matrix = 2 * RUN * RUNS * FEATURES * self.slab / (device.matrix_sync(p.dtype) / device.sms)
        return max(issue, matrix) + (1 - OVERLAP) * min(issue, matrix)

    @property
    def _instructions(self) -> float:
        """Of a warp a slab, about: as nvcc compiled 3x3 in 16 bits for sm_90a, where it takes 730 to convolve (207 for
        a row of taps), 113 to multiply, and 33 for each copy of the patch."""
        p = self.problem
        kh, kw = p.kernel
        narrow = ELEMENT_BYTES[p.dtype] == 2
        channels = 8 if narrow else 4
        columns = (RUN - 1) * inner_stride(p)[1] + kw if _kind(p) != "any" else RUN * kw
        relu = 4 * columns if p.pre_activation == "relu" else 0
        row = RUN * kw * channels + columns * (channels if narrow else 0) + 7 * columns + 2 * kw + relu + 10
        multiply = 2 * FEATURES // 8 * 2 + FEATURES // 8 * (1 if narrow else 5) + 33
        load = ceil(self._patch(0) * self._patch(1) * CHUNKS / THREADS) * 33 + FEATURES * CHUNKS // THREADS * 15 + 90
        return kh * row + 2 * channels + 90 + multiply + load


def _aligned(value: int) -> int:
    return ceil(value / 128) * 128
