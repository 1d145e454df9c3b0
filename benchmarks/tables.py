"""The tables that a run ends with, made of its rows and summary."""

from collections.abc import Iterable, Sequence
from typing import Any

from peers import is_ours
from problem import DEVICES, PASSES
from record import Column, Row, column, speed_up
from summary import PAPER_RATIO, PAPER_STEPS, Summary
from terminal import Table

MODES = {
    "plain": "one call after the other",
    "cold": "L2 flushed before each call",
    "graph": "replayed from a CUDA graph: no launches, no flush",
}

MODEL_PASSES = {"fwd": "inference", "both": "training step"}


def figure(value: float | None) -> str:
    """Three digits are what a timing is good for."""
    if value is None:
        return "-"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def megabytes(value: int | None) -> str:
    return "-" if value is None else figure(value / 1e6)


def name_of(impl: str, layout: str) -> str:
    return impl if impl.endswith(layout) else f"{impl} {layout}"


def heading(impl: str, layout: str) -> str:
    """A name in short lines."""
    return name_of(impl, layout).replace("_", "_\n").replace("-", "-\n").replace(" ", "\n")


def result_tables(rows: Sequence[Row], summary: Summary) -> list[Table]:
    """For each network, pass and mode one of the layers, then those of models, memory and overhead."""
    lines = [row for row in [*rows, *summary["totals"]] if row["suite"] == "layers"]

    def setting(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("network", "dtype", "batch", "pass", "mode"))

    found = [
        layer_table([line for line in lines if setting(line) == wanted], summary["predictions"])
        for wanted in dict.fromkeys(map(setting, lines))
    ]
    if any(row["suite"] == "model" for row in rows):
        found.append(model_table(rows, summary))
    if any(row["suite"] == "memory" for row in rows):
        found.append(memory_table([row for row in rows if row["suite"] == "memory"]))
    if summary["overhead"]:
        found.append(overhead_table(summary["overhead"]))
    return found


def planned(lines: Iterable[dict[str, Any]]) -> str:
    """The kernels that the plan chose for some layers: "reference" is PyTorch's own two convolutions."""
    return ", ".join(dict.fromkeys(line["plan"] for line in lines if line["plan"]))


def layer_table(rows: Sequence[Row], predictions: dict[str, Any]) -> Table:
    """One pass: measured times, how much faster ours are, how near the floor, and what is predicted."""
    first = rows[0]
    columns = list(dict.fromkeys(map(column, rows)))
    expected = expectations(rows, predictions)

    header = ["layer"]
    for impl, layout, _ in columns:
        header += [heading(impl, layout), "speed-\nup"] if is_ours(impl) else [heading(impl, layout)]
    header += ["floor\nhere", f"{expected.device}\npredicted", f"{expected.device}\nfloor"]

    body = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {column(row): row for row in rows if row["case"] == case}
        body.append([case, *case_cells(of_case, columns, rows), *expected.cells(case)])
    return Table(
        title=f"{first['network'].capitalize()}, {PASSES[first['pass']]}, ms: median on the "
        f"{DEVICES[first['device']]}, batch {first['batch']}, {first['dtype']}; {MODES[first['mode']]}",
        header=header,
        rows=body,
        caption=expected.note,
    )


