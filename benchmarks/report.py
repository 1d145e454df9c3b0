"""`bench.py report`: README's results, made from benchmarks/results/, so that no figure there is typed by hand.

Where benchmarks/results/ has no result of a GPU, the section says so, and shows what the plan predicts as predictions.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from layers import XCEPTION
from network_floor import xception_floor
from peers import is_ours
from plans import explanations, total
from predictions import predict_suite
from problem import PASSES
from record import Row, peers_of, read, speed_up
from roofline import H200
from summary import PAPER_RATIO, PAPER_STEPS, PUBLISHED_RATIOS
from tables import MODEL_PASSES, MODES, factor, figure, megabytes, name_of, percent

CHECKOUT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- results: `python benchmarks/bench.py report` writes what stands between these two lines -->"
END = "<!-- end of results -->"

WIDTH = 120
"""Of README's lines."""
UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}

PREDICTED_BATCH, PREDICTED_DTYPE = 64, "bfloat16"
OTHER_DEVICE = "A100"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py report", description=__doc__.partition("\n")[0])
    parser.add_argument("--readme", type=Path, default=CHECKOUT / "README.md", metavar="PATH")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing: fail where the README is not up to date")
    given = parser.parse_args(argv)
    if not given.results.is_dir():
        parser.error(f"argument --results: there is no folder {given.results}")
    if not given.readme.is_file():
        parser.error(f"argument --readme: there is no file {given.readme}")
    return given


def main(argv: Sequence[str]) -> int:
    """Returns 0, 1 where --check finds an old README, or 2 where a file is not what it should be."""
    given = parse(argv)
    text = given.readme.read_text()
    try:
        new = replaced(text, section(given.results))
    except ValueError as error:
        print(error)
        return 2
    if given.check:
        if new != text:
            print(f"{given.readme} is not what benchmarks/results/ and the plan say: run `benchmarks/bench.py report`")
        return int(new != text)
    given.readme.write_text(new)
    print(f"{given.readme}: {'results rebuilt' if new != text else 'results were up to date'}")
    return 0


