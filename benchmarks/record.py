"""The result file: what a row says, what the rows say together, and how they are written and read.

Top level, in JSON: `schema` (grows when a reader has to change), `env` (see machine.py), `rows` (see `Row`) and
`summary` (see `summarize`). pandas reads the rows: `pandas.DataFrame(json.load(open("bench.json"))["rows"])`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from floors import Ceilings, Floor, floor
from peers import is_ours
from problem import Problem
from timing import Timing

SCHEMA = 3

Row = TypedDict(
    "Row",
    {
        "suite": str,  # "layers", "model", "memory" or "host"
        "network": str,  # of the layer, or the model itself: "xception", "mobilenet" …
        "case": str,  # "728->728@19": channels in and out, image size; or a whole network: "Xception@299"
        "count": int,  # how often the network has this layer
        "dtype": str,  # of the arithmetic; 16-bit dtypes of whole networks are automatic mixed precision
        "layout": str,  # "nchw" or "nhwc"
        "batch": int,
        "pass": str,  # "fwd", "bwd", "both"; host: "grad" too; of a model "fwd" is inference, "both" a training step
        "impl": str,  # "fused…" is ours, the others are peers
        "device": str,  # "cpu" or "cuda"
        "mode": str,  # how it was sampled: see timing.py
        "plan": str | None,  # ours: what the plan chose to run; "reference" is PyTorch's two convolutions
        "median_ms": float | None,  # None where there is an error, and in the memory suite
        "iqr_ms": float | None,  # interquartile range
        "samples": int,
        "images_per_second": float | None,
        "bytes": int,  # that the fused problem moves at least, whatever the implementation
        "flops": int,  # two a multiply-add
        "floor_ms": float,  # of the fused problem on `floor_device`; of a network's separable convolutions alone
        "unfused_floor_ms": float,  # of perfect separate kernels there
        "floor_device": str,  # the device that was measured, by the ceilings in env
        "bandwidth_fraction": float | None,  # `bytes` a second, by what a copy reaches
        "matrix_fraction": float | None,  # the products' flops a second, by what a library's product reaches
        "predicted_ms": float | None,  # ours: what the plan expects on `predicted_device`; not measured
        "predicted_device": str | None,
        "peak_bytes": int | None,  # memory suite: most memory that a pass holds beyond what was there before it
        "saved_bytes": int | None,  # memory suite: kept from the forward for the backward, parameters not counted
        "python_calls": int | None,  # host suite: Python functions that one warm call enters
        "error": str | None,  # why there are no figures
    },
)

PAPER_STEPS = {"Xception": 28.0, "Inception V3": 31.0}
"""Training steps a second in the paper (Chollet 2017, table 3), on 60 K80 GPUs."""
PAPER_RATIO = PAPER_STEPS["Xception"] / PAPER_STEPS["Inception V3"]
PUBLISHED_RATIOS = (0.48, 0.64)
"""Throughput of timm's Xception by that of its Inception V3, in timm's published benchmark results."""


def layer_row(problem: Problem, direction: str, ceilings: Ceilings, result: Timing | str | None, **named: Any) -> Row:
    """The row of one implementation in one pass of one problem.

    `result` is a timing, or why there is none; None where time is not the question. `named` are more of the row's.
    """
    layer = problem.layer
    counted = "fwd" if direction == "grad" else direction
    floors = [
        floor(layer, problem.batch, problem.dtype, counted, fused=fused, ceilings=ceilings) for fused in (True, False)
    ]
    about = {"network": layer.network, "case": layer.name, "count": layer.count, "batch": problem.batch}
    about |= {"dtype": problem.dtype, "layout": problem.layout, "device": problem.device}
    return make_row(direction, floors, ceilings, result, **about, **named)


def make_row(
    direction: str, floors: Sequence[Floor], ceilings: Ceilings, result: Timing | str | None, **named: Any
) -> Row:
    """A row of a layer or of a whole network; `floors` are those of fused and of separate kernels."""
    timing = result if isinstance(result, Timing) else None
    fused, unfused = floors
    seconds = timing.median_ms / 1e3 if timing else None
    row = dict.fromkeys(Row.__annotations__) | {
        "pass": direction,
        "samples": timing.samples if timing else 0,
        "bytes": fused.bytes,
        "flops": fused.flops,
        "floor_ms": fused.milliseconds,
        "unfused_floor_ms": unfused.milliseconds,
        "floor_device": ceilings.device,
        "error": result if isinstance(result, str) else None,
    }
    if seconds:
        row |= {
            "median_ms": timing.median_ms,
            "iqr_ms": timing.iqr_ms,
            "images_per_second": named["batch"] / seconds,
            "bandwidth_fraction": fused.bytes / seconds / ceilings.bytes_per_second,
            "matrix_fraction": fused.matrix_flops / seconds / ceilings.matrix(named["dtype"]),
        }
    return row | named


Column = tuple[str, str, str]


def column(row: Row) -> Column:
    """The column of a row in its table: an implementation in a layout, sampled in a mode."""
    return row["impl"], row["layout"], row["mode"]


def values(row: Row, *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


def peers_of(own: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows that one of ours is compared with: those with a time.

    On a GPU every peer counts, whatever its layout: a network may choose. On the CPU ours is PyTorch's own two
    convolutions, so only the peer in the same layout tells what our call adds to them.
    """
    same = ("suite", "network", "case", "pass", "dtype", "batch", "device", "mode")
    same = (*same, "layout") if own["device"] == "cpu" else same
    alike = [row for row in rows if values(row, *same) == values(own, *same)]
    return [row for row in alike if row["median_ms"] and not is_ours(row["impl"])]


