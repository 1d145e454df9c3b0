"""The reference as a family: PyTorch's own convolutions, which serve every legal problem."""

from __future__ import annotations

from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import LAUNCH_SECONDS, LIBRARY_BANDWIDTH, Candidate, Kernels, Problem, mostly
from fused_sepconv.tensors.activations import ACTIVATIONS

# cuDNN's NHWC depthwise kernel has been measured 3.5 to 7 times slower than a plain good one (on a B200; see also
# pytorch/pytorch#18631); PyTorch's native NCHW one is taken to be alike.
LIBRARY_DEPTHWISE_BANDWIDTH = 0.2
LIBRARY_MATRIX = 0.75  # assumed, until measured: cuBLAS on these shapes, of its peak


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """PyTorch's own operators, one kernel each: every tensor goes through device memory between them."""
    x, t, y, weights = problem.x_bytes, problem.intermediate_bytes, problem.y_bytes, problem.weight_bytes
    matrix = device.matrix(problem.dtype, problem.tf32) * LIBRARY_MATRIX
    passes: list[tuple[int, float, str]] = []  # (bytes, seconds, what) of each kernel

    def elementwise(byte_count: int) -> None:
        passes.append((byte_count, byte_count / (device.bandwidth * LIBRARY_BANDWIDTH), "elementwise passes"))

    def depthwise(byte_count: int) -> None:
        seconds = byte_count / (device.bandwidth * LIBRARY_DEPTHWISE_BANDWIDTH)
        passes.append((byte_count, seconds, "the depthwise convolution"))

    def pointwise(byte_count: int) -> None:
        seconds = max(byte_count / (device.bandwidth * LIBRARY_BANDWIDTH), problem.pointwise_flops / matrix)
        passes.append((byte_count, seconds, "the 1x1"))

    if problem.direction == "forward":
        if problem.pre_activation:
            elementwise(2 * x)
        depthwise(x + t)
        if problem.mid_activation:
            elementwise(2 * t)
        pointwise(t + y + weights)
        if problem.residual:
            elementwise(3 * y)
        if problem.activation:
            elementwise(2 * y)
    else:
        if problem.pre_activation:
            elementwise(2 * x)  # PyTorch's convolution reads it, and it is not saved
        if not problem.saved:
            depthwise(x + t)
            if problem.mid_activation:
                elementwise(2 * t)
        elif ACTIVATIONS[problem.mid_activation].from_output is None:
            elementwise(2 * t)  # t is saved, and v is wanted too
        if problem.activation:
            if ACTIVATIONS[problem.activation].from_output is None:  # of z, which is computed again
                pointwise(t + y + weights)
                if problem.residual:
                    elementwise(3 * y)
            elementwise(3 * y)
        pointwise(y + t + weights)  # of the depthwise result
        pointwise(y + t + weights)  # of the pointwise weight
        if problem.mid_activation:
            elementwise(3 * t)
        depthwise(t + x)  # of x
        depthwise(t + x)  # of the depthwise weight
        if problem.pre_activation:
            elementwise(3 * x)
    sweeps = 1 if problem.direction == "forward" else 2
    again = problem.direction == "backward" and not problem.saved
    candidate = Candidate(
        family="reference",
        name="reference",
        bytes=sum(byte_count for byte_count, _, _ in passes),
        flops=sweeps * (problem.pointwise_flops + problem.depthwise_flops) + again * problem.depthwise_flops,
        predicted_seconds=sum(seconds + LAUNCH_SECONDS for _, seconds, _ in passes),
        bound=mostly((what, seconds) for _, seconds, what in passes),
        recomputes=again,
    )
    return [candidate]
