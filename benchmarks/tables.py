"""The tables of a result, for the terminal and for the README, and what changed between two results."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import host
import rich.box
import rich.table
from peers import is_ours
from problem import PASSES
from record import PAPER_RATIO, PAPER_STEPS, Row, column, read, speed_up, values
from rich.console import Console
from suites import MODEL_PASSES

MODES = {"plain": "one call after the other", "cold": "nothing of it in L2 before a call"}
REDIRECTED_WIDTH = 160  # in characters, of what is written into a file or a pipe


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        lines = [
            [text.replace("\n", " ") for text in self.header],
            ["---", *["---:"] * (len(self.header) - 1)],
            *self.rows,
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"**{self.title}**", table, self.caption) if part)

    def show(self, console: Console) -> None:
        drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for number, header in enumerate(self.header):
            drawn.add_column(header, justify="right" if number else "left", vertical="bottom")
        for cells in self.rows:
            drawn.add_row(*cells)
        console.print("", self.title, style="bold", sep="\n", soft_wrap=True)
        console.print(drawn, end="")
        if self.caption:
            console.print(self.caption, soft_wrap=True)


def console() -> Console:
    made = Console(highlight=False, markup=False)
    if not made.is_terminal:
        made.width = REDIRECTED_WIDTH
    return made


def figure(value: float | None) -> str:
    """Three digits are what a timing is good for."""
    if value is None:
        return "-"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def megabytes(value: int | None) -> str:
    return "-" if value is None else figure(value / 1e6)


def name_of(impl: str, layout: str) -> str:
    return impl if impl.endswith(layout) else f"{impl} {layout}"


def place(row: Row) -> str:
    return f"{'GPU' if row['device'] == 'cuda' else 'CPU'}, batch {row['batch']}, {row['dtype']}"


def result_tables(rows: Sequence[Row], summary: dict[str, Any]) -> list[Table]:
    """A table for each network, pass and mode of the layers, then those of models, memory and the host's time."""
    lines = [row for row in [*rows, *summary["totals"]] if row["suite"] == "layers"]
    setting = ("network", "dtype", "batch", "pass", "mode")
    wanted = dict.fromkeys(values(line, *setting) for line in lines)
    found = [layer_table([line for line in lines if values(line, *setting) == each]) for each in wanted]
    for suite, make in (("model", model_table), ("memory", memory_table), ("host", host_table)):
        if of_suite := [row for row in rows if row["suite"] == suite]:
            found.append(make(of_suite, summary))
    return found


def layer_table(rows: Sequence[Row]) -> Table:
    """One pass: measured times, how much faster ours are, and the floors."""
    first = rows[0]
    columns = list(dict.fromkeys(map(column, rows)))
    header = ["layer", "count"]
    for impl, layout, _ in columns:
        name = name_of(impl, layout).replace("-", "-\n").replace(" ", "\n")
        header += [name, "speed-\nup"] if is_ours(impl) else [name]
    body = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {column(row): row for row in rows if row["case"] == case}
        some = next(iter(of_case.values()))
        cells = [case, str(some["count"])]
        for key in columns:
            row = of_case.get(key)
            cells.append("-" if row is None else "error" if row["error"] else figure(row["median_ms"]))
            if is_ours(key[0]):
                cells.append(factor(speed_up(row, rows) if row else None))
        body.append([*cells, figure(some["unfused_floor_ms"]), figure(some["floor_ms"])])
    plans = dict.fromkeys(row["plan"] for row in rows if row["plan"])
    return Table(
        f"{first['network'].capitalize()}, {PASSES[first['pass']]}, ms: {place(first)}; {MODES[first['mode']]}",
        [*header, "floor,\nseparate", "floor,\nfused"],
        body,
        f"Floors: perfect kernels on {first['floor_device']}, by measured ceilings; a CPU's caches can beat them. "
        f"Planned: {', '.join(plans) or 'nothing'}.",
    )


def model_table(rows: Sequence[Row], summary: dict[str, Any]) -> Table:
    """The paper's table 3: throughput of whole networks, and Xception's by that of Inception V3."""
    key = ("network", "impl", "layout", "dtype", "batch", "pass")
    found = {values(line, *key): line for line in summary["models"]}
    body = []
    for row in rows:
        line = found.get(values(row, *key), {})
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
        f"Whole networks: {place(rows[0])}",
        ["network", "run", "dtype, batch", "pass", "ms", "images/s", "steps/s", "of Inception\nV3", "floor,\nms"],
        body,
        f"The paper trained Xception at {PAPER_STEPS['Xception']:.0f} steps/s and Inception V3 at "
        f"{PAPER_STEPS['Inception V3']:.0f}: {PAPER_RATIO:.2f}x. Floor: of the fused separable convolutions alone. "
        "16-bit dtypes are automatic mixed precision.",
    )


