"""The tables that a run ends with, made of its rows and summary."""

from collections.abc import Iterable, Sequence
from typing import Any

from peers import is_ours
from problem import DEVICES, PASSES
from record import Row, Summary, column, speed_up
from terminal import Table


def figure(value: float | None) -> str:
    """Three digits are what a timing is good for."""
    if value is None:
        return "-"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def heading(impl: str, layout: str) -> str:
    """A name in short lines."""
    name = impl if impl.endswith(layout) else f"{impl} {layout}"
    return name.replace("_", "_\n").replace("-", "-\n").replace(" ", "\n")


def result_tables(rows: Sequence[Row], summary: Summary) -> list[Table]:
    """For each pass one of the layers, then one of the overhead."""
    lines = [row for row in [*rows, *summary["totals"]] if row["suite"] == "layers"]
    found = [
        layer_table([line for line in lines if line["pass"] == direction], summary["predictions"])
        for direction in dict.fromkeys(line["pass"] for line in lines)
    ]
    if summary["overhead"]:
        found.append(overhead_table(summary["overhead"]))
    return found


def planned(lines: Iterable[dict[str, Any]]) -> str:
    """The kernels that the plan chose for some layers: "reference" is PyTorch's own two convolutions."""
    return ", ".join(dict.fromkeys(line["plan"] for line in lines if line["plan"]))


def layer_table(rows: Sequence[Row], predictions: dict[str, Any]) -> Table:
    """One pass: measured times, how much faster ours are, and what an H200 should make of the same layers."""
    first = rows[0]
    columns = list(dict.fromkeys(map(column, rows)))
    expected = {line["case"]: line for line in predictions["rows"] if line["pass"] == first["pass"]}
    device = predictions["device"]

    header = ["layer"]
    for impl, layout in columns:
        header += [heading(impl, layout), "speed-\nup"] if is_ours(impl) else [heading(impl, layout)]
    header += [f"{device}\npredicted", f"{device}\nfloor"]

    body = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {column(row): row for row in rows if row["case"] == case}
        cells = [case]
        for key in columns:
            row = of_case.get(key)
            cells.append("-" if row is None else "error" if row["error"] else figure(row["median_ms"]))
            if is_ours(key[0]):
                cells.append(factor(speed_up(row, rows) if row else None))
        line = expected.get(case, {})
        body.append([*cells, figure(line.get("predicted_ms")), figure(line.get("floor_ms"))])

    return Table(
        title=f"{PASSES[first['pass']].capitalize()}, ms: median on the {DEVICES[first['device']]}, "
        f"batch {first['batch']}, {first['dtype']}",
        header=header,
        rows=body,
        caption=f"{device} columns: {predictions['note']}; "
        f"batch {predictions['batch']}, {predictions['dtype']}, {predictions['layout']}; "
        f"planned: {planned(expected.values())}",
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
