"""The pictures of a result: speed-ups and times of layers, the roofline, whole networks, memory, and predictions."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from peers import is_ours
from problem import DEVICES, PASSES
from record import Row, column
from summary import PAPER_RATIO, PUBLISHED_RATIOS, Summary
from tables import MODEL_PASSES, MODES, name_of, planned

OURS_COLOURS = ("#d1495b", "#f0a202")
PEER_COLOURS = ("#30638e", "#7fb2d6", "#8a8f98", "#c3c7cd", "#5b8e7d", "#a3c9a8", "#6d597a", "#b8a9c9")
PREDICTION_COLOUR = "#d9a5ad"
PAPER_COLOUR = "#444444"
NO_BAR = float("nan")
GROUP = 0.8
"""Of the room of a group that its bars fill."""
DPI = 110

Series = dict[str, tuple[list[float], dict[str, Any]]]
"""A legend's text to a height for each group (nan: no bar) and a style."""


def draw(json: Path, env: dict[str, Any], rows: Sequence[Row], summary: Summary) -> Iterator[Path]:
    """Writes a result's pictures beside its JSON file, those for which it has rows, and gives their names."""
    pictures: dict[str, Callable[[], Figure | None]] = {}
    layers = [row for row in rows if row["suite"] == "layers" and row["median_ms"]]
    for network in dict.fromkeys(row["network"] for row in layers):
        of_network = [row for row in layers if row["network"] == network]
        pictures[f"speedup-{network}"] = lambda of_network=of_network: speed_ups(of_network)
        pictures[f"time-{network}"] = lambda of_network=of_network: times(of_network)
    if layers:
        pictures["roofline"] = lambda: roofline(layers, env["ceilings"])
    if summary["models"]:
        pictures["models"] = lambda: models([row for row in rows if row["suite"] == "model"], summary)
    if any(row["suite"] == "memory" and row["saved_bytes"] is not None for row in rows):
        pictures["memory"] = lambda: memory([row for row in rows if row["suite"] == "memory"])
    pictures["predictions"] = lambda: predicted(summary["predictions"])
    for name, make in pictures.items():
        figure = make()
        if figure is not None:
            path = json.with_suffix(f".{name}.png")
            figure.savefig(path, dpi=DPI)
            yield path


def size_of(row: Row) -> str:
    return f"{DEVICES[row['device']]}, batch {row['batch']}, {row['dtype']}"


