"""The picture of a result: bars for each layer, a row of panels for each pass."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import is_ours
from problem import DEVICES, PASSES
from record import Row, Summary, column, speed_up
from tables import planned

OURS_COLOURS = ("#d1495b", "#f0a202")
PEER_COLOURS = ("#30638e", "#7fb2d6", "#8a8f98", "#c3c7cd")
PREDICTION_COLOUR = "#d9a5ad"
NO_BAR = float("nan")
BAR_SHARE = 0.8
"""Of the room of a layer that its bars fill."""


def draw(path: Path, rows: Sequence[Row], summary: Summary) -> bool:
    """Writes the picture. False, and nothing written, where no layer of ours was timed."""
    rows = [row for row in rows if row["suite"] == "layers"]
    if not any(is_ours(row["impl"]) and row["median_ms"] for row in rows):
        return False
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    first, predictions = rows[0], summary["predictions"]
    figure = Figure(figsize=(19, 2 + 3.6 * len(passes)), layout="constrained")
    figure.suptitle("Xception's separable convolutions: fused_sepconv and PyTorch", fontsize=16)
    grid = figure.subplots(len(passes), 3, squeeze=False, width_ratios=(1.3, 1, 1))
    for (times, gains, expected), direction in zip(grid, passes, strict=True):
        of_pass = [row for row in rows if row["pass"] == direction]
        draw_times(times, of_pass)
        draw_speed_ups(gains, of_pass)
        draw_predictions(expected, [line for line in predictions["rows"] if line["pass"] == direction and line["plan"]])
        times.set_ylabel(f"{PASSES[direction]}, ms")
    titles = (
        f"Time, measured\n{DEVICES[first['device']]}, batch {first['batch']}, {first['dtype']}",
        "Speed-up over the fastest peer, measured\nabove 1: ours is faster",
        f"{predictions['device']}: predicted, not measured\n"
        f"batch {predictions['batch']}, {predictions['dtype']}, {predictions['layout']}",
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, pad=30)
        axes.legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, columnspacing=1)
    figure.savefig(path, dpi=110)
    return True


def bars(axes: Axes, cases: Sequence[str], series: dict[str, tuple[list[float], dict[str, Any]]]) -> None:
    """Groups of bars, a group a layer; a series is its heights (nan: no bar) and its style."""
    width = BAR_SHARE / max(len(series), 1)  # none of ours, where the run was interrupted
    for number, (label, (heights, style)) in enumerate(series.items()):
        left = -BAR_SHARE / 2 + number * width
        axes.bar([group + left for group in range(len(cases))], heights, width, align="edge", label=label, **style)
    axes.set_xticks(range(len(cases)), cases, rotation=40, ha="right", rotation_mode="anchor")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def colours(columns: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Warm for ours, cold for the peers."""
    ours, peers = iter(OURS_COLOURS), iter(PEER_COLOURS)
    return {key: next(ours if is_ours(key[0]) else peers) for key in columns}


def label(key: tuple[str, str]) -> str:
    impl, layout = key
    return impl if impl.endswith(layout) else f"{impl} {layout}"


def draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    medians = {(column(row), row["case"]): row["median_ms"] for row in rows}
    bars(
        axes,
        cases,
        {
            label(key): ([medians.get((key, case)) or NO_BAR for case in cases], {"color": colour})
            for key, colour in colours(list(dict.fromkeys(map(column, rows)))).items()
        },
    )


def draw_speed_ups(axes: Axes, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    gains = {(column(row), row["case"]): speed_up(row, rows) for row in rows if is_ours(row["impl"])}
    bars(
        axes,
        cases,
        {
            label(key): ([gains.get((key, case)) or NO_BAR for case in cases], {"color": colour})
            for key, colour in colours(list(dict.fromkeys(key for key, _ in gains))).items()
        },
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, max([1.2, *(gain * 1.05 for gain in gains.values() if gain)]))


def draw_predictions(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    styles = {
        "unfused_floor_ms": ("separate kernels, floor", {"color": PEER_COLOURS[2]}),
        "predicted_ms": ("fused_sepconv, predicted", {"color": PREDICTION_COLOUR, "hatch": "//"}),
        "floor_ms": ("fused, floor", {"color": PEER_COLOURS[3]}),
    }
    series = {name: ([line[key] for line in lines], style) for key, (name, style) in styles.items()}
    bars(axes, [line["case"] for line in lines], series)
    axes.set_ylabel("ms")
    axes.text(
        1, 0.97, fill(f"planned: {planned(lines)}", 60), transform=axes.transAxes, ha="right", va="top", fontsize=9
    )