def speed_up(own: Row, rows: Sequence[Row]) -> float | None:
    """How many times faster a row of ours is than the fastest peer; None where either has no time."""
    peers = peers_of(own, rows)
    return min(row["median_ms"] for row in peers) / own["median_ms"] if peers and own["median_ms"] else None


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums up the rows.

    - totals: for each network, pass and column the sum over its layers, each as often as the network has it;
    - models: for each whole network its steps a second, and the ratio to the fastest Inception V3 of the run;
    - failed: the rows with an error.
    """
    return {
        "totals": _totals(rows),
        "models": _models(rows),
        "failed": [row for row in rows if row["error"]],
    }


_SETTING = ("network", "dtype", "batch", "pass", "device")


def _totals(rows: Sequence[Row]) -> list[Row]:
    rows, sums = [row for row in rows if row["suite"] == "layers"], []
    for key in dict.fromkeys((values(row, *_SETTING), column(row)) for row in rows):
        group = [row for row in rows if (values(row, *_SETTING), column(row)) == key]
        cases = {row["case"] for row in rows if values(row, *_SETTING) == key[0]}
        missing = len(cases) - sum(row["error"] is None for row in group)
        count = sum(row["count"] for row in group)
        kept = {name: group[0][name] for name in ("suite", *_SETTING, "impl", "layout", "mode", "floor_device")}
        added = ("bytes", "flops", "floor_ms", "unfused_floor_ms", "predicted_ms", "median_ms")
        total = dict.fromkeys(Row.__annotations__) | kept | {"case": f"all {count}", "count": count, "samples": 0}
        for name in added:
            if all(row[name] is not None for row in group) and not (missing and name == "median_ms"):
                total[name] = sum(row["count"] * row[name] for row in group)
        sums.append(total | {"error": f"{missing} layers have no time" if missing else None})
    return sums


def _models(rows: Sequence[Row]) -> list[dict[str, Any]]:
    rows = [row for row in rows if row["suite"] == "model" and row["median_ms"]]
    found = []
    for row in rows:
        alike = [other for other in rows if values(other, *_SETTING[1:]) == values(row, *_SETTING[1:])]
        inception = [other["median_ms"] for other in alike if other["network"] == "inception_v3"]
        found.append(
            {key: row[key] for key in ("network", "case", "impl", "layout", "dtype", "batch", "pass")}
            | {
                "images_per_second": row["images_per_second"],
                "steps_per_second": 1e3 / row["median_ms"],
                "by_inception_v3": min(inception) / row["median_ms"] if inception else None,
            }
        )
    return found


def write(path: Path, env: dict[str, Any], rows: Sequence[Row], summary: dict[str, Any]) -> None:
    result = {"schema": SCHEMA, "env": env, "rows": list(rows), "summary": summary}
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result file. ValueError where it is none, or one of another schema."""
    try:
        result = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: can't be read as a result: {error}") from error
    if not isinstance(result, dict) or not {"schema", "env", "rows", "summary"} <= result.keys():
        raise ValueError(f"{path}: not a result of bench.py")
    if result["schema"] != SCHEMA:
        raise ValueError(f"{path}: a result of schema {result['schema']}, where this bench.py reads {SCHEMA}")
    return result
