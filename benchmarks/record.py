"""The result file: what a row says, what is concluded from the rows, and how both are written.

Top level, in JSON: `schema` (`SCHEMA`; grows when a reader has to change), `env` (see environment.py), `rows` (see
`Row`) and `summary` (see `summarize`).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import roofline
from peers import is_ours
from predictions import DEVICE, Choice, predict
from problem import Problem
from timing import Timing

SCHEMA = 1

Row = TypedDict(
    "Row",
    {
        "suite": str,
        "case": str,  # "728->728@19": channels in and out, image size
        "count": int,  # how often the network has this layer
        "dtype": str,
        "layout": str,
        "batch": int,
        "pass": str,  # "fwd", "bwd" or "both"
        "impl": str,
        "device": str,  # "cpu" or "cuda"
        "plan": str | None,  # ours: what the plan chose to run
        "median_ms": float | None,
        "iqr_ms": float | None,
        "samples": int,
        "bytes": int,  # that the fused problem moves at least, whatever the implementation
        "flops": int,
        "floor_ms": float,  # of the fused problem on `floor_device`, which need not be the device that was measured
        "floor_device": str,
        "predicted_ms": float | None,  # ours: what the plan expects on `predicted_device`; not measured
        "predicted_device": str | None,
        "error": str | None,  # why there is no time
    },
)

TARGETS = {"fwd": 1.5, "both": 2.5}
"""The overhead that we allow ourselves: the time of one tiny call, by that of the two convolutions it stands for."""


def row(
    suite: str,
    problem: Problem,
    direction: str,
    impl: str,
    result: Timing | str,
    plan: str | None = None,
) -> Row:
    """What came of one implementation in one pass of one problem: a timing, or why there is none."""
    timing, error = (None, result) if isinstance(result, str) else (result, None)
    layer = problem.layer
    floor = roofline.floor(layer, problem.batch, problem.dtype, direction)
    prediction: Choice | None = predict(problem, direction) if is_ours(impl) else None
    return {
        "suite": suite,
        "case": layer.name,
        "count": layer.count,
        "dtype": problem.dtype,
        "layout": problem.layout,
        "batch": problem.batch,
        "pass": direction,
        "impl": impl,
        "device": problem.device,
        "plan": plan,
        "median_ms": timing.median_ms if timing else None,
        "iqr_ms": timing.iqr_ms if timing else None,
        "samples": timing.samples if timing else 0,
        "bytes": floor.bytes,
        "flops": floor.flops,
        "floor_ms": floor.milliseconds,
        "floor_device": roofline.H200.device,
        "predicted_ms": prediction.milliseconds if prediction else None,
        "predicted_device": DEVICE if prediction else None,
        "error": error,
    }


def column(row: Row) -> tuple[str, str]:
    """What is compared for each layer: an implementation in a layout."""
    return row["impl"], row["layout"]


def speed_up(own: Row, rows: Iterable[Row]) -> float | None:
    """How many times faster a row of ours is than the fastest peer; None where either has no time.

    On a GPU every peer counts, whatever its layout: a network may choose. On the CPU ours is PyTorch's own two
    convolutions, so only the peer in the same layout tells what our call adds to them.
    """
    same = ["suite", "case", "pass", "dtype", "batch", "device"] + (["layout"] if own["device"] == "cpu" else [])
    peers = [
        row["median_ms"]
        for row in rows
        if not is_ours(row["impl"]) and row["median_ms"] and all(row[key] == own[key] for key in same)
    ]
    return min(peers) / own["median_ms"] if peers and own["median_ms"] else None


def weighted(rows: Sequence[Row], key: str) -> Any:
    """A sum over layers, each as often as the network has it; None where any has no value."""
    values = [row[key] for row in rows]
    return None if None in values else sum(row["count"] * value for row, value in zip(rows, values, strict=True))


def totals(rows: Sequence[Row]) -> list[Row]:
    """For each pass and column the sum over all layers, each counted as often as the network has it."""
    layer_rows = [row for row in rows if row["suite"] == "layers"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in layer_rows:
        groups.setdefault((row["pass"], *column(row)), []).append(row)
    cases = {row["case"] for row in layer_rows}
    sums = []
    for group in groups.values():
        missing = len(cases) - sum(row["error"] is None for row in group)
        count = sum(row["count"] for row in group)
        sums.append(
            group[0]
            | {
                "case": f"all {count}",
                "count": count,
                "plan": None,
                "median_ms": None if missing else weighted(group, "median_ms"),
                "iqr_ms": None,
                "samples": 0,
                "bytes": weighted(group, "bytes"),
                "flops": weighted(group, "flops"),
                "floor_ms": weighted(group, "floor_ms"),
                "predicted_ms": weighted(group, "predicted_ms"),
                "error": f"{missing} layers have no time" if missing else None,
            }
        )
    return sums


def overhead(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each pass the host time of one tiny call, ours by PyTorch's, and the ratio that we allow ourselves."""
    rows = [row for row in rows if row["suite"] == "overhead"]
    return [
        {
            "pass": own["pass"],
            "ours_us": own["median_ms"] * 1e3,
            "eager_us": own["median_ms"] * gain * 1e3,
            "ratio": 1 / gain,
            "target": TARGETS[own["pass"]],
        }
        for own in rows
        if is_ours(own["impl"]) and (gain := speed_up(own, rows))
    ]


class Summary(TypedDict):
    """What the rows say together."""

    totals: list[Row]
    overhead: list[dict[str, Any]]
    failed: list[Row]  # the rows without a time
    predictions: dict[str, Any]  # see predictions.py


def summarize(rows: Sequence[Row], predictions: dict[str, Any]) -> Summary:
    return {
        "totals": totals(rows),
        "overhead": overhead(rows),
        "failed": [row for row in rows if row["error"]],
        "predictions": predictions,
    }


def write(path: Path, env: dict[str, Any], rows: Sequence[Row], summary: Summary) -> None:
    result = {"schema": SCHEMA, "env": env, "rows": list(rows), "summary": summary}
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
