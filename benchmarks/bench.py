"""What do you gain, and where? Times the fused separable convolution against PyTorch's own.

    python benchmarks/bench.py --quick

Every implementation's answer is checked before it is timed. The run ends with tables, a JSON file and, where matplotlib
is installed, a picture beside it. Without a GPU the CPU is measured, and what the plan expects of an H200 stands
beside, marked as the prediction that it is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    import fused_sepconv  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "fused_sepconv":
        raise
    sys.exit("fused_sepconv is not installed: run `pip install .` at the root of the checkout first")

from environment import environment
from layers import XCEPTION
from peers import is_ours
from predictions import predict_suite
from problem import DTYPES, LAYOUTS, PASSES, convolution_precision
from record import Row, Summary, summarize, write
from suites import Settings, Step, layer_suite, overhead_suite
from tables import result_tables
from terminal import PlainTerminal, Terminal, terminal

SECONDS, QUICK_SECONDS = 1.0, 0.15
"""Spent on the samples of each row of the layer suite."""
OVERHEAD_SECONDS, QUICK_OVERHEAD_SECONDS = 4.0, 1.0
"""Of the overhead suite: its calls are short and its result is a ratio."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The command line, and how to measure by it: what is not given fits the machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples: under two minutes on two CPU cores")
    parser.add_argument("--suite", choices=("layers", "overhead", "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--batch", type=int, help="images; default: 1 on the CPU, 64 on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--layout", choices=LAYOUTS, help="of x; default: both on the CPU, nhwc on a GPU")
    parser.add_argument("--passes", default=",".join(PASSES), metavar="P,P", help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="PATH", help="default: %(default)s")
    options = parser.parse_args(argv)

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA GPU on this machine")
    if options.dtype == "tf32" and not gpu:
        parser.error("argument --dtype: tf32 is arithmetic of CUDA GPUs")
    if options.batch is not None and options.batch < 1:
        parser.error(f"argument --batch: expected 1 or more, got {options.batch}")
    passes = tuple(dict.fromkeys(options.passes.split(",")))
    if unknown := [direction for direction in passes if direction not in PASSES]:
        parser.error(f"argument --passes: expected some of {','.join(PASSES)}, got {unknown[0]!r}")
    if not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {options.json.parent}")

    settings = Settings(
        device=device,
        batch=options.batch or (64 if gpu else 1),
        dtype=options.dtype or ("bfloat16" if gpu else "float32"),
        layouts=(options.layout,) if options.layout else ("nhwc",) if gpu else ("nchw", "nhwc"),
        passes=passes,
        seconds=QUICK_SECONDS if options.quick else SECONDS,
        threads=torch.get_num_threads(),
        turns=1 if gpu else 3,
        input_sets=2 if gpu else 1,
    )
    return options, settings


def measure(steps: Sequence[Step], screen: Terminal) -> list[Row]:
    """Runs the steps. An interruption ends it early; what is measured by then is kept."""
    rows = []
    try:
        with screen.progress(sum(step.rows for step in steps)) as progress:
            for step in steps:
                progress.start(step.label)
                for row in step.run():
                    rows.append(row)
                    progress.advance()
    except KeyboardInterrupt:
        screen.say("Interrupted: what follows is what was measured until then.")
    return rows


def picture(path: Path, rows: Sequence[Row], summary: Summary) -> str | None:
    """Draws the result and says what became of it; None where there is nothing to draw with."""
    try:
        import plots
    except ModuleNotFoundError:
        return None
    return f"Picture: {path}" if plots.draw(path, rows, summary) else "No picture: no layer of ours was timed."


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where one of our own answers is wrong or missing, or 130 after an interruption."""
    options, settings = parse(argv)
    screen = terminal()
    steps = []
    if options.suite in ("layers", "all"):
        steps += layer_suite(settings, XCEPTION)
    if options.suite in ("overhead", "all"):
        steps += overhead_suite(QUICK_OVERHEAD_SECONDS if options.quick else OVERHEAD_SECONDS)

    with convolution_precision(settings.dtype):
        env = environment(settings.threads)
    hardware = env["gpu"]["name"] if settings.device == "cuda" else env["cpu"]
    screen.say(
        f"fused_sepconv {env['fused_sepconv']}, PyTorch {env['torch']}, {hardware}, {settings.threads} CPU threads"
    )
    if env["load_average"] > env["cpu_cores"] / 2:
        screen.say(
            f"This machine is busy (load {env['load_average']:.1f}, {env['cpu_cores']} cores): expect poor timings."
        )
    rows = measure(steps, screen)

    if settings.device == "cuda":
        predictions = predict_suite(XCEPTION, settings.passes, settings.batch, settings.dtype, settings.layouts[0])
    else:
        predictions = predict_suite(XCEPTION, settings.passes)
    summary = summarize(rows, predictions)
    write(options.json, env, rows, summary)
    for table in result_tables(rows, summary):
        screen.show(table)
    for row in summary["failed"]:
        screen.say(f"No time for {row['impl']}, {row['case']}, {row['layout']}, {row['pass']}: {row['error']}")
    drawn = picture(options.json.with_suffix(".png"), rows, summary)
    if drawn:
        screen.say(drawn)
    if drawn is None or isinstance(screen, PlainTerminal):
        screen.say('`pip install ".[bench]"` adds a picture (matplotlib) and better tables and progress (rich).')
    screen.say(f"Result: {options.json}")
    if len(rows) < sum(step.rows for step in steps):
        return 130
    return int(any(is_ours(row["impl"]) for row in summary["failed"]))


if __name__ == "__main__":
    sys.exit(main())
