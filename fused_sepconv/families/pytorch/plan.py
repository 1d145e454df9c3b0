"""PyTorch's own convolutions as a family: they run every valid problem."""

from __future__ import annotations

from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import (
    LAUNCH_SECONDS,
    LIBRARY_BANDWIDTH,
    Candidate,
    Kernels,
    Problem,
    Work,
    combined,
    elementwise,
)
from fused_sepconv.tensors.activations import ACTIVATIONS

# cuDNN's NHWC depthwise kernel has been measured 3.5 to 7 times slower than a plain good one (on a B200; see also
# pytorch/pytorch#18631); PyTorch's native NCHW one is taken to be alike.
LIBRARY_DEPTHWISE_BANDWIDTH = 0.2
LIBRARY_MATRIX = 0.75  # assumed, until measured: cuBLAS on these shapes, of its peak


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """PyTorch's own operators, one kernel each: every tensor goes through device memory between them."""
    x, t, y = problem.x_bytes, problem.intermediate_bytes, problem.y_bytes
    forward = problem.direction == "forward"
    moved = x + t + problem.bytes_of(problem.K * problem.taps)
    seconds = LAUNCH_SECONDS + moved / (device.bandwidth * LIBRARY_DEPTHWISE_BANDWIDTH)
    depthwise = Work("the depthwise convolution", moved, problem.depthwise_flops, seconds)
    # A backward has a kernel for the gradient of an input and one for the weight's. An activation reads its argument
    # and writes, its backward reads the gradient besides.
    kernels_each, passes = (1, 2) if forward else (2, 3)
    again = not forward and not problem.saved
    work = [depthwise, product(problem, device)] * kernels_each
    if not forward:
        work += _computed_again(problem, device, depthwise)
    if problem.pre_activation:
        work.append(elementwise(device, passes * x))
    if problem.mid_activation:
        work.append(elementwise(device, passes * t))
    if problem.residual and forward:
        work.append(elementwise(device, 3 * y))
    if problem.activation:
        work.append(elementwise(device, passes * y))
    return [Candidate("pytorch", "pytorch", **combined(work), recomputes=again)]


def _computed_again(problem: Problem, device: Device, depthwise: Work) -> list[Work]:
    """What a backward needs of its forward and was not saved."""
    x, t, y = problem.x_bytes, problem.intermediate_bytes, problem.y_bytes
    work = [] if problem.saved else [depthwise]
    if problem.pre_activation:
        work.append(elementwise(device, 2 * x))
    # Of an activation whose derivative needs its argument, that is saved; else its result.
    if problem.mid_activation and (not problem.saved or ACTIVATIONS[problem.mid_activation].from_output is None):
        work.append(elementwise(device, 2 * t))
    if ACTIVATIONS[problem.activation].from_output is None:
        work.append(product(problem, device))
        work += [elementwise(device, 3 * y)] if problem.residual else []
    return work


def product(problem: Problem, device: Device) -> Work:
    """PyTorch's 1x1, or one of its gradients."""
    moved = problem.intermediate_bytes + problem.y_bytes + problem.bytes_of(problem.K * problem.F)
    matrix = device.matrix(problem.dtype, problem.tf32) * LIBRARY_MATRIX
    seconds = max(moved / (device.bandwidth * LIBRARY_BANDWIDTH), problem.pointwise_flops / matrix)
    return Work("PyTorch's 1x1", moved, problem.pointwise_flops, LAUNCH_SECONDS + seconds)
