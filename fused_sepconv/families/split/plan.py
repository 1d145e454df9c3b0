"""The split family: our depthwise kernel, and PyTorch's own 1x1 beside it.

Near the floor of two kernels, and the answer wherever fusing does not pay. The depthwise result goes through device
memory. Where the forward saves it, the backward reads it for the gradient of the pointwise weight; else it computes it
again, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.pytorch.plan import LIBRARY_MATRIX
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import LAUNCH_SECONDS, LIBRARY_BANDWIDTH, Candidate, Kernels, Problem, mostly
from fused_sepconv.tensors.activations import ACTIVATIONS

INPUT_PASS = "of the depthwise result"
WEIGHT_PASS = "of the pointwise weight"


@dataclass(frozen=True)
class Pass:
    """A kernel of PyTorch's: what it moves and multiplies."""

    name: str
    bytes: int
    flops: int = 0

    def seconds(self, problem: Problem, device: Device) -> float:
        matrix = device.matrix(problem.dtype, problem.tf32) * LIBRARY_MATRIX
        return LAUNCH_SECONDS + max(self.bytes / (device.bandwidth * LIBRARY_BANDWIDTH), self.flops / matrix)


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The fastest depthwise kernels that can run the problem, with the 1x1 as PyTorch runs it fastest."""
    again = problem.direction == "backward" and not problem.saved
    inner = convolution(problem)
    directions = ("forward", "backward") if again else (problem.direction,)
    steps = [depthwise.best(inner.depthwise(direction), device, kernels) for direction in directions]
    name = f"split: {steps[-1].name}"
    for step in steps:
        if step.refusal:
            return [Candidate("split", name, refusal=step.refusal)]
    how, passes = pointwise(problem)
    passes = [*_mid_activation(problem, inner), *passes]
    return [
        Candidate(
            family="split",
            name=name,
            bytes=sum(step.bytes for step in steps) + sum(p.bytes for p in passes),
            flops=sum(step.flops for step in steps) + sum(p.flops for p in passes),
            blocks=steps[-1].blocks,
            waves=steps[-1].waves,
            shared_bytes=max(step.shared_bytes for step in steps),
            predicted_seconds=sum(step.predicted_seconds for step in steps)
            + sum(p.seconds(problem, device) for p in passes),
            bound=bound(steps, passes, problem, device),
            steps=tuple(steps),
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


def _mid_activation(problem: Problem, inner: Problem) -> list[Pass]:
    """What PyTorch has to do for the mid-activation, where our kernels do not."""
    if inner.mid_activation == problem.mid_activation:
        return []
    t, smooth = problem.intermediate_bytes, ACTIVATIONS[problem.mid_activation].from_output is None
    passes = [Pass("mid-activation", 2 * t)] if smooth else []  # v of t
    return passes if problem.direction == "forward" else [*passes, Pass("mid-activation", 3 * t)]


def bound(steps: Sequence[Candidate], passes: Sequence[Pass], problem: Problem, device: Device) -> str:
    """What most of the time goes to: of our kernels, or of PyTorch's."""
    ours = ((f"{step.bound} in {step.name}", step.predicted_seconds) for step in steps)
    return mostly((*ours, *(("PyTorch's 1x1" if p.flops else p.name, p.seconds(problem, device)) for p in passes)))


def pointwise(problem: Problem) -> tuple[str, list[Pass]]:
    """How PyTorch should run the 1x1, and its passes: "conv2d", or "matmul" on the pixels as rows.

    Both are one product. A matmul on 16-bit NHWC pixels carries the bias in its epilogue, which PyTorch's convolution
    adds in a pass of its own. (It could carry relu too, but PyTorch's does not keep NaN there.) In float32 a matmul
    would go by matmul's precision flags, not by convolution's; in NCHW the pixels are no rows.
    """
    t, y = problem.intermediate_bytes, problem.y_bytes
    product = t + y + problem.bytes_of(problem.K * problem.F)
    rows = problem.layout == "nhwc" and problem.dtype in ("float16", "bfloat16")
    how = "matmul" if rows else "conv2d"
    if problem.direction == "forward":
        passes = [Pass("1x1", product, problem.pointwise_flops)]
        if problem.residual:
            passes.append(Pass("residual", 3 * y))
        if problem.activation:
            passes.append(Pass("activation", 2 * y))
        return how, passes
    passes = [Pass("activation", 3 * y)] if problem.activation else []
    passes.append(Pass(INPUT_PASS, product, problem.pointwise_flops))
    passes.append(Pass(WEIGHT_PASS, product, problem.pointwise_flops))
    return how, passes
