"""The backward of the tensor-core family: the pointwise weight's gradient by one kernel; those of x and of the
depthwise weight by another, or as the split family has them.

The depthwise result is computed again inside the kernel that needs it, and goes through device memory only where the
last activation's gradient can't be read from its output. The gradient of it does where PyTorch computes it.
"""

from __future__ import annotations

from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.mma import backward_input as mma_input
from fused_sepconv.families.mma import backward_weight as mma_weight
from fused_sepconv.families.split import plan as split
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, Kernels, Problem
from fused_sepconv.tensors.activations import ACTIVATIONS


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """Backwards of NHWC; the forward is tensor.py's, and NCHW mma_nchw.py's.

    Their steps: the pointwise weight's gradient; the depthwise result, which runs only where z is computed again; and
    what leads to x: mma_input.py's step, or after PyTorch's product the split family's.
    """
    if problem.direction != "backward" or problem.layout != "nhwc":
        return []
    weight = mma_weight.best(problem, device, kernels)
    again, one_pass = (depthwise.best(problem.depthwise(d), device, kernels) for d in ("forward", "backward"))
    fused = mma_input.step(problem, device, kernels)
    for step in (weight, again, one_pass if fused.refusal else fused):
        if step.refusal:
            return [Candidate("mma", weight.name, refusal=step.refusal)]
    how, passes = split.pointwise(problem)
    passes = [p for p in passes if p.name != split.WEIGHT_PASS]
    product = [p for p in passes if p.name == split.INPUT_PASS]
    unfused = _seconds([one_pass], product, problem, device)
    found = []
    if not fused.refusal:
        passes_without = [p for p in passes if p.name != split.INPUT_PASS]
        note = f"then {fused.name} in {fused.predicted_seconds * 1e6:.1f} us: {fused.note}"
        found.append(_candidate(problem, device, weight, again, fused, passes_without, how, note))
    if not one_pass.refusal:
        note = f"then {how} and {one_pass.name} in {unfused * 1e6:.1f} us"
        if fused.refusal:
            note += f", as {fused.refusal}"
        found.append(_candidate(problem, device, weight, again, one_pass, passes, how, note))
    return found


def _candidate(
    problem: Problem,
    device: Device,
    weight: Candidate,
    again: Candidate,
    to_input: Candidate,
    passes: list[split.Pass],
    how: str,
    note: str,
) -> Candidate:
    steps = [weight, to_input]
    if problem.activation and ACTIVATIONS[problem.activation].from_output is None:
        steps.append(again)
    return Candidate(
        family="mma",
        name=f"{weight.name} + {to_input.name}",
        bytes=sum(step.bytes for step in steps) + sum(p.bytes for p in passes),
        flops=sum(step.flops for step in steps) + sum(p.flops for p in passes),
        blocks=weight.blocks,
        waves=weight.waves,
        shared_bytes=max(step.shared_bytes for step in steps),
        predicted_seconds=_seconds(steps, passes, problem, device),
        bound=split.bound(steps, passes, problem, device),
        steps=(weight, again, to_input),
        pointwise=how,
        note=f"gradient of the pointwise weight in {weight.predicted_seconds * 1e6:.1f} us: {weight.note}; {note}",
    )


def _seconds(steps: list[Candidate], passes: list[split.Pass], problem: Problem, device: Device) -> float:
    return sum(step.predicted_seconds for step in steps) + sum(p.seconds(problem, device) for p in passes)
