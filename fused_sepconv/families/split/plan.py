"""The split family: our depthwise kernel, and PyTorch's own 1x1 beside it.

Near the floor of two kernels, and the answer wherever fusing does not pay. The depthwise result goes through device
memory; the backward computes it again, once, for the gradient of the pointwise weight.
"""

from __future__ import annotations

from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.pytorch.plan import product
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, Kernels, Problem, Work, combined, elementwise


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fastest depthwise kernels that can run the problem, with the 1x1 as PyTorch runs it fastest."""
    directions = ("forward",) if problem.direction == "forward" else ("forward", "backward")
    steps = tuple(depthwise.best(problem.depthwise(direction), device, kernels) for direction in directions)
    name = f"split: {steps[-1].name}"
    for step in steps:
        if step.refusal:
            return [Candidate("split", name, refusal=step.refusal)]
    how = pointwise(problem)
    work = [*(step.work for step in steps), *[product(problem, device)] * len(steps), *around(problem, device)]
    return [
        Candidate(
            "split",
            name,
            **combined(work),
            blocks=steps[-1].blocks,
            waves=steps[-1].waves,
            shared_bytes=max(step.shared_bytes for step in steps),
            steps=steps,
            pointwise=how,
            note=f"1x1 by {how}",
        )
    ]


def pointwise(problem: Problem) -> str:
    """How PyTorch should run the 1x1: "conv2d", or "matmul" on the pixels as rows.

    Both are one product. A matmul on 16-bit NHWC pixels carries the bias in its epilogue, which PyTorch's convolution
    adds in a pass of its own. (It could carry relu too, but PyTorch's does not keep NaN there.) In float32 a matmul
    would go by matmul's precision flags, not by convolution's; in NCHW the pixels are no rows.
    """
    rows = problem.layout == "nhwc" and problem.dtype in ("float16", "bfloat16")
    return "matmul" if rows else "conv2d"


def around(problem: Problem, device: Device) -> list[Work]:
    """PyTorch's passes beside the 1x1: the residual and the last activation, or its gradient."""
    y, forward = problem.y_bytes, problem.direction == "forward"
    residual = [elementwise(device, 3 * y)] if problem.residual and forward else []
    return [*residual, *([elementwise(device, (2 if forward else 3) * y)] if problem.activation else [])]