def one_setting(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first dtype and batch: a picture of layers has room for one."""
    first = rows[0]
    return [row for row in rows if (row["dtype"], row["batch"]) == (first["dtype"], first["batch"])]


def grouped_bars(axes: Axes, groups: Sequence[str], series: Series, *, values: str | None = None) -> None:
    """Groups of bars; `values` formats the number above each, None writes none."""
    width = GROUP / max(len(series), 1)
    for number, (text, (heights, style)) in enumerate(series.items()):
        left = -GROUP / 2 + number * width
        bars = axes.bar(
            [group + left for group in range(len(groups))], heights, width, align="edge", label=text, **style
        )
        if values:
            labels = ["" if height != height else values.format(height) for height in heights]
            texts = axes.bar_label(bars, labels, fontsize=8, rotation=90 if width < 0.25 else 0, padding=3)
            for text in texts:
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", rotation_mode="anchor")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if values:
        axes.margins(y=0.2)


def new_figure(
    panels: int, *, width: float = 12, height: float = 3.6, across: bool = False
) -> tuple[Figure, list[Axes]]:
    rows, columns = (1, panels) if across else (panels, 1)
    figure = Figure(figsize=(width, 1 + height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def legend_above(axes: Axes, columns: int = 5) -> None:
    axes.legend(fontsize=9, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)


def panels_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """A panel for each pass and mode."""
    return list(dict.fromkeys((row["pass"], row["mode"]) for row in rows))


def panel_title(direction: str, mode: str) -> str:
    return PASSES[direction].capitalize() + (f" ({MODES[mode]})" if mode != "plain" else "")


def speed_ups(rows: Sequence[Row]) -> Figure | None:
    """How many times faster ours is than each peer, layer by layer. None where nothing can be compared.

    On the CPU ours is PyTorch's own convolutions, and is compared in each layout with what runs in the same one.
    """
    rows = one_setting(rows)
    ours = [row for row in rows if is_ours(row["impl"])]
    if not ours or len(ours) == len(rows):
        return None
    panels = panels_of(ours)
    figure, all_axes = new_figure(len(panels))
    figure.suptitle(
        f"Speed-up of fused_sepconv, {rows[0]['network'].capitalize()}'s layers: {size_of(rows[0])}", fontsize=14
    )
    for axes, (direction, mode) in zip(all_axes, panels, strict=True):
        of_panel = [row for row in rows if (row["pass"], row["mode"]) == (direction, mode)]
        groups = list(dict.fromkeys(row["case"] for row in of_panel))
        series = speed_up_series(of_panel, groups)
        grouped_bars(axes, groups, series, values="{:.2f}")
        axes.axhline(1, color="black", linewidth=0.9)
        axes.set_ylabel("times faster\n(above 1: ours wins)")
        axes.set_title(panel_title(direction, mode), loc="left", fontsize=11, pad=22 if axes is all_axes[0] else 6)
    legend_above(all_axes[0])
    return figure


def speed_up_series(rows: Sequence[Row], groups: Sequence[str]) -> Series:
    """For each peer and each layout of ours that it is compared with, a bar a layer."""
    times = {(column(row), row["case"]): row["median_ms"] for row in rows}
    columns = list(dict.fromkeys(map(column, rows)))
    ours = [key for key in columns if is_ours(key[0])]
    colours = iter(PEER_COLOURS)
    series: Series = {}
    for peer in (key for key in columns if not is_ours(key[0])):
        for own in ours:
            if rows[0]["device"] == "cpu" and own[1] != peer[1]:
                continue
            text = f"against {name_of(*peer[:2])}" + (f", ours in {own[1]}" if len(ours) > 1 else "")
            heights = [
                times[peer, case] / times[own, case] if (peer, case) in times and (own, case) in times else NO_BAR
                for case in groups
            ]
            series[text] = (heights, {"color": next(colours)})
    return series


def times(rows: Sequence[Row]) -> Figure:
    """Milliseconds of every implementation, and the floor."""
    rows = one_setting(rows)
    panels = panels_of(rows)
    figure, all_axes = new_figure(len(panels))
    figure.suptitle(f"Time of {rows[0]['network'].capitalize()}'s layers: {size_of(rows[0])}", fontsize=14)
    for axes, (direction, mode) in zip(all_axes, panels, strict=True):
        of_panel = [row for row in rows if (row["pass"], row["mode"]) == (direction, mode)]
        groups = list(dict.fromkeys(row["case"] for row in of_panel))
        found = {(column(row), row["case"]): row["median_ms"] for row in of_panel}
        ours, peers = iter(OURS_COLOURS), iter(PEER_COLOURS)
        grouped_bars(
            axes,
            groups,
            {
                name_of(*key[:2]): (
                    [found.get((key, case), NO_BAR) for case in groups],
                    {"color": next(ours if is_ours(key[0]) else peers)},
                )
                for key in dict.fromkeys(map(column, of_panel))
            },
        )
        floors = {row["case"]: row["floor_ms"] for row in of_panel}
        for number, case in enumerate(groups):
            axes.hlines(
                floors[case],
                number - GROUP / 2,
                number + GROUP / 2,
                color="black",
                linewidth=2,
                label=f"floor of the fused problem ({rows[0]['floor_device']})" if not number else None,
            )
        axes.set_yscale("log")
        axes.set_ylabel("ms (log)")
        axes.set_title(panel_title(direction, mode), loc="left", fontsize=11, pad=22 if axes is all_axes[0] else 6)
    legend_above(all_axes[0])
    return figure


def roofline(rows: Sequence[Row], ceilings: dict[str, Any]) -> Figure:
    """Flops a second by flops a byte of the fused problem, under the measured ceilings: a panel a pass."""
    rows = one_setting(rows)
    panels = panels_of(rows)
    figure, all_axes = new_figure(len(panels), width=max(5.2 * len(panels), 7), height=5, across=True)
    first = rows[0]
    figure.suptitle(
        f"Roofline, {ceilings['device']}: copy {ceilings['bytes_per_second'] / 1e9:.0f} GB/s and matrix product, both "
        f"measured. Batch {first['batch']}, {first['dtype']}",
        fontsize=13,
    )
    matrix = ceilings["matrix_flops"].get(first["dtype"], ceilings["fma_flops"])
    colours, markers = iter(PEER_COLOURS), "o^sDvP"
    ours = iter(OURS_COLOURS)
    columns = {
        key: next(ours if is_ours(key[0]) else colours) for key in dict.fromkeys(column(row)[:2] for row in rows)
    }
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for axes, (direction, mode) in zip(all_axes, panels, strict=True):
        of_panel = [row for row in rows if (row["pass"], row["mode"]) == (direction, mode)]
        intensities = [row["flops"] / row["bytes"] for row in of_panel]
        left, right = min(intensities) / 1.5, max(intensities) * 1.5
        edges = sorted({left, right, min(max(matrix / ceilings["bytes_per_second"], left), right)})
        axes.plot(edges, [min(x * ceilings["bytes_per_second"], matrix) / 1e9 for x in edges], color="black", lw=1.5)
        for row, x in zip(of_panel, intensities, strict=True):
            axes.scatter(
                x,
                row["flops"] / row["median_ms"] / 1e6,
                s=42,
                color=columns[column(row)[:2]],
                alpha=0.85,
                marker=markers[networks.index(row["network"]) % len(markers)],
                linewidths=0,
            )
        axes.set(xscale="log", yscale="log", xlabel="flop a byte (of the fused problem)", ylabel="Gflop/s")
        axes.set_title(panel_title(direction, mode), fontsize=10)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3, which="both")
    handles = [Line2D([], [], color="black", label="ceiling")]
    handles += [
        Line2D([], [], color=colour, marker="o", linestyle="", label=name_of(*key)) for key, colour in columns.items()
    ]
    handles += [
        Line2D([], [], color="grey", marker=markers[number % len(markers)], linestyle="", label=network)
        for number, network in enumerate(networks)
        if len(networks) > 1
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    return figure


def models(rows: Sequence[Row], summary: Summary) -> Figure:
    """Throughput of whole networks, and Xception's by that of Inception V3, beside what the paper had."""
    timed = one_setting([row for row in rows if row["median_ms"]])
    passes = list(dict.fromkeys(row["pass"] for row in timed))
    figure, all_axes = new_figure(len(passes) + 1, width=14, height=5, across=True)
    figure.suptitle(f"Whole networks: {size_of(timed[0])}", fontsize=14)
    for axes, direction in zip(all_axes, passes, strict=False):
        of_pass = [row for row in timed if row["pass"] == direction]
        names = [model_name(row) for row in of_pass]
        bars = axes.barh(
            range(len(of_pass)),
            [row["images_per_second"] for row in of_pass],
            color=[bar_colour(row) for row in of_pass],
        )
        axes.bar_label(bars, [f"{row['images_per_second']:.3g}" for row in of_pass], padding=3, fontsize=9)
        axes.set_yticks(range(len(of_pass)), names)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel("images/s")
        axes.set_title(MODEL_PASSES[direction].capitalize())
        axes.spines[["top", "right"]].set_visible(False)
    draw_ratios(all_axes[-1], timed, summary)
    return figure


def bar_colour(row: Row) -> str:
    if is_ours(row["impl"]):
        return OURS_COLOURS[0]
    return PEER_COLOURS[0] if row["network"] == "xception" else PEER_COLOURS[2]


def model_name(row: Row) -> str:
    return f"{row['case'].partition('@')[0]}\n{name_of(row['impl'], row['layout'])}"


def draw_ratios(axes: Axes, rows: Sequence[Row], summary: Summary) -> None:
    """Xception's training steps a second by Inception V3's: the paper's table 3."""
    first = rows[0]
    lines = [
        line
        for line in summary["models"]
        if line["network"] == "xception"
        and line["pass"] == "both"
        and line["by_inception_v3"]
        and (line["dtype"], line["batch"]) == (first["dtype"], first["batch"])
    ]
    low, high = PUBLISHED_RATIOS
    names = ["paper (2017)", "timm's published\nfigures", *(name_of(line["impl"], line["layout"]) for line in lines)]
    widths = [PAPER_RATIO, high - low, *(line["by_inception_v3"] for line in lines)]
    colours = [PAPER_COLOUR, PEER_COLOURS[2]]
    colours += [OURS_COLOURS[0] if is_ours(line["impl"]) else PEER_COLOURS[0] for line in lines]
    bars = axes.barh(range(len(names)), widths, left=[0, low, *(0 for _ in lines)], color=colours)
    texts = [f"{PAPER_RATIO:.2f}", f"{low:.2f} to {high:.2f}", *(f"{line['by_inception_v3']:.2f}" for line in lines)]
    for text in axes.bar_label(bars, texts, padding=3, fontsize=9):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.9)
    axes.set_xlim(0, max(1.2, *(width * 1.2 for width in widths)))
    axes.set_xlabel("by Inception V3's of the same run" if lines else "Inception V3 = 1; none measured in this run")
    axes.set_title("Xception, training steps a second")
    axes.spines[["top", "right"]].set_visible(False)


