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

from fused_sepconv.families.mma import cut as mma
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import INT32_MAX, LAUNCH_SECONDS, Candidate, Kernels, MmaInputTiling, Problem

# `MmaInputTraits` in csrc/mma/stream.cuh.
TILE = 256  # positions that are computed at a time
GROUP = 8  # positions: parts are whole groups
CHANNELS = 64  # of a block
FEATURES = 16  # of a slab
PITCH = 2 * CHANNELS + 16  # bytes of a position in shared memory
STAGE_BYTES = 2 * FEATURES * (TILE + CHANNELS)
STAGES = (5, 4, 3, 2)
REGISTERS = 128

DTYPES = ("bfloat16", "float16")

INSTANCES = {name: mma.instance(name, REGISTERS) for name in (f"mma_backward_input_3x3_{dtype}" for dtype in DTYPES)}

_OFFSETS = 16 << 31  # bytes that the kernel's offsets, units of 16 bytes, reach


def step(problem: Problem, device: Device, kernels: Kernels) -> Candidate:
    """The step in the cut that is predicted to be the fastest, or why the kernel can't run it."""
    name = f"mma_backward_input_3x3_{problem.dtype}"
    if refusal := _refusal(problem, name, kernels):
        return Candidate("mma", name, refusal=refusal)
    fitting = [cut for cut in cuts(problem, device) if cut.shared_bytes <= device.shared_bytes]
    if not fitting:
        return Candidate("mma", name, refusal=mma.no_room(device))
    # Two blocks on an SM, where that can be: one's product goes on beside the other's windows.
    cut = mma.among_fast(fitting, lambda cut: (min(cut.blocks_per_sm, ceil(cut.blocks / device.sms)) < 2, cut.computed))
    if cut.length > INT32_MAX - 2 * TILE - cut.part - cut.lag:
        return Candidate("mma", name, refusal=f"{cut.length} positions are more than 32 bits number")
    note = f"{cut.chunks} x {CHANNELS} channels, {cut.parts} parts, "
    note += f"{cut.computed / max(problem.pixels, 1):.2f} positions a pixel, {cut.blocks_per_sm} blocks an SM"
    tiling = MmaInputTiling(cut.strips, cut.part, cut.parts, cut.stages)
    return cut.candidate(name, tiling, cut.blocks / (device.sms * cut.blocks_per_sm), note)


def _refusal(problem: Problem, name: str, kernels: Kernels) -> str:
    """Why the kernel can't run a problem; empty if it can."""
    if not kernels.instances:
        return kernels.why_none
    if problem.dtype not in DTYPES:
        return f"the tensor-core gradient of x is computed from float16 and bfloat16, not {problem.dtype}"
    if problem.kernel != (3, 3):
        return f"the tensor-core gradient of x is for 3x3, not {problem.kernel[0]}x{problem.kernel[1]}"
    if problem.stride != (1, 1):
        return f"the tensor-core gradient of x is for stride 1, not {problem.stride[0]}x{problem.stride[1]}"
    if problem.multiplier > 1:
        return "the tensor-core gradient of x is for a depth multiplier of 1"
    if problem.mid_activation:
        return "the gradient through a mid-activation needs the depthwise result"
    if refusal := mma.why_not(problem, [name], kernels):
        return refusal
    if max(problem.x_bytes, problem.y_bytes) >= _OFFSETS or problem.K * problem.F > INT32_MAX:
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
        """The axis of the rows (0) or columns (1)."""
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
class Cut(mma.Cut):
    """A problem as strips and parts of so many tiles cut it, with so many slabs in shared memory."""

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
        """Positions of one image, all its phases and strips."""
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
        """Tiles of all parts, for one chunk of channels."""
        last = self.length - (self.parts - 1) * self.part
        return (self.parts - 1) * self.tiles + ceil((_whole_groups(last) + self.lag) / TILE) if self.parts else 0

    @property
    def shared_bytes(self) -> int:
        """`MmaInputLayout`: weights, sums of the bias, the ring and the stages."""
        resident = self.problem.taps * CHANNELS * self.problem.element_bytes + mma.THREADS * 2 * 4
        return resident + (TILE + self.lag + GROUP) * PITCH + self.stages * STAGE_BYTES

    @property
    def blocks_per_sm(self) -> int:
        return self.device.blocks_per_sm(mma.THREADS, REGISTERS, self.shared_bytes)

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
        """For each phase and strip of an image: its phase of rows, the outputs before each column, and all outputs."""
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
        """Bytes asked of memory, bias left out: for each chunk of channels the gradient, and for each tile the
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
        """Flop of whole tiles, and of both depthwise gradients."""
        product = 2 * self.chunks * CHANNELS * self.computed * self.slabs * FEATURES
        return product + 2 * self.problem.depthwise_flops

    @property
    def busiest_sm(self) -> float:
        tiles = ceil(self.blocks / self.device.sms) * min(self.tiles, self.total_tiles)
        values = tiles * TILE * CHANNELS
        return self.sm_seconds(values * self.slabs * FEATURES, values * 2 * self.problem.taps)

    @property
    def after(self) -> float:
        """Two ordered sums over the parts, whose bytes are counted with the kernel's."""
        return 2 * LAUNCH_SECONDS


def _whole_groups(positions: int) -> int:
    return ceil(positions / GROUP) * GROUP
