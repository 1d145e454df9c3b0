"""The least time in which a device can do the work: what perfect kernels would take.

A kernel takes as long as the slowest of three things, and the other two hide behind it: the bytes it moves, the
products on the tensor cores, the depthwise taps on the CUDA cores. Each tensor that a kernel touches moves once: what
neighbouring blocks read twice is found in L2. Between kernels nothing overlaps and nothing stays in L2. Launches cost
nothing. Depthwise weights, biases and BatchNorm's vectors are too few to count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from layers import Layer

BYTES_PER_ELEMENT = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a tensor's element in device memory, by the name of the arithmetic."""


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of a device: bytes and flops a second."""

    device: str
    source: str
    bytes_per_second: float
    """Device memory, bytes read plus bytes written."""
    fma_flops: float
    """CUDA cores, float32, flop/s: a multiply-add is two flops."""
    matrix_flops: Mapping[str, float]
    """Tensor cores, flop/s, by dtype. A dtype that is not here multiplies matrices on the CUDA cores."""

    def matrix(self, dtype: str) -> float:
        """Flop/s of a matrix product in this dtype."""
        return self.matrix_flops.get(dtype, self.fma_flops)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        products = {"float32": self.fma_flops, **self.matrix_flops}
        return f"copy {self.bytes_per_second / 1e9:.0f} GB/s, products in " + ", ".join(
            f"{dtype} {flops / 1e12:.3g} TFLOP/s" for dtype, flops in products.items()
        )


H200 = Ceilings(
    device="H200",
    source="measured on an H200: device-to-device copy, cuBLAS products, float32 FMA loop (float16 taken as bfloat16)",
    bytes_per_second=4.3e12,
    fma_flops=67e12,
    matrix_flops={"bfloat16": 790e12, "float16": 790e12, "tf32": 400e12},
)


class Kernel(NamedTuple):
    """Bytes that one kernel moves, and flops that it computes."""

    bytes: float
    """Device memory, read plus written."""
    matrix_flops: float = 0.0
    """Products of matrices: 2 flops a multiply-add."""
    fma_flops: float = 0.0
    """The depthwise taps: 2 flops a multiply-add."""

    def seconds(self, dtype: str, ceilings: Ceilings = H200) -> float:
        moving = self.bytes / ceilings.bytes_per_second
        if dtype not in ceilings.matrix_flops:
            return max(moving, (self.matrix_flops + self.fma_flops) / ceilings.fma_flops)
        return max(moving, self.matrix_flops / ceilings.matrix_flops[dtype], self.fma_flops / ceilings.fma_flops)


class Floor(NamedTuple):
    """The least that a pass moves, computes and takes."""

    bytes: int
    flops: int
    matrix_flops: int
    """Flops of the matrix products, a part of `flops`."""
    milliseconds: float


def floor_of(kernels: Sequence[Kernel], dtype: str, ceilings: Ceilings = H200) -> Floor:
    """The floor of kernels that run one after the other."""
    moved, products, taps = (sum(part) for part in zip(*kernels, strict=True))
    seconds = sum(kernel.seconds(dtype, ceilings) for kernel in kernels)
    return Floor(int(moved), int(products + taps), int(products), seconds * 1e3)


class Quantities(NamedTuple):
    """The sizes of a layer's tensors in bytes, and the flops of one sweep of each of its two convolutions."""

    x: float
    t: float
    """The depthwise convolution's result: as large as x where the stride is 1."""
    y: float
    weights: float
    """The pointwise ones."""
    product: float
    taps: float


def quantities(layer: Layer, batch: int, dtype: str) -> Quantities:
    pixels, out_pixels = batch * layer.size**2, batch * layer.out_size**2
    element = BYTES_PER_ELEMENT[dtype]
    return Quantities(
        x=pixels * layer.in_channels * element,
        t=out_pixels * layer.in_channels * element,
        y=out_pixels * layer.out_channels * element,
        weights=layer.in_channels * layer.out_channels * element,
        product=2.0 * out_pixels * layer.in_channels * layer.out_channels,
        taps=2.0 * layer.kernel_size**2 * out_pixels * layer.in_channels,
    )


def forward_unfused(q: Quantities) -> list[Kernel]:
    """As every framework does it: the depthwise result goes out to memory and comes back."""
    return [Kernel(q.x + q.t, fma_flops=q.taps), Kernel(q.t + q.y + q.weights, q.product)]


def forward_fused(q: Quantities) -> list[Kernel]:
    """x is read once, y is written once."""
    return [Kernel(q.x + q.y + q.weights, q.product, q.taps)]


def backward_unfused(q: Quantities) -> list[Kernel]:
    """Each convolution's input gradient and weight gradient is a kernel; the depthwise result was kept."""
    return [Kernel(q.t + q.y + q.weights, q.product)] * 2 + [Kernel(q.t + q.x, fma_flops=q.taps)] * 2


def backward_one_pass(q: Quantities) -> list[Kernel]:
    """Floor of a backward: x and grad_y are read once, grad_x is written once."""
    return [Kernel(2 * q.x + q.y + 2 * q.weights, 2 * q.product, 3 * q.taps)]


_FUSED = {"fwd": (forward_fused,), "bwd": (backward_one_pass,), "both": (forward_fused, backward_one_pass)}
_UNFUSED = {"fwd": (forward_unfused,), "bwd": (backward_unfused,), "both": (forward_unfused, backward_unfused)}


def floor(
    layer: Layer, batch: int, dtype: str, direction: str, *, fused: bool = True, ceilings: Ceilings = H200
) -> Floor:
    """The floor of a pass ("fwd", "bwd" or "both"), of the fused problem or of two separate convolutions."""
    sizes = quantities(layer, batch, dtype)
    models = (_FUSED if fused else _UNFUSED)[direction]
    return floor_of([kernel for model in models for kernel in model(sizes)], dtype, ceilings)


def network_floor(layers: Sequence[Layer], batch: int, dtype: str, direction: str, **how: Any) -> Floor:
    """The sum over a network's separable convolutions, each as often as the network has it."""
    each = [(layer.count, floor(layer, batch, dtype, direction, **how)) for layer in layers]
    return Floor(*(sum(count * part[kind] for count, part in each) for kind in range(len(Floor._fields))))
