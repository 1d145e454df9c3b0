"""The backward of the tensor-core family: the pointwise weight's gradient by our kernel, the rest as the split family.

The depthwise result is computed again inside the kernel that needs it, and goes through device memory only where the
last activation's gradient can't be read from its output.
"""

from __future__ import annotations

from ..activations import ACTIVATIONS
from ..devices import Device
from ..problem import Candidate, Kernels, Problem
from . import split, tensor_weight


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """One backward; the forward is tensor.py's.

    Its steps: the pointwise weight's gradient, then those of the split family, of which the first, the depthwise
    result, runs only where z is computed again.
    """
    if problem.direction != "backward":
        return []
    weight = tensor_weight.best(problem, device, kernels)
    again, *through_mid, one_pass = split.backward_steps(problem, device, kernels)
    for step in (weight, again, one_pass):
        if step.refusal:
            return [Candidate("tensor", weight.name, refusal=step.refusal)]
    how, passes = split.pointwise(problem)
    passes = [p for p in passes if p.name != split.WEIGHT_PASS]
    steps = [weight, *through_mid, one_pass]
    if problem.activation and ACTIVATIONS[problem.activation].from_output is None:
        steps.append(again)
    return [
        Candidate(
            family="tensor",
            name=weight.name,
            bytes=sum(step.bytes for step in steps) + sum(p.bytes for p in passes),
            flops=sum(step.flops for step in steps) + sum(p.flops for p in passes),
            blocks=weight.blocks,
            waves=weight.waves,
            shared_bytes=max(step.shared_bytes for step in steps),
            predicted_seconds=sum(step.predicted_seconds for step in steps)
            + sum(p.seconds(problem, device) for p in passes),
            steps=(weight, again, *through_mid, one_pass),
            pointwise=how,
            note=f"gradient of the pointwise weight in {weight.predicted_seconds * 1e6:.1f} us: {weight.note}; "
            f"then {one_pass.name}",
        )
    ]
