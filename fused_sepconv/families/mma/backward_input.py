"""The tensor-core kernel from the gradient of the pointwise result to those of x and of the depthwise weight and bias
(csrc/mma/backward_input.cuh), sm_80 and newer.

float16 and bfloat16, 3x3, NHWC: a step of a backward. The gradient between the two convolutions, which two kernels
would write and read again, stays in shared memory. This module decides how the kernel cuts the stream of positions that
all images make (csrc/mma/stream.cuh), and knows what its threads then ask of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from fused_sepconv.families.mma.forward import BLOCK_SECONDS, ISSUE_FRACTION, L2_BANDWIDTH, OVERLAP, overlapping
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import (
    ELEMENT_BYTES,
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    Candidate,
    Instance,
    Kernels,
    MmaInputTiling,
    Problem,
    slowest,
)

# `MmaInputTraits` in csrc/mma/stream.cuh.
WARPS = 8
THREADS = 32 * WARPS
TILE = 256  # positions that are computed at a time
GROUP = 8  # positions: parts are whole groups
CHANNELS = 64  # of a block
FEATURES = 16  # of a slab
PITCH = 2 * CHANNELS + 16  # bytes of a position in shared memory
STAGE_BYTES = 2 * FEATURES * (TILE + CHANNELS)
STAGES = (5, 4, 3, 2)
REGISTERS = 128
LARGEST_SHARED_BYTES = 227 << 10

# Instructions of a warp, about, as nvcc compiled them for sm_90a: a position's windows (36 multiply-adds of 65), a slab
# (16 of mma.sync), and what else a tile takes.
POSITION_INSTRUCTIONS = 65
SLAB_INSTRUCTIONS = 80
TILE_INSTRUCTIONS = 500

SLAB_SECONDS = 0.8e-6  # assumed, until measured: latency of a slab's copies and of its barrier

_OPERANDS = {"bfloat16": "bfloat16", "float16": "float16"}

INSTANCES = {
    name: Instance(name, THREADS, LARGEST_SHARED_BYTES, REGISTERS)
    for name in (f"mma_backward_input_3x3_{operand}" for operand in _OPERANDS.values())
}

_INT32 = 2**31 - 1
_OFFSETS = 16 << 31  # bytes that the kernel's offsets, units of 16 bytes, reach


def step(problem: Problem, device: Device, kernels: Kernels) -> Candidate:
    """The step in the cut that is predicted to be the fastest, or why the kernel can't run it."""
    name = f"mma_backward_input_3x3_{_OPERANDS.get(problem.dtype, problem.dtype)}"
    if refusal := _refusal(problem, name, kernels):
        return Candidate("mma", name, refusal=refusal)
    fitting = [cut for cut in cuts(problem, device) if cut.shared_bytes <= device.shared_bytes]
    if not fitting:
        refusal = f"needs more shared memory a block than {device.name} has: {device.shared_bytes} bytes"
        return Candidate("mma", name, refusal=refusal)
    cut = min(fitting, key=lambda cut: cut.seconds)
    if cut.length > _INT32 - 2 * TILE - cut.part - cut.lag:
        return Candidate("mma", name, refusal=f"{cut.length} positions are more than 32 bits number")
    return Candidate(
        family="mma",
        name=name,
        bytes=cut.device_bytes,
        requested_bytes=cut.requested_bytes,
        flops=cut.flops,
        blocks=cut.blocks,
        waves=cut.blocks / (device.sms * cut.blocks_per_sm),
        shared_bytes=cut.shared_bytes,
        predicted_seconds=cut.seconds,
        bound=slowest(cut.times),
        tiling=MmaInputTiling(cut.strips, cut.part, cut.parts, cut.stages),
        note=f"{cut.chunks} x {CHANNELS} channels, {cut.parts} parts, "
        f"{cut.computed / max(problem.pixels, 1):.2f} positions a pixel, {cut.blocks_per_sm} blocks an SM",
    )