def memory_table(rows: Sequence[Row], summary: dict[str, Any]) -> Table:
    body = [
        [
            row["case"],
            name_of(row["impl"], row["layout"]),
            f"{row['dtype']}, {row['batch']}",
            *(["error"] * 2 if row["error"] else [megabytes(row["saved_bytes"]), megabytes(row["peak_bytes"])]),
        ]
        for row in rows
    ]
    header = ["network", "run", "dtype, batch", "kept, MB", "peak, MB"]
    caption = "Kept for the backward, and the most held at once beyond what was there before."
    return Table(f"Memory of a training step: {place(rows[0])}", header, body, caption)


def host_table(rows: Sequence[Row], summary: dict[str, Any]) -> Table:
    """Beside each time its ratio to the two `nn.Conv2d` of the same run."""
    peers = {row["pass"]: row["median_ms"] for row in rows if row["impl"] == host.PEER}
    body = []
    for impl in dict.fromkeys(row["impl"] for row in rows):
        of_impl = {row["pass"]: row for row in rows if row["impl"] == impl}
        cells = [impl, f"{of_impl['fwd']['dtype']}, {of_impl['fwd']['layout']}"]
        for row in (of_impl[direction] for direction in host.PASSES):
            if row["error"]:
                cells += ["error"] * 3
                continue
            ratio = row["median_ms"] / peers[row["pass"]] if peers.get(row["pass"]) else None
            cells += [figure(row["median_ms"] * 1e3), factor(ratio), str(row["python_calls"])]
        body.append(cells)
    header = [f"{text},\n{what}" for text in host.PASSES.values() for what in ("us", "ratio", "calls")]
    return Table(
        f"The host's time of a call on the CPU, one thread: {rows[0]['case']}, batch 1, 3x3",
        ["run", "dtype, layout", *header],
        body,
        "Launches of our families are stubbed by the null build; two nn.Conv2d and fused-reference do their "
        "arithmetic. calls: Python functions that are entered. `bench.py --suite host` builds what the families need.",
    )


# Compare

MEASURED = {"median_ms": ("ms", figure), "peak_bytes": ("peak MB", megabytes), "saved_bytes": ("kept MB", megabytes)}
"""The figures that are compared, their heading, and how they are written."""
KEY = ("suite", "network", "case", "dtype", "layout", "batch", "pass", "impl", "device", "mode")
"""Equal for rows of two results that measured the same."""


def compare(argv: Sequence[str]) -> int:
    """`bench.py compare`: returns 0, or 2 where a file is no result."""
    parser = argparse.ArgumentParser(prog="bench.py compare", description="What changed between two results.")
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    given = parser.parse_args(argv)
    screen = console()
    try:
        before, after = read(given.before), read(given.after)
    except ValueError as error:
        screen.print(str(error), soft_wrap=True)
        return 2
    environments = [result["env"] | {"GPU": result["env"].get("gpu")} for result in (before, after)]
    for name in ("fused_sepconv", "commit", "torch", "cpu", "threads", "GPU"):
        first, second = (environment.get(name) for environment in environments)
        if first != second:
            screen.print(f"{name}: {first} -> {second}", soft_wrap=True)
    old, new = ({values(row, *KEY): row for row in result["rows"]} for result in (before, after))
    common = [key for key in old if key in new]
    changed = [(old[key], new[key], name) for key in common for name in MEASURED if differs(old[key], new[key], name)]
    if changed:
        changes(changed).show(screen)
    for path, here, there in ((given.before, old, new), (given.after, new, old)):
        if missing := [key for key in here if key not in there]:
            screen.print(
                f"Only in {path}: {len(missing)} rows, such as {' '.join(map(str, missing[0]))}", soft_wrap=True
            )
    for key in common:
        was, now = (results[key]["error"] or "a time" for results in (old, new))
        if was != now:
            screen.print(f"{' '.join(map(str, key))}: {was} -> {now}", soft_wrap=True)
    same = len(common) - len({values(row, *KEY) for row, _, _ in changed})
    screen.print(f"{same} of {len(common)} common rows did not change beyond their noise.")
    return 0


def differs(old: Row, new: Row, name: str) -> bool:
    """Whether a measured value changed: a time by more than the interquartile ranges explain."""
    if old[name] is None or new[name] is None:
        return False
    noise = (old["iqr_ms"] + new["iqr_ms"]) / 2 if name == "median_ms" else 0
    return abs(new[name] - old[name]) > noise


def changes(changed: Sequence[tuple[Row, Row, str]]) -> Table:
    """The largest change first; below 1x it is faster, or smaller, than it was."""
    body = []
    for old, new, name in sorted(changed, key=lambda line: line[1][line[2]] / max(line[0][line[2]], 1e-12)):
        text, write = MEASURED[name]
        what = [f"{new['suite']}: {new['case']}", f"{new['pass']}, {new['mode']}", f"{new['dtype']}, {new['batch']}"]
        ratio = factor(new[name] / old[name] if old[name] else None)
        body.append([*what, name_of(new["impl"], new["layout"]), text, write(old[name]), write(new[name]), ratio])
    return Table(
        "Changed",
        ["suite: case", "pass, mode", "dtype, batch", "run", "what", "before", "after", "after/before"],
        body,
        "Times that differ by more than the mean of their interquartile ranges; any difference in bytes.",
    )
