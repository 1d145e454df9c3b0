"""What do you gain, and where? Times the fused separable convolution against PyTorch's own.

    python benchmarks/bench.py --quick                  measure: tables, a JSON and a CSV file, pictures
    python benchmarks/bench.py compare A.json B.json    what changed between two results
    python benchmarks/bench.py plan --device A100        what would run there and why, predicted
    python benchmarks/bench.py report                   README's results, made from benchmarks/results/

Every implementation's answer is checked before it is timed. Without a GPU the CPU is measured, and what the plan
expects of an H200 stands beside, marked as the prediction that it is.
"""

import sys
from collections.abc import Sequence

import torch

try:
    import fused_sepconv  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "fused_sepconv":
        raise
    sys.exit("fused_sepconv is not installed: run `pip install .` at the root of the checkout first")

import compare
import interruption
import plans
import report
from environment import environment
from layers import XCEPTION
from memory_suite import memory_suite
from model_suite import model_suite
from options import Options, parse
from peers import is_ours
from predictions import predict_suite
from problem import convolution_flags
from record import Row, write
from settings import Settings
from suites import Step, layer_suite, overhead_suite
from summary import Summary, summarize
from tables import result_tables
from terminal import PlainTerminal, Terminal, terminal

OVERHEAD_SECONDS, QUICK_OVERHEAD_SECONDS = 4.0, 1.0
"""Spent on the samples of each row of the overhead suite: its calls are short and its result is a ratio."""

INTERRUPTED = 130


def steps_of(options: Options, settings: Settings) -> list[Step]:
    """What a run does, in its order: an interruption costs what comes last."""
    suites = {
        "layers": lambda: layer_suite(settings),
        "overhead": lambda: overhead_suite(settings, QUICK_OVERHEAD_SECONDS if options.quick else OVERHEAD_SECONDS),
        "memory": lambda: memory_suite(settings),
        "model": lambda: model_suite(settings),
    }
    return [step for name, make in suites.items() if name in options.suites for step in make()]


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
                    interruption.check()
    except KeyboardInterrupt:
        screen.say("Interrupted: what follows is what was measured until then.")
    return rows


def show(options: Options, env: dict, rows: Sequence[Row], summary: Summary, screen: Terminal) -> None:
    """Tables, what failed, and the names of the files."""
    for table in result_tables(rows, summary):
        screen.show(table)
    for row in summary["failed"]:
        screen.say(f"No figures for {row['impl']}, {row['case']}, {row['layout']}, {row['pass']}: {row['error']}")
    if summary["throttled"]:
        screen.say(f"{summary['throttled']} rows (!) have samples that the GPU took with its clocks held back.")
    try:
        import plots
    except ModuleNotFoundError:
        plots = None
    for path in plots.draw(options.json, env, rows, summary) if plots else ():
        screen.say(f"Picture: {path}")
    if plots is None or isinstance(screen, PlainTerminal):
        screen.say('`pip install ".[bench]"` adds pictures (matplotlib) and better tables and progress (rich).')
    screen.say(f"Result: {options.json}, rows as a table: {options.json.with_suffix('.csv')}")


def run(argv: Sequence[str] | None) -> int:
    """Measures. Returns 0, or 1 where one of our own answers is wrong or missing, or 130 after an interruption."""
    options = parse(argv)
    screen = terminal()
    with convolution_flags(options.dtypes[0]):
        env = environment(torch.get_num_threads())
    hardware = env["gpu"]["name"] if options.device == "cuda" else env["cpu"]
    screen.say(
        f"fused_sepconv {env['fused_sepconv']}, PyTorch {env['torch']}, {hardware}, {env['threads']} CPU threads"
    )
    if env["load_average"] > env["cpu_cores"] / 2:
        screen.say(
            f"This machine is busy (load {env['load_average']:.1f}, {env['cpu_cores']} cores): expect poor timings."
        )
    ceilings = options.measure_ceilings()
    env["ceilings"] = ceilings.as_dict()
    screen.say(f"Ceilings, measured: {ceilings}")
    settings = options.settings(ceilings)
    steps = steps_of(options, settings)
    rows = measure(steps, screen)

    if options.device == "cuda":
        size = (options.batches[0], options.dtypes[0], options.layouts[0])
        predictions = predict_suite(XCEPTION, options.passes, *size)
    else:
        predictions = predict_suite(XCEPTION, options.passes)
    summary = summarize(rows, predictions)
    write(options.json, env, rows, summary)
    show(options, env, rows, summary, screen)
    if len(rows) < sum(step.rows for step in steps):
        return INTERRUPTED
    return int(any(is_ours(row["impl"]) for row in summary["failed"]))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"compare": compare.main, "plan": plans.main, "report": report.main}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return run(argv)


if __name__ == "__main__":
    interruption.on_signals()
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first measurement, or while the files were written
        sys.exit(INTERRUPTED)