def _refusal(problem: Problem, name: str, kernels: Kernels) -> str:
    """Why the kernel can't run a problem; empty if it can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in _OPERANDS:
        return f"the tensor-core gradient of x is computed from float16 and bfloat16, not {problem.dtype}"
    if problem.kernel != (3, 3):
        return f"the tensor-core gradient of x is for 3x3, not {problem.kernel[0]}x{problem.kernel[1]}"
    if problem.stride != (1, 1):
        return f"the tensor-core gradient of x is for stride 1, not {problem.stride[0]}x{problem.stride[1]}"
    if problem.multiplier > 1:
        return "the tensor-core gradient of x is for a depth multiplier of 1"
    if problem.mid_activation:
        return "the gradient through a mid-activation needs the depthwise result"
    for what, channels in (("x", problem.C), ("y", problem.F)):
        if problem.bytes_of(channels) % 16:
            return f"the {channels} channels of {what} are no multiple of 16 bytes"
    if not problem.aligned:
        return "x is not aligned to 16 bytes, or its channels are not contiguous"
    if name not in kernels.instances:
        return f"the native module has no instance {name}"
    top, bottom, left, right = problem.padding
    if max(problem.H + top + bottom, problem.W + left + right, problem.K, problem.F) > _INT32 // 2:
        return "a dimension is too large for 32-bit coordinates"
    if max(problem.x_bytes, problem.y_bytes) >= _OFFSETS or problem.K * problem.F > _INT32:
        return "a tensor is too large for 32-bit offsets in units of 16 bytes"
    return ""


def cuts(problem: Problem, device: Device) -> list[Cut]:
    """Few strips to many, each with parts that fill the device once, twice or more often."""
    found = {}
    width = Axis.of(problem, 1).length
    chunks = ceil(problem.K / CHANNELS)
    for strips in range(1, max(1, min(32, width // GROUP)) + 1):
        for blocks in (1, 2):
            stages = next((s for s in STAGES if _fits(Cut(problem, device, strips, 1, s), blocks)), None)
            if stages is None:
                continue
            whole = Cut(problem, device, strips, 1, stages)
            room = device.sms * blocks // chunks
            for parts in {max(1, room * times) for times in (1, 2, 3)}:
                tiles = max(ceil((ceil(whole.length / parts) + whole.lag) / TILE), whole.lag // TILE + 1)
                found[strips, tiles, stages] = Cut(problem, device, strips, tiles, stages)
    return list(found.values())


def _fits(cut: Cut, blocks: int) -> bool:
    return cut.shared_bytes <= cut.device.shared_bytes and cut.blocks_per_sm >= blocks


@dataclass(frozen=True)
class Axis:
    """Rows or columns of the images' phases as positions: `StreamAxis` in csrc/mma/stream.cuh."""

    phases: int
    outputs: int
    lead: int  # positions before output 0
    length: int  # positions of a phase

    @classmethod
    def of(cls, problem: Problem, axis: int) -> Axis:
        """Of the rows (axis 0) or columns (1)."""
        dilation, padding, reach = problem.dilation[axis], problem.padding[2 * axis], problem.kernel[axis] - 1
        inputs, outputs = (problem.H, problem.W)[axis], (problem.out_h, problem.out_w)[axis]
        longest = ceil(outputs / dilation)
        first, last = max(0, ceil((padding - dilation + 1) / dilation)), (inputs - 1 + padding) // dilation
        lead, tail = max(0, reach - first), max(0, last - (longest - 1))
        return cls(dilation, outputs, lead, longest + max(lead, tail))

    def outputs_before(self, phase: int, position: int) -> int:
        """How many of the phase's positions before that one are outputs."""
        of_phase = max(0, ceil((self.outputs - phase) / self.phases))
        return min(max(position - self.lead, 0), of_phase)


