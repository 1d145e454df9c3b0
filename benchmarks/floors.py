"""The least time in which a device can do the work: what perfect kernels would take.

A kernel takes as long as the slowest of three things, and the other two hide behind it: the bytes it moves, the
products on the tensor cores, the depthwise taps on the CUDA cores. Each tensor that a kernel touches moves once: what
neighbouring blocks read twice is found in L2. Between kernels nothing overlaps and nothing stays in L2. Launches cost
nothing. Biases and BatchNorm's vectors are too few to count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from layers import Layer

from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Problem


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of a device: bytes and flops a second."""

    device: str
    source: str
    bytes_per_second: float  # device memory, bytes read plus bytes written
    fma_flops: float  # CUDA cores, float32, flop/s: a multiply-add is two flops
    matrix_flops: Mapping[str, float]
    """Tensor cores, flop/s, by dtype. A dtype that is not here multiplies matrices on the CUDA cores."""

    def matrix(self, dtype: str) -> float:
        """Flop/s of a matrix product in this dtype."""
        return self.matrix_flops.get(dtype, self.fma_flops)

    def planned(self, dtype: str) -> Device:
        """The device as the package's own floors know it, for problems of this dtype."""
        matrix, fma = self.matrix(dtype), self.fma_flops
        return Device(self.device, 1, 0, self.bytes_per_second, fma, fma, matrix, matrix, self.source)

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


class Floor(NamedTuple):
    """The least that a pass moves, computes and takes."""

    bytes: int
    flops: int
    matrix_flops: int  # flops of the matrix products, a part of `flops`
    milliseconds: float


def problem_of(layer: Layer, batch: int, dtype: str, direction: str) -> Problem:
    """A layer's forward or backward as the package plans it."""
    size, out, padding = layer.size, layer.out_size, layer.padding
    return Problem(
        direction=direction, N=batch, C=layer.in_channels, H=size, W=size, F=layer.out_channels, multiplier=1,
        kernel=(layer.kernel_size,) * 2, stride=(layer.stride,) * 2, padding=(padding,) * 4,
        dilation=(layer.dilation,) * 2, out_h=out, out_w=out, dtype="float32" if dtype == "tf32" else dtype,
        layout="nhwc", tf32=dtype == "tf32",
    )  # fmt: skip


def floor(
    layer: Layer, batch: int, dtype: str, direction: str, *, fused: bool = True, ceilings: Ceilings = H200
) -> Floor:
    """The floor of a pass ("fwd", "bwd" or "both"), of the fused problem or of two separate convolutions."""
    if direction == "both":
        halves = [floor(layer, batch, dtype, way, fused=fused, ceilings=ceilings) for way in ("fwd", "bwd")]
        return Floor(*map(sum, zip(*halves, strict=True)))
    forward = direction == "fwd"
    p, device = problem_of(layer, batch, dtype, "forward" if forward else "backward"), ceilings.planned(dtype)
    products = (1 if forward else 2) * p.pointwise_flops
    if fused:  # x is read once, y written once; a backward computes the depthwise result again
        flops = products + (1 if forward else 3) * p.depthwise_flops
        return Floor(p.least_bytes, flops, products, p.floor_seconds(device) * 1e3)
    # A kernel for each convolution, or for each of its two gradients: the depthwise result goes out and comes back.
    times = 1 if forward else 2
    t, weights = p.intermediate_bytes, p.bytes_of(p.K * p.F)
    taps = max((p.x_bytes + t) / device.bandwidth, p.depthwise_flops / device.fma_float32)
    product = max((t + p.y_bytes + weights) / device.bandwidth, p.pointwise_flops / device.matrix(p.dtype, p.tf32))
    moved = times * (p.x_bytes + 2 * t + p.y_bytes + weights)
    return Floor(moved, products + times * p.depthwise_flops, products, times * (taps + product) * 1e3)


def network_floor(layers: Sequence[Layer], batch: int, dtype: str, direction: str, **how: Any) -> Floor:
    """The sum over a network's separable convolutions, each as often as the network has it."""
    each = [(layer.count, floor(layer, batch, dtype, direction, **how)) for layer in layers]
    return Floor(*(sum(count * part[kind] for count, part in each) for kind in range(len(Floor._fields))))
