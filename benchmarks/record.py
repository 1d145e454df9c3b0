"""The result file: what a row says, and how rows are written and read.

Top level, in JSON: `schema` (`SCHEMA`; grows when a reader has to change), `env` (see environment.py), `rows` (see
`Row`) and `summary` (see summary.py). result.schema.json says the same as a JSON schema.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from peers import is_ours
from problem import Problem
from roofline import Ceilings, Floor, floor
from timing import Timing

SCHEMA = 2
SCHEMA_FILE = Path(__file__).parent / "result.schema.json"

Row = TypedDict(
    "Row",
    {
        "suite": str,  # "layers", "model", "memory" or "overhead"
        "network": str,  # of the layer, or the model itself: "xception", "mobilenet" …
        "case": str,  # "728->728@19": channels in and out, image size; or a whole network: "Xception@299"
        "count": int,  # how often the network has this layer
        "dtype": str,
        "layout": str,
        "batch": int,
        "pass": str,  # "fwd", "bwd" or "both"; of a model "fwd" is inference and "both" a training step
        "impl": str,
        "device": str,  # "cpu" or "cuda"
        "mode": str,  # how it was sampled: see timing.py
        "plan": str | None,  # ours: what the plan chose to run
        "median_ms": float | None,
        "iqr_ms": float | None,
        "samples": int,
        "throttled_samples": int,  # taken while the GPU held its clocks back
        "sm_mhz": list[int] | None,  # before and after the samples
        "memory_mhz": list[int] | None,
        "power_w": list[float] | None,
        "temperature_c": list[int] | None,
        "images_per_second": float | None,
        "bytes": int,  # that the fused problem moves at least, whatever the implementation
        "flops": int,
        "floor_ms": float,  # of the fused problem on `floor_device`
        "unfused_floor_ms": float,  # of perfect separate kernels there
        "floor_device": str,  # the device that was measured, by ceilings that were measured before the run
        "bandwidth_fraction": float | None,  # `bytes` a second, by what a copy reaches
        "matrix_fraction": float | None,  # the products' flops a second, by what a library's product reaches
        "predicted_ms": float | None,  # ours: what the plan expects on `predicted_device`; not measured
        "predicted_device": str | None,
        "peak_bytes": int | None,  # memory suite: most memory that a pass holds beyond what was there before it
        "saved_bytes": int | None,  # memory suite: kept from the forward for the backward, parameters not counted
        "error": str | None,  # why there is no time
    },
)


def layer_row(
    suite: str,
    problem: Problem,
    direction: str,
    impl: str,
    mode: str,
    ceilings: Ceilings,
    result: Timing | str | None = None,
    **fields: Any,
) -> Row:
    """What came of one implementation in one pass of one problem.

    `result` is a timing, or why there is none; None where time is not the question. `fields` are more of the row's.
    """
    layer = problem.layer
    fused, unfused = (
        floor(layer, problem.batch, problem.dtype, direction, fused=fused, ceilings=ceilings) for fused in (True, False)
    )
    return _row(
        suite=suite,
        network=layer.network,
        case=layer.name,
        count=layer.count,
        dtype=problem.dtype,
        layout=problem.layout,
        batch=problem.batch,
        direction=direction,
        impl=impl,
        device=problem.device,
        mode=mode,
        floors=(fused, unfused),
        ceilings=ceilings,
        result=result,
        **fields,
    )


def model_row(
    *, floors: tuple[Floor, Floor], ceilings: Ceilings, result: Timing | str | None = None, **fields: Any
) -> Row:
    """What came of one implementation of a whole network; `floors` are those of fused and of separate kernels."""
    return _row(count=1, floors=floors, ceilings=ceilings, result=result, **fields)


def _row(
    *,
    direction: str,
    floors: tuple[Floor, Floor],
    ceilings: Ceilings,
    result: Timing | str | None,
    plan: str | None = None,
    prediction: tuple[float, str] | None = None,
    peak_bytes: int | None = None,
    saved_bytes: int | None = None,
    **named: Any,
) -> Row:
    timing, error = (None, result) if isinstance(result, str) else (result, None)
    fused, unfused = floors
    seconds = timing.median_ms / 1e3 if timing else None
    states = (timing.before, timing.after) if timing and timing.before and timing.after else None

    def around(name: str) -> list[Any] | None:
        return [getattr(state, name) for state in states] if states else None

    return {
        **{key: named[key] for key in ("suite", "network", "case", "count", "dtype", "layout", "batch")},
        "pass": direction,
        "impl": named["impl"],
        "device": named["device"],
        "mode": named["mode"],
        "plan": plan,
        "median_ms": timing.median_ms if timing else None,
        "iqr_ms": timing.iqr_ms if timing else None,
        "samples": timing.samples if timing else 0,
        "throttled_samples": timing.throttled if timing else 0,
        "sm_mhz": around("sm_mhz"),
        "memory_mhz": around("memory_mhz"),
        "power_w": around("power_w"),
        "temperature_c": around("temperature_c"),
        "images_per_second": named["batch"] / seconds if seconds else None,
        "bytes": fused.bytes,
        "flops": fused.flops,
        "floor_ms": fused.milliseconds,
        "unfused_floor_ms": unfused.milliseconds,
        "floor_device": ceilings.device,
        "bandwidth_fraction": fused.bytes / seconds / ceilings.bytes_per_second if seconds else None,
        "matrix_fraction": fused.matrix_flops / seconds / ceilings.matrix(named["dtype"]) if seconds else None,
        "predicted_ms": prediction[0] if prediction else None,
        "predicted_device": prediction[1] if prediction else None,
        "peak_bytes": peak_bytes,
        "saved_bytes": saved_bytes,
        "error": error,
    }


Column = tuple[str, str, str]


def column(row: Row) -> Column:
    """What is compared for each layer: an implementation in a layout, sampled in a mode."""
    return row["impl"], row["layout"], row["mode"]


def same_problem(row: Row) -> tuple[Any, ...]:
    """Equal for rows whose implementations solve the same problem."""
    return tuple(row[key] for key in ("suite", "network", "case", "pass", "dtype", "batch", "device", "mode"))


def peers_of(own: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows that one of ours is compared with: those with a time.

    On a GPU every peer counts, whatever its layout: a network may choose. On the CPU ours is PyTorch's own two
    convolutions, so only the peer in the same layout tells what our call adds to them.
    """
    return [
        row
        for row in rows
        if not is_ours(row["impl"])
        and row["median_ms"]
        and same_problem(row) == same_problem(own)
        and (own["device"] != "cpu" or row["layout"] == own["layout"])
    ]


def speed_up(own: Row, rows: Sequence[Row]) -> float | None:
    """How many times faster a row of ours is than the fastest peer; None where either has no time."""
    peers = peers_of(own, rows)
    return min(row["median_ms"] for row in peers) / own["median_ms"] if peers and own["median_ms"] else None


def write(path: Path, env: dict[str, Any], rows: Sequence[Row], summary: dict[str, Any]) -> None:
    """The JSON file, and the rows as CSV beside it."""
    result = {"schema": SCHEMA, "env": env, "rows": list(rows), "summary": summary}
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(Row.__annotations__))
        table.writeheader()
        for row in rows:
            table.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


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