@dataclass(frozen=True)
class Cut:
    """A problem as strips and parts of so many tiles cut it, with so many slabs in shared memory."""

    problem: Problem
    device: Device
    strips: int
    tiles: int  # of a part: the last may have fewer
    stages: int

    @cached_property
    def rows(self) -> Axis:
        return Axis.of(self.problem, 0)

    @cached_property
    def columns(self) -> Axis:
        return Axis.of(self.problem, 1)

    @property
    def chunks(self) -> int:
        return ceil(self.problem.K / CHANNELS)

    @property
    def slabs(self) -> int:
        return ceil(self.problem.F / FEATURES)

    @property
    def strip_columns(self) -> int:
        return ceil(self.columns.length / self.strips)

    @property
    def pitch(self) -> int:
        """Positions of a row: its columns, and those that a strip has from its neighbour."""
        return self.strip_columns + (self.problem.kernel[1] - 1 if self.strips > 1 else 0)

    @property
    def image_positions(self) -> int:
        """Of one image, all its phases and strips."""
        return self.rows.phases * self.columns.phases * self.strips * self.rows.length * self.pitch

    @property
    def length(self) -> int:
        return self.problem.N * self.image_positions

    @property
    def lag(self) -> int:
        kh, kw = self.problem.kernel
        return _whole_groups((kh - 1) * self.pitch + kw - 1)

    @property
    def part(self) -> int:
        """Positions of x of a part, so that with those it needs further on they are whole tiles."""
        return self.tiles * TILE - self.lag

    @property
    def parts(self) -> int:
        return ceil(self.length / self.part)

    @property
    def blocks(self) -> int:
        return self.chunks * self.parts

    @property
    def total_tiles(self) -> int:
        """Of all parts, for one chunk of channels."""
        last = self.length - (self.parts - 1) * self.part
        return (self.parts - 1) * self.tiles + ceil((_whole_groups(last) + self.lag) / TILE) if self.parts else 0

    @property
    def shared_bytes(self) -> int:
        """`MmaInputLayout`: weights, sums of the bias, the ring and the stages."""
        resident = self.problem.taps * CHANNELS * ELEMENT_BYTES[self.problem.dtype] + THREADS * 2 * 4
        return resident + (TILE + self.lag + GROUP) * PITCH + self.stages * STAGE_BYTES

    @property
    def blocks_per_sm(self) -> int:
        return self.device.blocks_per_sm(THREADS, REGISTERS, self.shared_bytes)

    def _outputs_before(self, position: int) -> int:
        """How many positions before that one are outputs' own, those that strips share once for each."""
        images, rest = divmod(min(position, self.length), self.image_positions)
        total = images * sum(count for _, _, count in self._strip_images)
        for row_phase, columns, count in self._strip_images:
            if rest < self.rows.length * self.pitch:
                row, column = divmod(rest, self.pitch)
                whole = self.rows.outputs_before(row_phase, row)
                partly = self.rows.outputs_before(row_phase, row + 1) - whole
                return total + whole * columns[self.pitch] + partly * columns[column]
            rest -= self.rows.length * self.pitch
            total += count
        return total

    @cached_property
    def _strip_images(self) -> list[tuple[int, list[int], int]]:
        """Of each phase and strip of an image: its phase of rows, the outputs before each column, and all outputs."""
        found = []
        for row_phase in range(self.rows.phases):
            rows = self.rows.outputs_before(row_phase, self.rows.length)
            for phase in range(self.columns.phases):
                for strip in range(self.strips):
                    first = strip * self.strip_columns
                    before = self.columns.outputs_before(phase, first)
                    columns = [
                        self.columns.outputs_before(phase, first + column) - before for column in range(self.pitch + 1)
                    ]
                    found.append((row_phase, columns, rows * columns[-1]))
        return found

    @cached_property
    def pixels_read(self) -> int:
        """Pixels of the pointwise result's gradient that all parts read, for one chunk of channels."""
        total = 0
        for part in range(self.parts):
            begin = part * self.part
            tiles = ceil((_whole_groups(min(self.part, self.length - begin)) + self.lag) / TILE)
            total += self._outputs_before(begin + tiles * TILE) - self._outputs_before(begin)
        return total

    @property
    def computed(self) -> int:
        """Positions that are computed, for one chunk of channels."""
        return self.total_tiles * TILE

    @property
    def partial_bytes(self) -> int:
        return self.parts * self.problem.K * self.problem.taps * 4

    @property
    def requested_bytes(self) -> int:
        """What the threads ask of memory, bias left out: for each chunk of channels the gradient, and for each tile the
        pointwise weight; but for the first they come from L2."""
        p = self.problem
        gradient = self.chunks * self.pixels_read * p.bytes_of(p.F)
        weights = self.total_tiles * p.bytes_of(p.F * p.K) + self.parts * p.bytes_of(p.K * p.taps)
        return gradient + weights + 2 * p.x_bytes + self.partial_bytes

    @property
    def device_bytes(self) -> int:
        p = self.problem
        return p.y_bytes + 2 * p.x_bytes + p.weight_bytes + 2 * self.partial_bytes  # written, and read to be added

    @property
    def flops(self) -> int:
        """Of whole tiles, and of both depthwise gradients."""
        product = 2 * self.chunks * CHANNELS * self.computed * self.slabs * FEATURES
        return product + 2 * self.problem.depthwise_flops

    @property
    def seconds(self) -> float:
        """Device memory, L2 or the fullest SM, whichever takes longest, and the sums over the parts."""
        return 3 * LAUNCH_SECONDS + BLOCK_SECONDS + max(self.times.values())

    @property
    def times(self) -> dict[str, float]:
        """What goes on side by side."""
        device = self.device
        # The parts' pixels are counted one by one, but for comparing cuts their tiles say as much.
        read = self.computed * self.problem.pixels / max(self.length, 1)
        p = self.problem
        asked = self.chunks * read * p.bytes_of(p.F) + self.total_tiles * p.bytes_of(p.F * p.K) + 2 * p.x_bytes
        longest, tile_seconds = self._tile_on_an_sm
        return {
            "memory": self.device_bytes / (device.bandwidth * LIBRARY_BANDWIDTH),
            "L2": asked / (device.bandwidth * L2_BANDWIDTH),
            f"the SMs' {longest}": ceil(self.blocks / device.sms) * min(self.tiles, self.total_tiles) * tile_seconds,
        }

    @property
    def _tile_on_an_sm(self) -> tuple[str, float]:
        """What takes longest of a tile, and the seconds of all of it: instructions, multiply-adds, matrix work and
        shared memory. Where two blocks share an SM, they overlap but for a part; one by itself has the windows after
        the product."""
        device, clock = self.device, self.device.clock
        windows = TILE // WARPS * POSITION_INSTRUCTIONS
        issue = WARPS * (windows + self.slabs * SLAB_INSTRUCTIONS + TILE_INSTRUCTIONS) / 4 / ISSUE_FRACTION / clock
        multiply_adds = TILE * 2 * self.problem.taps * CHANNELS / device.fma_lanes / clock
        flops = 2 * TILE * CHANNELS * self.slabs * FEATURES
        matrix = flops / (device.matrix_sync(self.problem.dtype) / device.sms)
        # At 128 bytes a cycle: a slab in and its operands out, the product in, and three rows of each window out.
        operands = WARPS * 2 * FEATURES * (TILE // WARPS + CHANNELS)
        shared = (self.slabs * (STAGE_BYTES + operands) + TILE * 2 * CHANNELS * 4) / 128 / clock
        resident = min(self.blocks_per_sm, ceil(self.blocks / device.sms))
        longest, seconds = overlapping(
            {"instructions": max(issue, multiply_adds), "matrix work": matrix, "shared memory": shared},
            OVERLAP if resident > 1 else 0,
        )
        # A block by itself waits for its slabs, and then has its windows.
        alone = self.slabs * SLAB_SECONDS / (self.stages - 1) + WARPS * windows / 4 / ISSUE_FRACTION / clock
        alone /= max(resident, 1)
        return (longest, seconds) if seconds >= alone else ("latency", alone)


def _whole_groups(positions: int) -> int:
    return ceil(positions / GROUP) * GROUP
