"""How the depthwise kernels for NHWC (csrc/depthwise/nhwc_forward.cuh, _backward.cuh) cut a problem, and to the byte
what they then read and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, gcd

from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import ELEMENT_BYTES, DepthwiseProblem, NhwcTiling

COLUMNS = 4  # of a thread: kDepthwiseColumns in csrc/depthwise/nhwc.cuh
WARP = 32
COPY_INSTRUCTIONS = 8  # of a piece of 16 bytes: its addresses, whether it is inside, the copy
NORMALISED_INSTRUCTIONS = 4  # of a value: it is read, scaled, shifted, made positive, stored
ACTIVATION_INSTRUCTIONS = 25  # of a value: those that are more than a comparison


@dataclass(frozen=True)
class Traits:
    """What is fixed when a fast kernel is compiled: `NhwcTraits` in csrc/depthwise/nhwc.cuh."""

    direction: str
    kernel: int
    stride: int  # after dilation is taken apart
    dtype: str
    normalised: bool = False

    @property
    def name(self) -> str:
        family = "depthwise_normalised" if self.normalised else "depthwise"
        return f"{family}_{self.direction}_nhwc_{self.kernel}x{self.kernel}_s{self.stride}_{self.dtype}"

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    @property
    def rows(self) -> int:
        """A group's: of the output in the forward, of x in the backward."""
        return 4 if self.stride == 1 else 2

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

    def x_window(self, count: int, mid_activation: bool) -> int:
        """Of the backward: rows or columns of x that come for `count` of them. With a mid-activation, of whose argument
        they are made, those under their window: those before are as many as the kernel reaches."""
        return (self.window(count) - 1) * self.stride + self.kernel if mid_activation else count

    def shared_bytes(self, warps: int, pre_activation: str | None, mid_activation: bool) -> int:
        """Dynamic shared memory of a block: two windows of rows, and a group of outputs on their way out (forward) or
        two windows of x (backward), raw and active where the latter does not show all that the gradient needs."""
        columns = warps * COLUMNS
        pixels = 2 * self.window(self.rows) * self.window(columns)
        if self.forward:
            pixels += self.rows * columns
        else:
            x = self.x_window(self.rows, mid_activation) * self.x_window(columns, mid_activation)
            pixels += (2 if pre_activation in (None, "relu") and not self.normalised else 4) * x
        return pixels * self.pixel_bytes + (2 * 4 * self.chunk if self.normalised else 0)  # its scale and shift

    def instructions(self, warps: int, pre_activation: str | None, mid_activation: bool) -> float:
        """Of a thread a group, about, as nvcc 13.0 makes them for sm_90a: window reads and conversions, multiply-adds,
        copies, stores, and what is left of addresses and bounds. Narrow tiles copy more of their neighbours."""
        values, words = self.rows * COLUMNS * self.lane_channels, self.rows * COLUMNS
        word = 1 + (0 if self.dtype == "float32" else self.lane_channels)  # to read it, and each value made float32
        columns = warps * COLUMNS
        copied = self.window_step(self.rows) * self.window(columns)
        total = self.window(self.rows) * self.window(COLUMNS) * word + 2 * words
        if self.forward:
            total += values * self.kernel**2 + 100 + 17 * self.rows
            activated = copied
        else:
            total += 2 * values * self.kernel**2 / self.stride**2 + words * word + 100 + 40 * self.rows
            activated = self.rows * self.x_window(columns, mid_activation)
            copied += activated
            if pre_activation:  # its derivative
                total += values * (2 if pre_activation == "relu" else ACTIVATION_INSTRUCTIONS)
            if mid_activation:  # its argument, for the rows that the group adds: a warp takes whole columns
                rows, turns = self.window_step(self.rows), ceil(self.window(columns) / warps)
                read = ((rows - 1) * self.stride + self.kernel) * self.kernel * word
                total += turns * (read + rows * self.lane_channels * (self.kernel**2 + 8) + 20)
        pieces = self.pixel_bytes / 16 / (WARP * warps)
        if self.normalised:
            simple = pre_activation in (None, "relu")
            a_value = NORMALISED_INSTRUCTIONS + (0 if simple else ACTIVATION_INSTRUCTIONS)
            total += activated * pieces * a_value * 16 / ELEMENT_BYTES[self.dtype]
            if not self.forward:  # its two sums
                total += values * (4 if pre_activation == "relu" else 10)
        elif pre_activation:
            a_value = ACTIVATION_INSTRUCTIONS * 16 / ELEMENT_BYTES[self.dtype]
            total += activated * pieces * (15 if pre_activation == "relu" else a_value)
        return total + COPY_INSTRUCTIONS * copied * pieces