def memory(rows: Sequence[Row]) -> Figure:
    """What is kept for the backward and the most that is held at once, of layers and of whole networks."""
    rows = one_setting([row for row in rows if row["saved_bytes"] is not None])
    kinds = {
        "Layers, forward and backward": [row for row in rows if "->" in row["case"]],
        "A training step": [row for row in rows if "->" not in row["case"]],
    }
    kinds = {title: found for title, found in kinds.items() if found}
    figure, all_axes = new_figure(2 * len(kinds), height=3.2)
    figure.suptitle(f"Memory: {size_of(rows[0])}", fontsize=14)
    panels = [
        (title, found, name, what)
        for title, found in kinds.items()
        for name, what in (("saved_bytes", "kept for the backward"), ("peak_bytes", "the most held at once"))
    ]
    for axes, (title, found, name, what) in zip(all_axes, panels, strict=True):
        if "->" not in found[0]["case"]:
            draw_network_memory(axes, found, name)
            axes.set_title(f"{title}: {what}", loc="left", fontsize=11)
            continue
        groups = list(dict.fromkeys(row["case"] for row in found))
        values = {(column(row)[:2], row["case"]): row[name] / 1e6 for row in found}
        ours, peers = iter(OURS_COLOURS), iter(PEER_COLOURS)
        grouped_bars(
            axes,
            groups,
            {
                name_of(*key): (
                    [values.get((key, case), NO_BAR) for case in groups],
                    {"color": next(ours if is_ours(key[0]) else peers)},
                )
                for key in dict.fromkeys(column(row)[:2] for row in found)
            },
            values="{:.3g}",
        )
        axes.set_ylabel("MB")
        axes.set_title(f"{title}: {what}", loc="left", fontsize=11)
        axes.legend(fontsize=9, frameon=False, loc="upper right", ncols=4)
        axes.margins(y=0.35)
    return figure