def replaced(readme: str, body: str) -> str:
    """A README with another results section. ValueError where it has no place for one."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README: expected the line {BEGIN!r} once, and after it {END!r} once")
    paragraphs = [part if part.startswith(("|", "#")) else fill(part, WIDTH, **UNBROKEN) for part in body.split("\n\n")]
    body = "\n\n".join(paragraphs)
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}"


def section(folder: Path) -> str:
    """The results section: of the GPUs that were measured, or of none."""
    results = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    measured = [(path, result) for path, result in results if any(row["device"] == "cuda" for row in result["rows"])]
    if not measured:
        return predicted_section()
    return "\n\n".join(measured_section(path, result) for path, result in measured)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Predicted


def predicted_section() -> str:
    predictions = predict_suite(XCEPTION, ("fwd", "bwd"), PREDICTED_BATCH, PREDICTED_DTYPE)
    lines = {(line["case"], line["pass"]): line for line in predictions["rows"]}
    cases = list(dict.fromkeys(case for case, _ in lines))
    body = []
    for case in cases:
        cells = [case, str(lines[case, "fwd"]["count"])]
        for direction in ("fwd", "bwd"):
            line = lines[case, direction]
            cells += [figure(line[key] * 1e3) for key in ("unfused_floor_ms", "predicted_ms", "floor_ms")]
        body.append(cells)
    table = markdown(
        [
            "layer",
            "count",
            *(
                f"{PASSES[d]}: {what}"
                for d in ("fwd", "bwd")
                for what in ("separate, floor", "**predicted**", "fused, floor")
            ),
        ],
        body,
    )
    plans = [
        f"{PASSES[direction]}: "
        + ", ".join(
            dict.fromkeys(line["plan"] for line in predictions["rows"] if line["plan"] and line["pass"] == direction)
        )
        for direction in ("fwd", "bwd")
    ]
    return "\n\n".join(
        [
            "**No GPU has been measured yet: `benchmarks/results/` has no result of one.** What follows is predicted "
            f"for an {H200.device}, not measured: Xception's separable convolutions, batch {PREDICTED_BATCH}, "
            f'{PREDICTED_DTYPE}, nhwc, in microseconds. "Predicted" is what the plan expects of what it would run '
            f"({'; '.join(plans)}; `reference` is PyTorch's own two convolutions). The floors are what perfect kernels "
            "would take, one for each convolution or one for both; nothing that runs two can beat the first.",
            table,
            other_device(),
            network_floors(),
            paper_sentence("Ours has not been measured on a GPU."),
        ]
    )


def other_device() -> str:
    """The same layers on the device of the generation before."""
    plans = list(explanations(XCEPTION, OTHER_DEVICE, PREDICTED_BATCH, PREDICTED_DTYPE))
    return (
        f"On an {OTHER_DEVICE} (compute capability 8.0): {total(XCEPTION, plans)}. `python benchmarks/bench.py plan "
        f"--device {OTHER_DEVICE}` shows for each layer what would run, what else could, and why that loses."
    )


def network_floors() -> str:
    """What fusing can bring the whole network at best."""
    inference, training = (
        {
            way: figure(xception_floor(PREDICTED_BATCH, PREDICTED_DTYPE, way=way, training=training).milliseconds)
            for way in ("unfused", "fused", "one pass")
        }
        for training in (False, True)
    )
    return (
        f"Floors of the whole network there: inference {inference['unfused']} ms with separate kernels, "
        f"{inference['fused']} ms fused; a training step {training['unfused']} ms, and {training['one pass']} to "
        f"{training['fused']} ms where BatchNorm and ReLU ride along in the fused kernels."
    )


def paper_sentence(ours: str) -> str:
    low, high = PUBLISHED_RATIOS
    return (
        f"Xception by Inception V3 in training steps a second: {PAPER_RATIO:.2f} in the paper "
        f"({PAPER_STEPS['Xception']:.0f} against {PAPER_STEPS['Inception V3']:.0f}), {low:.2f} to {high:.2f} in timm's "
        f"published figures. {ours}"
    )


# Measured


def measured_section(path: Path, result: dict[str, Any]) -> str:
    env, summary = result["env"], result["summary"]
    rows = [row for row in result["rows"] if row["device"] == "cuda"]
    gpu = env["gpu"]
    parts = [
        f"### {gpu['name']}",
        f"Driver {gpu['driver']}, PyTorch {env['torch']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, commit "
        f"`{str(env['commit'])[:12]}`; copy {env['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s, measured. All rows: "
        f"`{path.name}`. {failures(summary)}",
        speed_up_table([line for line in summary["speed_ups"] if line["impl"].startswith("fused")]),
        *layer_tables(rows),
        model_section(summary),
        memory_section([row for row in rows if row["suite"] == "memory"]),
        " ".join(
            f"[{picture.suffixes[-2].removeprefix('.')}](benchmarks/results/{picture.name})"
            for picture in sorted(path.parent.glob(f"{path.stem}.*.png"))
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def failures(summary: dict[str, Any]) -> str:
    parts = []
    if summary["failed"]:
        parts.append(f"{len(summary['failed'])} rows have an error instead of a time.")
    if summary["throttled"]:
        parts.append(f"{summary['throttled']} rows have samples at throttled clocks.")
    return " ".join(parts)


def speed_up_table(lines: Sequence[dict[str, Any]]) -> str:
    """Losing layers stay in: the least is named."""
    if not lines:
        return ""
    return "Against the fastest peer of the same run, geometric mean over the distinct layers:\n\n" + markdown(
        ["network", "pass", "dtype, batch", "layout", "sampled", "speed-up", "least", "of the fused floor"],
        [
            [
                line["network"],
                PASSES[line["pass"]],
                f"{line['dtype']}, {line['batch']}",
                line["layout"],
                line["mode"],
                factor(line["speed_up"]),
                f"{factor(line['least'])} ({line['least_case']})",
                percent(line["floor_fraction"]),
            ]
            for line in lines
        ],
    )


def layer_tables(rows: Sequence[Row]) -> list[str]:
    """Xception's layers in the first dtype, batch and mode, a table for each pass."""
    own = [row for row in rows if row["suite"] == "layers" and row["network"] == "xception" and is_ours(row["impl"])]
    if not own:
        return []
    first = own[0]
    own = [row for row in own if all(row[key] == first[key] for key in ("dtype", "batch", "mode", "layout"))]
    found = []
    for direction in dict.fromkeys(row["pass"] for row in own):
        body = []
        for row in (row for row in own if row["pass"] == direction):
            best = min(peers_of(row, rows), key=lambda peer: peer["median_ms"], default=None)
            body.append(
                [
                    row["case"],
                    str(row["count"]),
                    "error" if row["error"] else figure(row["median_ms"] * 1e3),
                    f"{figure(best['median_ms'] * 1e3)} ({name_of(best['impl'], best['layout'])})" if best else "-",
                    factor(speed_up(row, rows)),
                    figure(row["floor_ms"] * 1e3),
                    str(row["plan"]),
                ]
            )
        found.append(
            f"Xception, {PASSES[direction]}, µs ({first['dtype']}, batch {first['batch']}, {first['layout']}; "
            f"{MODES[first['mode']]}):\n\n"
            + markdown(["layer", "count", "ours", "fastest peer", "speed-up", "fused floor", "planned"], body)
        )
    return found


def model_section(summary: dict[str, Any]) -> str:
    """Table 3 of the paper, and the ratio that it is about."""
    lines = summary["models"]
    if not lines:
        return ""
    table = markdown(
        ["network", "run", "what", "dtype, batch", "images/s", "steps/s", "by Inception V3"],
        [
            [
                line["case"],
                name_of(line["impl"], line["layout"]),
                MODEL_PASSES[line["pass"]],
                f"{line['dtype']}, {line['batch']}",
                figure(line["images_per_second"]),
                figure(line["steps_per_second"]),
                factor(line["by_inception_v3"]),
            ]
            for line in lines
        ],
    )
    ratios = [
        line["by_inception_v3"]
        for line in lines
        if is_ours(line["impl"]) and line["pass"] == "both" and line["by_inception_v3"]
    ]
    ours = f"Ours: {max(ratios):.2f}." if ratios else "Ours was not measured beside Inception V3."
    return f"{table}\n\n{paper_sentence(ours)}"


def memory_section(rows: Sequence[Row]) -> str:
    """Kept for the backward, and the most held at once, of a training step."""
    rows = [row for row in rows if "->" not in row["case"] and row["saved_bytes"] is not None]
    if not rows:
        return ""
    return markdown(
        ["a training step", "run", "dtype, batch", "kept for the backward, MB", "peak, MB"],
        [
            [
                row["case"],
                name_of(row["impl"], row["layout"]),
                f"{row['dtype']}, {row['batch']}",
                megabytes(row["saved_bytes"]),
                megabytes(row["peak_bytes"]),
            ]
            for row in rows
        ],
    )
