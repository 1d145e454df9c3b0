"""The pictures of a result: the layers' times and floors, and whole networks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from peers import is_ours
from problem import PASSES
from record import PAPER_RATIO, PUBLISHED_RATIOS, Row, column, speed_up, values
from suites import MODEL_PASSES
from tables import MODES, name_of, place
from tables import figure as figure_of

OURS_COLOURS = ("#d1495b", "#f0a202")
PEER_COLOURS = ("#30638e", "#7fb2d6", "#8a8f98", "#c3c7cd", "#5b8e7d", "#a3c9a8", "#6d597a", "#b8a9c9")
PAPER_COLOUR = "#444444"
GROUP = 0.8  # the share of a group's room that its bars fill


def draw(json: Path, rows: Sequence[Row], summary: dict[str, Any]) -> Iterator[Path]:
    """Writes a result's pictures beside its JSON file, those for which it has rows, and gives their names."""
    pictures: dict[str, Figure] = {}
    timed = [row for row in rows if row["suite"] == "layers" and row["median_ms"]]
    for network in dict.fromkeys(row["network"] for row in timed):
        pictures[f"layers-{network}"] = layers([row for row in timed if row["network"] == network])
    if models := [row for row in rows if row["suite"] == "model" and row["median_ms"]]:
        pictures["networks"] = networks(one_setting(models), summary)
    for name, figure in pictures.items():
        path = json.with_suffix(f".{name}.png")
        figure.savefig(path, dpi=110)
        yield path


def one_setting(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first dtype and batch: a picture has room for one."""
    return [row for row in rows if values(row, "dtype", "batch") == values(rows[0], "dtype", "batch")]


def colours(keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Warm ones for ours."""
    ours = [key for key in keys if is_ours(key[0])]
    peers = [key for key in keys if not is_ours(key[0])]
    pairs = [(ours, OURS_COLOURS), (peers, PEER_COLOURS)]
    return {key: palette[number % len(palette)] for some, palette in pairs for number, key in enumerate(some)}


def layers(rows: Sequence[Row]) -> Figure:
    """Milliseconds of every implementation, the floors, and above ours how many times faster than the fastest peer."""
    rows = one_setting(rows)
    panels = list(dict.fromkeys(values(row, "pass", "mode") for row in rows))
    figure = Figure(figsize=(13, 1 + 3.8 * len(panels)), layout="constrained")
    figure.suptitle(f"{rows[0]['network'].capitalize()}'s layers: {place(rows[0])}", fontsize=14)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        of_panel = [row for row in rows if values(row, "pass", "mode") == panel]
        cases = list(dict.fromkeys(row["case"] for row in of_panel))
        colour = colours(list(dict.fromkeys(map(column, of_panel))))
        width = GROUP / len(colour)
        for number, key in enumerate(dict.fromkeys(map(column, of_panel))):
            of_key = [row for row in of_panel if column(row) == key]
            left = [cases.index(row["case"]) - GROUP / 2 + number * width for row in of_key]
            heights = [row["median_ms"] for row in of_key]
            bars = axes.bar(left, heights, width, align="edge", color=colour[key], label=name_of(*key[:2]))
            if is_ours(key[0]):
                gains = [speed_up(row, of_panel) for row in of_key]
                texts = ["" if gain is None else f"{gain:.2f}x" for gain in gains]
                axes.bar_label(bars, texts, fontsize=8, rotation=90, padding=3)
        for name, style in (("unfused_floor_ms", ":"), ("floor_ms", "-")):
            floors = {row["case"]: row[name] for row in of_panel}
            label = f"floor, {'fused' if name == 'floor_ms' else 'separate'}"
            starts = [place - GROUP / 2 for place in range(len(cases))]
            ends = [place + GROUP / 2 for place in range(len(cases))]
            axes.hlines([floors[case] for case in cases], starts, ends, "black", style, linewidth=1.6, label=label)
        axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", rotation_mode="anchor")
        axes.set(yscale="log", ylabel="ms (log)")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(StrMethodFormatter("{x:g}"))
        axes.margins(y=0.15)
        axes.set_title(f"{PASSES[panel[0]].capitalize()} ({MODES[panel[1]]})", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    text = "above ours: times faster than the fastest peer"
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9, title=text)
    return figure


def horizontal(axes: Axes, names: Sequence[str], widths: Sequence[float], colour: Sequence[str], unit: str) -> None:
    bars = axes.barh(range(len(names)), widths, color=colour)
    axes.bar_label(bars, [figure_of(width) for width in widths], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def networks(rows: Sequence[Row], summary: dict[str, Any]) -> Figure:
    """Throughput of whole networks, and Xception's by that of Inception V3, beside what the paper had."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(14, 2 + 0.4 * len(rows)), layout="constrained")
    figure.suptitle(f"Whole networks: {place(rows[0])}", fontsize=14)
    *panels, ratios = figure.subplots(1, len(passes) + 1)
    for axes, direction in zip(panels, passes, strict=True):
        of_pass = [row for row in rows if row["pass"] == direction]
        names = [f"{row['case'].partition('@')[0]}\n{name_of(row['impl'], row['layout'])}" for row in of_pass]
        by_kind = {"xception": PEER_COLOURS[0], "inception_v3": PEER_COLOURS[2]}
        colour = [OURS_COLOURS[0] if is_ours(row["impl"]) else by_kind[row["network"]] for row in of_pass]
        horizontal(axes, names, [row["images_per_second"] for row in of_pass], colour, "images/s")
        axes.set_title(MODEL_PASSES[direction].capitalize())
    wanted = ("xception", "both", *values(rows[0], "dtype", "batch"))
    lines = [line for line in summary["models"] if values(line, "network", "pass", "dtype", "batch") == wanted]
    lines = [line for line in lines if line["by_inception_v3"]]
    names = ["paper (2017)", "timm's published, least", "and most"]
    names += [name_of(*values(line, "impl", "layout")) for line in lines]
    colour = [PAPER_COLOUR, PEER_COLOURS[2], PEER_COLOURS[2]]
    colour += [OURS_COLOURS[0] if is_ours(line["impl"]) else PEER_COLOURS[0] for line in lines]
    widths = [PAPER_RATIO, *PUBLISHED_RATIOS, *(line["by_inception_v3"] for line in lines)]
    horizontal(ratios, names, widths, colour, "Inception V3 of the same run = 1")
    ratios.axvline(1, color="black", linewidth=0.9)
    ratios.set_title("Xception, training steps a second")
    return figure
