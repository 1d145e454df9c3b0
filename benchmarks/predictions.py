"""What the plan chooses, and what it expects of our kernels on an H200. Nothing here is measured."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import roofline
from layers import Layer
from problem import Geometry, Inputs, Problem, convolution_flags

import fused_sepconv

DEVICE = "H200"


class Choice(NamedTuple):
    """What the plan chose for a pass."""

    plan: str
    """The names of the kernels."""
    milliseconds: float
    """Predicted."""


def choose(inputs: Inputs, geometry: Geometry, direction: str, **device: str) -> Choice:
    """The plan for a pass: on the device of the tensors, or on the one that is named."""
    plan = fused_sepconv.explain(*inputs[:3], None, *geometry, **device)
    halves = {"fwd": [plan.forward], "bwd": [plan.backward], "both": [plan.forward, plan.backward]}[direction]
    return Choice(
        plan=" + ".join(dict.fromkeys(half.chosen.name for half in halves)),
        milliseconds=sum(half.chosen.predicted_seconds for half in halves) * 1e3,
    )


def predict(problem: Problem, direction: str) -> Choice:
    """The plan for a problem on an H200, whatever device the problem itself is on."""
    with convolution_flags(problem.dtype):
        return choose(problem.meta_inputs(), problem.geometry, direction, device=DEVICE)


def predict_suite(
    layers: Iterable[Layer], passes: Iterable[str], batch: int = 64, dtype: str = "bfloat16", layout: str = "nhwc"
) -> dict[str, Any]:
    """Layers at the size at which one would train them: the part of a summary that stands in for a GPU.

    A layer's prediction stands between two floors: that of perfect fused kernels, and that of perfect separate
    convolutions, which no implementation that runs two of them can beat. The last line of a pass is the sum over all.
    """
    rows: list[dict[str, Any]] = []
    for direction in passes:
        lines = []
        for layer in layers:
            choice = predict(Problem(layer, batch, dtype, layout, "meta"), direction)
            lines.append(
                {
                    "case": layer.name,
                    "count": layer.count,
                    "pass": direction,
                    "plan": choice.plan,
                    "predicted_ms": choice.milliseconds,
                    "floor_ms": roofline.floor(layer, batch, dtype, direction).milliseconds,
                    "unfused_floor_ms": roofline.floor(layer, batch, dtype, direction, fused=False).milliseconds,
                }
            )
        count = sum(line["count"] for line in lines)
        sums = {
            key: sum(line["count"] * line[key] for line in lines)
            for key in ("predicted_ms", "floor_ms", "unfused_floor_ms")
        }
        rows += [*lines, {"case": f"all {count}", "count": count, "pass": direction, "plan": None, **sums}]
    return {
        "note": "predicted, not measured",
        "device": DEVICE,
        "ceilings": roofline.H200.source,
        "batch": batch,
        "dtype": dtype,
        "layout": layout,
        "rows": rows,
    }