def draw_network_memory(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """A bar for each whole network and implementation, in MB."""
    bars = axes.barh(range(len(rows)), [row[name] / 1e6 for row in rows], color=[bar_colour(row) for row in rows])
    axes.bar_label(bars, [f"{row[name] / 1e6:.3g}" for row in rows], padding=3, fontsize=9)
    axes.set_yticks(range(len(rows)), [model_name(row) for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("MB")
    axes.spines[["top", "right"]].set_visible(False)


def predicted(predictions: dict[str, Any]) -> Figure:
    """What the plan expects of its kernels, between the floors of fused and of separate kernels: no measurement."""
    passes = list(dict.fromkeys(line["pass"] for line in predictions["rows"]))
    figure, all_axes = new_figure(len(passes))
    figure.suptitle(
        f"PREDICTED, not measured: {predictions['device']}, batch {predictions['batch']}, {predictions['dtype']}, "
        f"{predictions['layout']}",
        fontsize=14,
    )
    styles = {
        "unfused_floor_ms": ("separate kernels, floor", {"color": PEER_COLOURS[2]}),
        "predicted_ms": ("fused_sepconv, predicted", {"color": PREDICTION_COLOUR, "hatch": "//"}),
        "floor_ms": ("fused, floor", {"color": PEER_COLOURS[3]}),
    }
    for axes, direction in zip(all_axes, passes, strict=True):
        lines = [line for line in predictions["rows"] if line["pass"] == direction and line["plan"]]
        series = {text: ([line[key] for line in lines], style) for key, (text, style) in styles.items()}
        grouped_bars(axes, [line["case"] for line in lines], series)
        axes.set_ylabel("ms")
        axes.set_title(PASSES[direction].capitalize(), loc="left", fontsize=11, pad=22 if axes is all_axes[0] else 6)
        axes.text(
            1, 0.97, fill(f"planned: {planned(lines)}", 70), transform=axes.transAxes, ha="right", va="top", fontsize=9
        )
    legend_above(all_axes[0])
    return figure
