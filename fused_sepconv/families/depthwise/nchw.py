"""How the depthwise kernels for NCHW (csrc/kernels/depthwise_planes_*.cuh) cut a problem, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil, gcd

from fused_sepconv.families.depthwise.nhwc import normalised_bytes
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import ELEMENT_BYTES, DepthwiseProblem, NchwTiling

THREADS = 128  # of a block: kNchwThreads in csrc/depthwise/nchw.cuh
COLUMNS = 2  # of a thread: kNchwColumns
PIECE = 16  # bytes of a copy: kPieceBytes

# Instructions of a thread, as the disassembly of nvcc 13.0 for sm_100 counts them, the rare ways not taken.
COPY_INSTRUCTIONS = 44  # of a piece of 16 bytes: its image and place, whether it is inside, the copy
STORE_INSTRUCTIONS = 36
NORMALISED_INSTRUCTIONS = 3  # of a value: it is converted, scaled, shifted
ACTIVATION_INSTRUCTIONS = 25  # of a value: those that are more than a comparison

# A thread's, at most, by kernel size: what the launch bounds leave.
_REGISTERS = {"forward": {3: 80, 5: 128, 7: 255}, "backward": {3: 128, 5: 168, 7: 255}}


@dataclass(frozen=True)
class NchwTraits:
    """What is fixed when a kernel is compiled: `NchwTraits` in csrc/depthwise/nchw.cuh."""

    direction: str
    kernel: int
    stride: int  # after dilation is taken apart
    dilated: bool
    dtype: str
    normalised: bool = False

    @property
    def name(self) -> str:
        kind = "dilated" if self.dilated else f"s{self.stride}"
        family = "depthwise_normalised" if self.normalised else "depthwise"
        return f"{family}_{self.direction}_nchw_{self.kernel}x{self.kernel}_{kind}_{self.dtype}"

    @property
    def forward(self) -> bool:
        return self.direction == "forward"

    @property
    def rows(self) -> int:
        """Of a thread: of the output in the forward, of x in the backward."""
        return 4 if self.stride == 1 and (self.forward or self.kernel == 3) else 2

    @property
    def registers(self) -> int:
        return _REGISTERS[self.direction][self.kernel]

    def window(self, problem: DepthwiseProblem, count: int) -> int:
        """Rows of x that `count` of the output need, or in the backward rows of its gradient that `count` of x need."""
        if self.forward:
            return (count - 1) * problem.stride[0] + _reach(problem, 0) + 1
        return (count - 1 + _reach(problem, 0)) // problem.stride[0] + 1

    def x_window(self, problem: DepthwiseProblem, count: int) -> int:
        """Of the backward: rows of x that come for `count` of them. With a mid-activation, of whose argument they are
        made, those under their window: those before are as many as the kernel reaches."""
        if not problem.mid_activation:
            return count
        return (self.window(problem, count) - 1) * problem.stride[0] + _reach(problem, 0) + 1

    def _own_window(self, count: int) -> int:
        """The rows or columns of its window that a thread reads for `count` of its own."""
        if self.forward:
            return (count - 1) * self.stride + self.kernel
        return (count - 1 + self.kernel - 1) // self.stride + 1

    def _ways(self, columns: int) -> int:
        """Cycles of a warp's access to shared memory whose lanes are so many columns apart: a bank gives 4 bytes."""
        return max(1, columns * ELEMENT_BYTES[self.dtype] // 4)

    @property
    def shared_cycles(self) -> int:
        """Of a warp, for an item a lane: its window, and its own values (the output; or x and its gradient)."""
        values = self.rows * COLUMNS * self._ways(COLUMNS)
        window = self._own_window(self.rows) * self._own_window(COLUMNS)
        if self.forward:
            return window * self._ways(COLUMNS * self.stride) + values
        return window * self._ways(COLUMNS // self.stride) + 2 * values

    @property
    def mid_shared_cycles(self) -> int:
        """The same of an item of the mid-activation's argument in the backward: x's window, the gradient and back."""
        window = self.kernel * ((COLUMNS - 1) * self.stride + self.kernel)
        return window * self._ways(COLUMNS * self.stride) + 2 * COLUMNS * self._ways(COLUMNS)

    @property
    def instructions(self) -> float:
        """Of an item, about: every element of a window is read, converted and guarded by itself, and where there is a
        dilation has an address of its own."""
        values = self.rows * COLUMNS
        window = self._own_window(self.rows) * self._own_window(COLUMNS)
        if self.forward:
            return (5.3 if self.dilated else 3.5) * window + values * (self.kernel**2 + 6) + 90
        multiply_adds = 2 * values * self.kernel**2 / self.stride**2
        return (6.0 if self.dilated else 4.4) * window + multiply_adds + 16 * values + 40

    @property
    def mid_instructions(self) -> float:
        """The same of an item of the mid-activation's argument in the backward, one row of outputs, and of the
        activation's derivative."""
        window = self.kernel * ((COLUMNS - 1) * self.stride + self.kernel)
        return (6.0 if self.dilated else 4.3) * window + COLUMNS * (self.kernel**2 + ACTIVATION_INSTRUCTIONS) + 70


def _reach(problem: DepthwiseProblem, axis: int) -> int:
    """From the first tap to the last."""
    return (problem.kernel[axis] - 1) * problem.dilation[axis]


def _item_pitch(problem: DepthwiseProblem, axis: int) -> int:
    """How far a thread's rows (or columns) lie apart: `NchwPitch::own` in csrc/depthwise/nchw.cuh."""
    return problem.dilation[axis] // gcd(problem.dilation[axis], problem.stride[axis])


def _items(problem: DepthwiseProblem, axis: int, size: int, count: int) -> int:
    """Items of `count` rows (or columns) each that cover `size`: `items_over` in nchw.cuh."""
    pitch = _item_pitch(problem, axis)
    return ceil(size / (count * pitch)) * pitch


@dataclass(frozen=True)
class NchwCut:
    """A problem as a tiling cuts it. An axis: 0 down, 1 across."""

    problem: DepthwiseProblem
    traits: NchwTraits
    tiling: NchwTiling

    @property
    def blocks(self) -> int:
        return self.problem.K * self.tiling.parts

    @property
    def units(self) -> int:
        return ceil(self.problem.N / self.tiling.images) * self.tiling.bands

    @property
    def x_window_rows(self) -> int:
        """Rows of x that all bands of an image read in a backward with a mid-activation."""
        p, t = self.problem, self.tiling
        first = t.first_row - _reach(p, 0) - p.padding[0]
        window = self.traits.x_window(p, t.rows)
        begins = range(first, first + t.bands * t.rows, t.rows)
        return sum(max(0, min(begin + window, p.H) - max(begin, 0)) for begin in begins)

    @cached_property
    def window_rows(self) -> int:
        """Rows that all bands of an image read: of x in the forward, of the output's gradient in the backward."""
        p, t, total = self.problem, self.tiling, 0
        for band in range(t.bands):
            if self.traits.forward:
                first = band * t.rows
                last = min(first + t.rows, p.out_h) - 1
                low = first * p.stride[0] - p.padding[0]
                high = low + self.traits.window(p, last - first + 1)
                total += max(0, min(high, p.H) - max(low, 0))
            else:
                first = (t.first_row + band * t.rows - _reach(p, 0)) // p.stride[0]
                total += max(0, min(first + self.traits.window(p, t.rows), p.out_h) - max(first, 0))
        return total

    def bytes_by_tensor(self) -> dict[str, int]:
        """What passes through device memory, by the names of csrc/params.h, but for what pieces of 16 bytes read beyond
        the ends of a run of rows."""
        p, size = self.problem, self.problem.element_bytes
        weights = self.tiling.parts * p.weight_bytes
        affine = self.tiling.parts * normalised_bytes(p)
        if self.traits.forward:
            return {
                "x": p.N * p.K * self.window_rows * p.W * size,
                "depthwise_weight": weights,
                "y": p.y_bytes,
                "affine": affine,
            }
        x = p.N * p.K * self.x_window_rows * p.W * size if p.mid_activation else p.x_bytes
        return {
            "x": x,
            "depthwise_weight": weights,
            "grad_output": p.N * p.K * self.window_rows * p.out_w * size,
            "grad_x": p.x_bytes,
            "partial_weight": 2 * self.tiling.parts * p.K * p.taps * 4,  # written, and read to be added
            "affine": affine,
        }

    def bytes(self) -> int:
        return sum(self.bytes_by_tensor().values())


def _slot_pieces(elements: int, dtype: str) -> int:
    """`slot_pieces` in csrc/depthwise/nchw.cuh."""
    return (elements * ELEMENT_BYTES[dtype] + 31) // PIECE


def _pieces(problem: DepthwiseProblem, traits: NchwTraits, rows: int) -> tuple[int, int]:
    """Of an image's slots for a band of `rows` rows: for x, and for the output or its gradient."""
    window = traits.window(problem, rows)
    x, y = (window, rows) if traits.forward else (traits.x_window(problem, rows), window)
    return (
        _slot_pieces(min(x, problem.H) * problem.W, problem.dtype),
        _slot_pieces(min(y, problem.out_h) * problem.out_w, problem.dtype),
    )


def _shared_bytes(problem: DepthwiseProblem, traits: NchwTraits, images: int, rows: int) -> int:
    """Two units of what is read, and one of what is made of it."""
    x, y = _pieces(problem, traits, rows)
    if traits.forward:
        return images * (2 * x + y) * PIECE
    sums = THREADS // 32 * problem.taps * 4
    beside = traits.normalised or problem.pre_activation not in (None, "relu")
    return max(sums, images * (2 * y + (3 if beside else 2) * x) * PIECE)


def _span(problem: DepthwiseProblem, traits: NchwTraits, axis: int) -> tuple[int, int]:
    """(first, count) of the rows or columns to go through: of the output, or in the backward of x with its padding, and
    of where the outputs' gradients are counted for the bias."""
    outputs = (problem.out_h, problem.out_w)[axis]
    if traits.forward:
        return 0, outputs
    stride, before, size = problem.stride[axis], problem.padding[2 * axis], (problem.H, problem.W)[axis]
    owner = _reach(problem, axis) // 2
    first, last = min(before, owner), max(size - 1 + before, stride * (outputs - 1) + owner)
    first -= first % stride
    return first, last - first + 1


def cuts(problem: DepthwiseProblem, traits: NchwTraits, device: Device) -> Iterator[NchwCut]:
    """Ways to cut a problem that are worth comparing."""
    first_row, height = _span(problem, traits, 0)
    first_column, width = _span(problem, traits, 1)
    across, down = _items(problem, 1, width, COLUMNS), _items(problem, 0, height, traits.rows)
    whole = traits.rows * _item_pitch(problem, 0)  # rows that items take whole
    for items in (THREADS, 2 * THREADS, 4 * THREADS, 8 * THREADS):  # of a unit: whole turns of a block's threads
        images = max(1, min(problem.N, items // (across * down)))
        bands = ceil(across * down / items) if images == 1 else 1
        rows = ceil(ceil(height / whole) / bands) * whole
        shared_bytes = _shared_bytes(problem, traits, images, rows)
        if shared_bytes > device.shared_bytes:
            continue
        bands = ceil(height / rows)
        units = ceil(problem.N / images) * bands
        concurrent = device.sms * device.blocks_per_sm(THREADS, traits.registers, shared_bytes)
        for share in (2, 4, 8):
            units_per_part = max(1, ceil(units / max(1, share * concurrent // problem.K // 4)))
            tiling = NchwTiling(
                images=images,
                rows=rows,
                bands=bands,
                first_row=first_row,
                first_column=first_column,
                columns=width,
                units_per_part=units_per_part,
                parts=max(1, ceil(units / units_per_part)),
                shared_bytes=shared_bytes,
            )
            yield NchwCut(problem, traits, tiling)


def shared_cycles_of_unit(cut: NchwCut) -> float:
    """Of a block's accesses to shared memory, bank conflicts counted: its items, and the pieces that come and go."""
    t, p, traits = cut.tiling, cut.problem, cut.traits
    items = _items(p, 1, t.columns, COLUMNS) * _items(p, 0, t.rows, traits.rows)
    x, y = _pieces(p, traits, t.rows)
    total = items * traits.shared_cycles + (x + y) * PIECE // 4  # a warp's pieces meet each bank PIECE // 4 times
    if not traits.forward:
        total += x * PIECE // 4  # the gradient goes out as x came
        if p.mid_activation:
            rows = min(traits.window(p, t.rows), p.out_h)
            total += _items(p, 1, p.out_w, COLUMNS) * rows * traits.mid_shared_cycles
    return t.images * total / 32


def instructions_of_unit(cut: NchwCut) -> float:
    """Of all threads of a block: whole turns of them, for its items and for the pieces that come and go."""
    t, p, traits = cut.tiling, cut.problem, cut.traits

    def turns(count: int) -> int:
        return THREADS * ceil(t.images * count / THREADS)

    total = turns(_items(p, 1, t.columns, COLUMNS) * _items(p, 0, t.rows, traits.rows)) * traits.instructions
    x, y = _pieces(p, traits, t.rows)
    values = PIECE // p.element_bytes
    activation = {None: 0, "relu": 30}.get(p.pre_activation, 30 + values * ACTIVATION_INSTRUCTIONS)
    if traits.normalised:
        activation += 20 + values * NORMALISED_INSTRUCTIONS
    total += turns(x) * (COPY_INSTRUCTIONS + activation)
    if traits.forward:
        total += turns(y) * STORE_INSTRUCTIONS
        if p.mid_activation not in (None, "relu"):  # an element at a time
            total += turns(y * values) * (ACTIVATION_INSTRUCTIONS + 15)
        return total
    total += turns(y) * COPY_INSTRUCTIONS + turns(x) * STORE_INSTRUCTIONS
    if traits.normalised:  # its two sums
        total += turns(x * values) * (6 if p.pre_activation == "relu" else 4)
    if p.pre_activation != "relu" and (p.pre_activation or traits.normalised):  # its derivative, an element at a time
        total += turns(x * values) * (ACTIVATION_INSTRUCTIONS + 20)
    if p.mid_activation:
        rows = min(traits.window(p, t.rows), p.out_h)
        total += turns(_items(p, 1, p.out_w, COLUMNS) * rows) * traits.mid_instructions
    return total
