"""`bench.py report`: README's results, made from benchmarks/results/, so that no figure there is typed by hand.

Where benchmarks/results/ has no result of a GPU, the section says so, and shows what perfect kernels would take.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from floors import H200, network_floor
from layers import XCEPTION, Layer
from machine import CHECKOUT
from peers import is_ours
from problem import PASSES
from record import PAPER_RATIO, PAPER_STEPS, PUBLISHED_RATIOS, read, values
from tables import Table, figure, layer_table, memory_table, model_table

BEGIN = "<!-- results: `python benchmarks/bench.py report` writes what stands between these two lines -->"
END = "<!-- end of results -->"
WIDTH = 120  # the width of README's lines
BATCH, DTYPE = 64, "bfloat16"
"""Those of the floors where nothing is measured."""


def main(argv: Sequence[str]) -> int:
    """Returns 0, 1 where --check finds an old README, or 2 where a file is not what it should be."""
    parser = argparse.ArgumentParser(prog="bench.py report", description=__doc__.partition("\n")[0])
    parser.add_argument("--readme", type=Path, default=CHECKOUT / "README.md", metavar="PATH")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing: fail where the README is not up to date")
    given = parser.parse_args(argv)
    for name, there in (("results", given.results.is_dir()), ("readme", given.readme.is_file())):
        if not there:
            parser.error(f"argument --{name}: there is no {getattr(given, name)}")
    text = given.readme.read_text()
    try:
        new = replaced(text, section(given.results))
    except ValueError as error:
        print(error)
        return 2
    if given.check:
        if new != text:
            print(f"{given.readme} is not what benchmarks/results/ says: run `python benchmarks/bench.py report`")
        return int(new != text)
    given.readme.write_text(new)
    print(f"{given.readme}: {'results rebuilt' if new != text else 'results were up to date'}")
    return 0


def replaced(readme: str, body: str) -> str:
    """A README with another results section. ValueError where it has no place for one."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README: expected the line {BEGIN!r} once, and after it {END!r} once")
    unbroken = {"break_long_words": False, "break_on_hyphens": False}
    paragraphs = [part if part.startswith(("|", "#")) else fill(part, WIDTH, **unbroken) for part in body.split("\n\n")]
    before, _, rest = readme.partition(BEGIN)
    return "\n\n".join([f"{before}{BEGIN}", *paragraphs, f"{END}{rest.partition(END)[2]}"])


def section(folder: Path) -> str:
    """The results section: of the GPUs that were measured, or of none."""
    results = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    measured = [(path, result) for path, result in results if any(row["device"] == "cuda" for row in result["rows"])]
    return "\n\n".join(measured_section(path, result) for path, result in measured) or section_of_floors()


def paper_sentence(ours: str) -> str:
    low, high = PUBLISHED_RATIOS
    return (
        f"Xception by Inception V3 in training steps a second: {PAPER_RATIO:.2f} in the paper "
        f"({PAPER_STEPS['Xception']:.0f} against {PAPER_STEPS['Inception V3']:.0f}), {low:.2f} to {high:.2f} in timm's "
        f"published figures. {ours}"
    )


def section_of_floors() -> str:
    """The least that Xception can take on an H200."""
    kinds = [(direction, fused) for direction in ("fwd", "bwd") for fused in (False, True)]

    def cells(layers: Sequence[Layer]) -> list[str]:
        floors = [network_floor(layers, BATCH, DTYPE, direction, fused=fused) for direction, fused in kinds]
        return [str(sum(layer.count for layer in layers)), *(figure(floor.milliseconds * 1e3) for floor in floors)]

    return "\n\n".join(
        [
            "No GPU has been measured yet: `benchmarks/results/` has no result of one. These are floors, computed and "
            "not measured: the time of perfect kernels, one for each convolution or one for both.",
            Table(
                f"Floors of Xception's separable convolutions on an {H200.device}, us: batch {BATCH}, {DTYPE}; a line "
                "counts a layer as often as the network has it",
                ["layer", "count", *(f"{PASSES[way]}, {'fused' if fused else 'separate'}" for way, fused in kinds)],
                [*([layer.name, *cells([layer])] for layer in XCEPTION), ["all", *cells(XCEPTION)]],
            ).markdown(),
            paper_sentence("Ours has not been measured on a GPU."),
        ]
    )


def measured_section(path: Path, result: dict[str, Any]) -> str:
    env, summary, gpu = result["env"], result["summary"], result["env"]["gpu"]
    rows = [row for row in result["rows"] if row["device"] == "cuda"]
    parts = [
        f"### {gpu['name']}",
        f"Driver {gpu['driver']}, PyTorch {env['torch']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, commit "
        f"`{str(env['commit'])[:12]}`; copy {env['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s, measured. All "
        f"rows: `{path.name}`; {len(summary['failed'])} have an error.",
    ]
    layers = [row for row in [*rows, *summary["totals"]] if row["suite"] == "layers" and row["network"] == "xception"]
    if layers:  # in the first dtype, batch and mode
        layers = [
            row
            for row in layers
            if values(row, "dtype", "batch", "mode") == values(layers[0], "dtype", "batch", "mode")
        ]
        for direction in dict.fromkeys(row["pass"] for row in layers):
            parts.append(layer_table([row for row in layers if row["pass"] == direction]).markdown())
    if models := [row for row in rows if row["suite"] == "model"]:
        parts.append(model_table(models, summary).markdown())
        ratios = [
            line["by_inception_v3"] for line in summary["models"] if is_ours(line["impl"]) and line["pass"] == "both"
        ]
        best = max((ratio for ratio in ratios if ratio), default=None)
        parts.append(paper_sentence(f"Ours: {best:.2f}." if best else "Ours was not measured beside Inception V3."))
    if memory := [row for row in rows if row["suite"] == "memory"]:
        parts.append(memory_table(memory, summary).markdown())
    pictures = sorted(path.parent.glob(f"{path.stem}.*.png"))
    links = [f"[{name.suffixes[-2].removeprefix('.')}](benchmarks/results/{name.name})" for name in pictures]
    return "\n\n".join([*parts, *([" ".join(links)] if links else [])])