def case_cells(of_case: dict[Column, Row], columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """The measured times of a layer, a speed-up behind each of ours, and the floor."""
    cells = []
    for key in columns:
        row = of_case.get(key)
        mark = "!" if row and row["throttled_samples"] else ""
        cells.append("-" if row is None else "error" if row["error"] else figure(row["median_ms"]) + mark)
        if is_ours(key[0]):
            cells.append(factor(speed_up(row, rows) if row else None))
    return [*cells, figure(next(iter(of_case.values()))["floor_ms"])]


class expectations:
    """What is predicted for the layers of a table, and for which device.

    On a GPU that is the GPU itself, and the plan's prediction stands in the rows. Elsewhere it is the device and the
    size of the predictions, which have Xception's layers only.
    """

    def __init__(self, rows: Sequence[Row], predictions: dict[str, Any]) -> None:
        own = [row for row in rows if is_ours(row["impl"])]
        if rows[0]["device"] == "cuda":
            self.device = "plan,"
            self._of_case = {row["case"]: (row["predicted_ms"], row["unfused_floor_ms"]) for row in own}
            self.note = (
                "floor here: of the fused problem, by the ceilings measured before the run; the last column that of "
                f"separate kernels. plan, predicted: not measured. planned: {planned(own)}. ! throttled"
            )
            return
        lines = [
            line for line in predictions["rows"] if line["pass"] == rows[0]["pass"] and rows[0]["network"] == "xception"
        ]
        self.device = predictions["device"]
        self._of_case = {line["case"]: (line["predicted_ms"], line["floor_ms"]) for line in lines}
        self.note = (
            "floor here: of the fused problem, by this CPU's measured ceilings; what fits its caches can pass it. "
            f"{self.device} columns: {predictions['note']}; batch {predictions['batch']}, {predictions['dtype']}, "
            f"{predictions['layout']}; planned: {planned(lines)}"
        )

    def cells(self, case: str) -> list[str]:
        return [figure(value) for value in self._of_case.get(case, (None, None))]


def model_table(rows: Sequence[Row], summary: Summary) -> Table:
    """The paper's table 3: throughput of whole networks, and Xception's by that of Inception V3."""
    rows = [row for row in rows if row["suite"] == "model"]
    found = {
        tuple(line[key] for key in ("network", "impl", "layout", "dtype", "batch", "pass")): line
        for line in summary["models"]
    }
    body = []
    for row in rows:
        key = tuple(row[name] for name in ("network", "impl", "layout", "dtype", "batch", "pass"))
        line = found.get(key, {})
        body.append(
            [
                row["case"],
                name_of(row["impl"], row["layout"]),
                f"{row['dtype']}, {row['batch']}",
                MODEL_PASSES[row["pass"]],
                "error" if row["error"] else figure(row["median_ms"]),
                figure(line.get("images_per_second")),
                figure(line.get("steps_per_second")),
                factor(line.get("by_inception_v3")),
                figure(row["floor_ms"] or None),
            ]
        )
    return Table(
        title=f"Whole networks on the {DEVICES[rows[0]['device']]}",
        header=["network", "", "dtype,\nbatch", "", "ms", "images/s", "steps/s", "of Incep-\ntion V3", "floor,\nms"],
        rows=body,
        caption=f"The paper trained Xception at {PAPER_STEPS['Xception']:.0f} steps/s and Inception V3 at "
        f"{PAPER_STEPS['Inception V3']:.0f}: {PAPER_RATIO:.2f}x. 16-bit dtypes are automatic mixed precision.",
    )


def memory_table(rows: Sequence[Row]) -> Table:
    columns = list(dict.fromkeys("timm" if row["impl"].startswith("timm") else row["impl"] for row in rows))
    body = []
    for key in dict.fromkeys((row["case"], row["dtype"], row["batch"]) for row in rows):
        cells = [key[0]]
        of_case = {
            "timm" if row["impl"].startswith("timm") else row["impl"]: row
            for row in rows
            if (row["case"], row["dtype"], row["batch"]) == key
        }
        for impl in columns:
            row = of_case.get(impl)
            failed = row is not None and row["error"]
            cells += (
                ["error"] * 2 if failed else [megabytes(row and row[name]) for name in ("saved_bytes", "peak_bytes")]
            )
        body.append(cells)
    first = rows[0]
    return Table(
        title=f"Memory on the {DEVICES[first['device']]}, MB: kept for the backward, and the most held at once; "
        f"batch {', '.join(dict.fromkeys(str(row['batch']) for row in rows))}, "
        f"{', '.join(dict.fromkeys(row['dtype'] for row in rows))}",
        header=["", *(f"{impl}\n{what}" for impl in columns for what in ("kept", "peak"))],
        rows=body,
        caption="Forward and backward of a layer, or one training step of a network. Parameters are not counted.",
    )


def overhead_table(overhead: Sequence[dict[str, Any]]) -> Table:
    return Table(
        title="Host time of one tiny call on the CPU (8->8@3, batch 1, float32), µs",
        header=["pass", "two F.conv2d", "ours", "ratio", "target"],
        rows=[
            [
                PASSES[line["pass"]],
                figure(line["eager_us"]),
                figure(line["ours_us"]),
                factor(line["ratio"]),
                f"<= {line['target']:.1f}x",
            ]
            for line in overhead
        ],
    )
