"""What the rows of a run say together: the part of the result file that tables, pictures and the README are made of."""

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any, TypedDict

from peers import is_ours
from record import Row, column, speed_up

TARGETS = {"fwd": 1.5, "both": 2.5}
"""The overhead that we allow ourselves: the time of one tiny call, by that of the two convolutions it stands for."""

PAPER_STEPS = {"Xception": 28.0, "Inception V3": 31.0}
"""Training steps a second in the paper (Chollet 2017, table 3), on 60 K80 GPUs."""
PAPER_RATIO = PAPER_STEPS["Xception"] / PAPER_STEPS["Inception V3"]
PUBLISHED_RATIOS = (0.48, 0.64)
"""Throughput of timm's Xception by that of its Inception V3, in timm's published benchmark results."""


class Summary(TypedDict):
    totals: list[Row]  # for each network, pass and column the sum over its layers, each as often as the network has it
    speed_ups: list[dict[str, Any]]  # see `speed_ups`
    models: list[dict[str, Any]]  # see `models`
    overhead: list[dict[str, Any]]  # see `overhead`
    failed: list[Row]  # the rows with an error
    throttled: int  # rows with samples that were taken while the GPU held its clocks back
    predictions: dict[str, Any]  # see predictions.py


def summarize(rows: Sequence[Row], predictions: dict[str, Any]) -> Summary:
    return {
        "totals": totals(rows),
        "speed_ups": speed_ups(rows),
        "models": models(rows),
        "overhead": overhead(rows),
        "failed": [row for row in rows if row["error"]],
        "throttled": sum(row["throttled_samples"] > 0 for row in rows),
        "predictions": predictions,
    }


def weighted(rows: Sequence[Row], key: str) -> Any:
    """A sum over layers, each as often as the network has it; None where any has no value."""
    values = [row[key] for row in rows]
    return None if None in values else sum(row["count"] * value for row, value in zip(rows, values, strict=True))


def totals(rows: Sequence[Row]) -> list[Row]:
    """For each network, pass and column the sum over all layers, each counted as often as the network has it."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["suite"] == "layers":
            groups.setdefault((*_setting(row), *column(row)), []).append(row)
    cases: dict[tuple[Any, ...], set[str]] = {}
    for (*setting, _, _, _), group in groups.items():
        cases.setdefault(tuple(setting), set()).update(row["case"] for row in group)
    sums = []
    for (*setting, _, _, _), group in groups.items():
        missing = len(cases[tuple(setting)]) - sum(row["error"] is None for row in group)
        count = sum(row["count"] for row in group)
        added = {
            key: weighted(group, key) for key in ("bytes", "flops", "floor_ms", "unfused_floor_ms", "predicted_ms")
        }
        unknown = dict.fromkeys(
            (
                "plan",
                "iqr_ms",
                "sm_mhz",
                "memory_mhz",
                "power_w",
                "temperature_c",
                "images_per_second",
                "bandwidth_fraction",
                "matrix_fraction",
            )
        )
        sums.append(
            group[0]
            | unknown
            | added
            | {
                "case": f"all {count}",
                "count": count,
                "median_ms": None if missing else weighted(group, "median_ms"),
                "samples": 0,
                "throttled_samples": sum(row["throttled_samples"] for row in group),
                "error": f"{missing} layers have no time" if missing else None,
            }
        )
    return sums


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("network", "dtype", "batch", "pass", "device"))


def speed_ups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each network, pass and column of ours: the geometric mean over its distinct layers of the speed-up over the
    fastest peer, the least of them, and the mean fraction of the floor that was reached."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["suite"] == "layers" and is_ours(row["impl"]) and row["median_ms"]:
            groups.setdefault((*_setting(row), *column(row)), []).append(row)
    found = []
    for group in groups.values():
        gains = {row["case"]: gain for row in group if (gain := speed_up(row, rows))}
        if gains:
            slowest = min(gains, key=gains.__getitem__)
            found.append(
                {key: group[0][key] for key in ("network", "dtype", "batch", "pass", "impl", "layout", "mode")}
                | {
                    "layers": len(gains),
                    "speed_up": geometric_mean(gains.values()),
                    "least": gains[slowest],
                    "least_case": slowest,
                    "floor_fraction": geometric_mean([row["floor_ms"] / row["median_ms"] for row in group]),
                }
            )
    return found


def models(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each whole network its steps a second, and the ratio to Inception V3's fastest in the same run."""
    rows = [row for row in rows if row["suite"] == "model" and row["median_ms"]]

    def setting(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("pass", "dtype", "batch", "device"))

    found = []
    for row in rows:
        inception = [
            other["median_ms"]
            for other in rows
            if other["network"] == "inception_v3" and setting(other) == setting(row)
        ]
        found.append(
            {key: row[key] for key in ("network", "case", "impl", "layout", "dtype", "batch", "pass")}
            | {
                "images_per_second": row["images_per_second"],
                "steps_per_second": 1e3 / row["median_ms"],
                "by_inception_v3": min(inception) / row["median_ms"] if inception else None,
            }
        )
    return found


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