# A thread's, at most, by kernel size and channels of a lane: what nvcc gave, on the architecture where it is most.
_REGISTERS = {
    "forward": {(3, 1): 96, (3, 2): 96, (5, 1): 120, (5, 2): 168, (7, 1): 144, (7, 2): 224},
    "backward": {(3, 1): 136, (3, 2): 168, (5, 1): 168, (5, 2): 255, (7, 1): 240},
}


@dataclass(frozen=True)
class Cut:
    """A problem as a tiling cuts it, and what of it passes through device memory."""

    problem: DepthwiseProblem
    traits: Traits
    tiling: NhwcTiling

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

    def _read(self, axis: int, phase: int, first: int, count: int, of_x: bool) -> int:
        """How many rows or columns of the image there are among `count` of a window from `first` on."""
        p, t = self.problem, self.tiling
        if of_x:
            size, before = (p.H, p.W)[axis], p.padding[2 * axis]
            return _inside(p.stride[axis] * phase - before, p.dilation[axis], size, first, count)
        return _inside(phase, (t.phases_h, t.phases_w)[axis], (p.out_h, p.out_w)[axis], first, count)

    def window_pixels(self) -> int:
        """Pixels that the windows read in all, those that parts and tiles share as often as they are read."""
        t, traits = self.tiling, self.traits
        step, size = traits.window_step, traits.window
        across = (traits.window_start(t.first_column), step(t.tile_columns), size(t.tile_columns))
        down = (traits.window_start(t.first_row), step(traits.rows), size(traits.rows))
        return self._pixels(across, down, of_x=traits.forward)

    def x_window_pixels(self) -> int:
        """The same of x in a backward with a mid-activation."""
        t, traits = self.tiling, self.traits
        before = traits.kernel - 1
        across = (t.first_column - before, t.tile_columns, traits.x_window(t.tile_columns, True))
        down = (t.first_row - before, traits.rows, traits.x_window(traits.rows, True))
        return self._pixels(across, down, of_x=True)

    def _pixels(self, across: tuple[int, int, int], down: tuple[int, int, int], of_x: bool) -> int:
        """Of windows that begin at a row (or column), step on, and are as high, each for the next group (or tile)."""
        t = self.tiling
        left, tile_step, width = across
        start, step, height = down
        columns = [
            self._read(1, phase, left + tile * tile_step, width, of_x)
            for phase in range(t.phases_w)
            for tile in range(t.column_tiles)
        ]
        rows = [self._read(0, phase, start, (t.groups - 1) * step + height, of_x) for phase in range(t.phases_h)]
        pixels = self.problem.N * sum(columns) * sum(rows)
        if height == step:
            return pixels
        for number in range(t.groups_per_part, self.total_groups, t.groups_per_part):
            strip, group = divmod(number, t.groups)
            if group:  # a part begins inside a strip: what its window shares with the part before
                phase = strip // (t.column_tiles * t.phases_w) % t.phases_h
                halo = self._read(0, phase, start + group * step, height - step, of_x)
                pixels += halo * columns[strip % len(columns)]
        return pixels

    def bytes_by_tensor(self) -> dict[str, int]:
        """What passes through device memory, by the names of csrc/params.h. The weights count once a part, as the
        chunks of a part are in flight together."""
        problem, pixels = self.problem, self.window_pixels()
        weights = self.tiling.parts * problem.weight_bytes
        affine = self.tiling.parts * normalised_bytes(problem)
        if self.traits.forward:
            return {
                "x": pixels * self.input_bytes_of_pixel,
                "depthwise_weight": weights,
                "y": problem.y_bytes,
                "affine": affine,
            }
        x = self.x_window_pixels() * problem.C * problem.element_bytes if problem.mid_activation else problem.x_bytes
        return {
            "x": x,
            "depthwise_weight": weights,
            "grad_output": pixels * problem.K * problem.element_bytes,
            "grad_x": problem.x_bytes,
            "partial_weight": 2 * self.tiling.parts * problem.K * problem.taps * 4,  # written, and read to be added
            "affine": affine,
        }

    def bytes(self) -> int:
        return sum(self.bytes_by_tensor().values())


def normalised_bytes(problem: DepthwiseProblem) -> int:
    """What a part reads besides, where x is normalised: scale and shift, and in the backward the mean; and there its
    partial sums, written, and read to be added."""
    return problem.normalised * problem.C * 4 * (2 if problem.direction == "forward" else 3 + 2 * 2)


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


def cuts(problem: DepthwiseProblem, traits: Traits, device: Device) -> Iterator[Cut]:
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
        shared_bytes = traits.shared_bytes(warps, problem.pre_activation, bool(problem.mid_activation))
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
            if max(chunks * parts, groups_per_part) > 2**31 - 1:
                continue
            tiling = NhwcTiling(
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
            yield Cut(problem, traits, tiling)
        if len(seen) == 12:
            return
