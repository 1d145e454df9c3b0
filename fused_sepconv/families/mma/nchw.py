"""The tensor-core family for NCHW: its kernels for NHWC, between conversions there and back.

A row of an NCHW image of 147, 37 or 19 elements of 16 bits is aligned to 2 bytes: neither cp.async nor 16-byte accesses
apply to it. PyTorch's copies convert at the speed of memory; a plan says what they cost.
"""

from __future__ import annotations

from dataclasses import replace

from fused_sepconv.families.mma import backward as mma_backward
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import LAUNCH_SECONDS, LIBRARY_BANDWIDTH, Candidate, Kernels, Problem, mostly


def candidates(problem: Problem, device: Device, kernels: Kernels) -> list[Candidate]:
    """What the family has for the same problem in NHWC, with the conversions."""
    if problem.layout != "nchw":
        return []
    family = mma_forward if problem.direction == "forward" else mma_backward
    converted = replace(problem, layout="nhwc", aligned=True)  # a copy is aligned
    return [
        found if found.refusal else _with_conversions(found, problem, device)
        for found in family.candidates(converted, device, kernels)
    ]


def _with_conversions(candidate: Candidate, problem: Problem, device: Device) -> Candidate:
    if problem.direction == "forward":
        images = [problem.x_bytes, problem.y_bytes] + [problem.y_bytes] * problem.residual
    else:
        images = [problem.x_bytes, problem.y_bytes, problem.x_bytes]  # x, grad_z, grad_x
    moved = 2 * sum(images)
    seconds = moved / (device.bandwidth * LIBRARY_BANDWIDTH)
    return replace(
        candidate,
        bytes=candidate.bytes + moved,
        predicted_seconds=candidate.predicted_seconds + len(images) * LAUNCH_SECONDS + seconds,
        bound=mostly([(candidate.bound, candidate.predicted_seconds), ("conversion to NHWC and back", seconds)]),
        note=f"{candidate.note}; converted to NHWC and back in {seconds * 1e6:.1f} us",
    )
