"""The split family: our depthwise kernel, and PyTorch's own 1x1 beside it.

Near the floor of two kernels, and the answer wherever fusing does not pay. The depthwise result goes through device
memory. Where the forward saves it, the backward reads it for the gradient of the pointwise weight; else it computes it
again, once.
"""

from __future__ import annotations

from dataclasses import replace

from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.pytorch.plan import product
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, Kernels, Problem, Work, combined, elementwise
from fused_sepconv.tensors.activations import ACTIVATIONS


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fastest depthwise kernels that can run the problem, with the 1x1 as PyTorch runs it fastest."""
    again = problem.direction == "backward" and not problem.saved
    inner = convolution(problem)
    directions = ("forward", "backward") if again else (problem.direction,)
    steps = tuple(depthwise.best(inner.depthwise(direction), device, kernels) for direction in directions)
    name = f"split: {steps[-1].name}"
    for step in steps:
        if step.refusal:
            return [Candidate("split", name, refusal=step.refusal)]
    how = pointwise(problem)
    products = [product(problem, device)] * (1 if problem.direction == "forward" else 2)
    between = _mid_activation(problem, inner, device)
    work = [*(step.work for step in steps), *between, *products, *around(problem, device)]
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
            recomputes=again,
            note=f"1x1 by {how}",
        )
    ]


def convolution(problem: Problem) -> Problem:
    """The problem whose depthwise half our kernels run.

    Where the result is saved they have a mid-activation only in a forward that saves v: whatever derives from what was
    saved needs no kernel that computes it again.
    """
    writes_v = problem.direction == "forward" and ACTIVATIONS[problem.mid_activation].from_output is not None
    if not problem.saved or problem.mid_activation is None or writes_v:
        return problem
    return replace(problem, mid_activation=None)


def _mid_activation(problem: Problem, inner: Problem, device: Device) -> list[Work]:
    """What PyTorch has to do for the mid-activation, where our kernels do not."""
    if inner.mid_activation == problem.mid_activation:
        return []
    t, smooth = problem.intermediate_bytes, ACTIVATIONS[problem.mid_activation].from_output is None
    work = [elementwise(device, 2 * t)] if smooth else []  # v of t
    return work if problem.direction == "forward" else [*work, elementwise(device, 3 * t)]


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
