"""The backward of the tensor-core family: the pointwise weight's gradient by one kernel; those of x and of the
depthwise weight by another, or as the split family has them.

The depthwise result is computed again inside the kernel that needs it, and goes through device memory only where the
last activation's gradient can't be read from its output. The gradient of it does where PyTorch computes it.
"""

from __future__ import annotations

from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.mma import backward_input as mma_input
from fused_sepconv.families.mma import backward_weight as mma_weight
from fused_sepconv.families.pytorch.plan import product
from fused_sepconv.families.split import plan as split
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, Kernels, Problem, combined
from fused_sepconv.tensors.activations import ACTIVATIONS


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """Backwards of NHWC; the forward is in forward.py, and NCHW in nchw.py.

    Their steps: the pointwise weight's gradient; the depthwise result, which runs only where z is computed again; and
    what leads to x: backward_input.py's step, or after PyTorch's product the split family's.
    """
    if problem.direction != "backward" or problem.layout != "nhwc":
        return []
    weight = mma_weight.best(problem, device, kernels)
    again, one_pass = (depthwise.best(problem.depthwise(d), device, kernels) for d in ("forward", "backward"))
    fused = mma_input.step(problem, device, kernels)
    for step in (weight, again, one_pass if fused.refusal else fused):
        if step.refusal:
            return [Candidate("mma", weight.name, refusal=step.refusal)]
    how, around = split.pointwise(problem), split.around(problem, device)
    if problem.activation and ACTIVATIONS[problem.activation].from_output is None:
        around.append(again.work)
    because = f", as {fused.refusal}" if fused.refusal else ""
    ways = [(fused, around, f"{fused.name}: {fused.note}")]
    ways.append((one_pass, [*around, product(problem, device)], f"{how} and {one_pass.name}{because}"))
    return [
        Candidate(
            "mma",
            f"{weight.name} + {to_input.name}",
            **combined([weight.work, to_input.work, *others]),
            blocks=weight.blocks,
            waves=weight.waves,
            shared_bytes=max(weight.shared_bytes, to_input.shared_bytes),
            steps=(weight, again, to_input),
            pointwise=how,
            note=f"{weight.note}; then {then}",
        )
        for to_input, others, then in ways
        if not to_input.refusal
    ]
