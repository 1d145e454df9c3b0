"""The tensor-core family for NCHW: its kernels for NHWC, between conversions there and back.

A row of an NCHW image of 147, 37 or 19 elements of 16 bits is aligned to 2 bytes: neither cp.async nor 16-byte accesses
apply to it. PyTorch's copies convert at the speed of memory; a plan says what they cost.
"""

from __future__ import annotations

from dataclasses import replace

from fused_sepconv.families.mma import backward as mma_backward
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, Kernels, Problem, Work, combined, elementwise


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """The family's candidates for the same problem in NHWC, with the conversions."""
    if problem.layout != "nchw":
        return []
    forward = problem.direction == "forward"
    images = [problem.x_bytes, problem.y_bytes, *([problem.y_bytes] if problem.residual and forward else [])]
    if not forward:  # x, grad_z, grad_x
        images.append(problem.x_bytes)
    conversions = [elementwise(device, 2 * image, "conversion to NHWC and back") for image in images]
    family = mma_forward if forward else mma_backward
    return [
        found if found.refusal else _with(conversions, found)
        for found in family.candidates(as_nhwc(problem), device, kernels)
    ]


def _with(conversions: list[Work], found: Candidate) -> Candidate:
    work = combined([replace(found.work, bound=found.bound), *conversions])
    return replace(found, **work, note=f"{found.note}; converted to NHWC and back")


def as_nhwc(problem: Problem) -> Problem:
    """The problem of the converted tensors: a copy is aligned."""
    return replace(problem, layout="nhwc", aligned=True)
