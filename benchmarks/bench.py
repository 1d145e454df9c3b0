"""Shows what you gain, and where. Times the fused separable convolution against PyTorch's own.

    python benchmarks/bench.py --quick                  measure: tables, a JSON file, pictures
    python benchmarks/bench.py --suite host             the host's time of a call, with launches stubbed
    python benchmarks/bench.py compare A.json B.json    what changed between two results
    python benchmarks/bench.py report                   README's results, made from benchmarks/results/

Every implementation's answer is checked before it is timed. Without a GPU the CPU is measured.
"""

import argparse
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

import torch

try:
    import matplotlib  # noqa: F401
    import rich  # noqa: F401

    import fused_sepconv  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("fused_sepconv", "matplotlib", "rich"):
        raise
    sys.exit(f'{error.name} is not installed: run `pip install ".[bench]"` at the root of the checkout first')

import plots
import report
from layers import NETWORKS
from machine import clocks, environment, measure_ceilings, read_ceilings
from peers import PEERS, is_ours
from problem import DTYPES, LAYOUTS, PASSES, convolution_flags
from record import Row, summarize, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from suites import Settings, Step, steps_of
from tables import compare, console, result_tables
from timing import MODES

SUITES = ("layers", "model", "memory", "host")
SECONDS = {"cpu": 1.0, "cuda": 0.1}  # spent on the samples of each row
QUICK_SECONDS = {"cpu": 0.1, "cuda": 0.03}
HOST_SECONDS, QUICK_HOST_SECONDS = 3.0, 0.5
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
INTERRUPTED = 130

_interrupted = False


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ends a run as KeyboardInterrupt, so that what was measured until then is kept.

    Python drops an exception that a signal raises inside a callback: so the wish is kept, and asked for at each row.
    """
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """Ends the process with a message that names the argument where it is wrong or does not fit the machine."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    option = parser.add_argument
    option("--quick", action="store_true", help="fewer samples and peers: two minutes on two CPU cores")
    option("--suite", default="all", metavar="S,S", help=f"of {','.join(SUITES)}; default: all of them")
    option("--device", choices=tuple(MODES), help="default: cuda where there is a GPU")
    option("--batch", metavar="N,N", help="images; default: 1 on the CPU, 64 on a GPU")
    option("--dtype", metavar="D,D", help=f"of {','.join(DTYPES)};\ndefault: float32 on the CPU, bfloat16 on a GPU")
    option("--layout", metavar="L,L", help="nchw, nhwc; default: both on the CPU, nhwc on a GPU")
    option("--passes", metavar="P,P", help=f"default: {','.join(PASSES)}")
    option("--networks", metavar="N,N", help=f"of {','.join(NETWORKS)};\ndefault: all on a GPU, else xception")
    option("--peers", metavar="P,P", help=f"of {','.join(PEERS)}; default: what the machine has")
    option("--ceilings", type=Path, metavar="PATH", help="a file of first_minutes.py, instead of measuring")
    option("--json", type=Path, default=Path("bench.json"), metavar="PATH", help="default: %(default)s")
    given = parser.parse_args(argv)

    def several(name: str, default: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
        """A list of names."""
        value = getattr(given, name)
        names = tuple(dict.fromkeys(ALIASES.get(part, part) for part in value.split(","))) if value else tuple(default)
        if unknown := [part for part in names if part not in known]:
            parser.error(f"argument --{name}: expected some of {','.join(known)}, got {unknown[0]!r}")
        return names

    device = given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA GPU on this machine")
    layouts = several("layout", ["nhwc"] if gpu else LAYOUTS, LAYOUTS)
    dtypes = several("dtype", ["bfloat16" if gpu else "float32"], DTYPES)
    batches = given.batch.split(",") if given.batch else ["64" if gpu else "1"]
    if wrong := [batch for batch in batches if not batch.isdecimal() or int(batch) < 1]:
        parser.error(f"argument --batch: expected whole numbers from 1 on, got {wrong[0]!r}")
    if not given.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {given.json.parent}")
    if "tf32" in dtypes and not gpu:
        parser.error("argument --dtype: tf32 is arithmetic of CUDA GPUs")
    if gpu and {"tf32", "bfloat16"} & set(dtypes) and torch.cuda.get_device_capability() < (8, 0):
        parser.error(f"argument --dtype: {torch.cuda.get_device_name()} has neither tf32 nor bfloat16")
    quick, seconds = given.quick, QUICK_SECONDS if given.quick else SECONDS
    chosen = {
        "suites": several("suite", SUITES, SUITES) if given.suite != "all" else SUITES,
        "device": device,
        "batches": tuple(map(int, batches)),
        "dtypes": dtypes,
        "layouts": layouts,
        "model_layouts": layouts[-1:] if quick else layouts,
        "passes": several("passes", PASSES, PASSES),
        "networks": several("networks", NETWORKS if gpu and not quick else ["xception"], NETWORKS),
        "peers": several("peers", PEERS if gpu and not quick else ["eager"], PEERS),
        "modes": MODES[device],
        "seconds": seconds[device],
        "host_seconds": QUICK_HOST_SECONDS if quick else HOST_SECONDS,
        "threads": torch.get_num_threads(),
        "turns": 1 if gpu else 3,
    }
    if chosen["suites"] == ("model",) and chosen["passes"] == ("bwd",):
        parser.error("argument --passes: the model suite times inference (fwd) and training steps (both), no bwd alone")
    try:
        ceilings = read_ceilings(given.ceilings) if given.ceilings else None
    except ValueError as error:
        parser.error(f"argument --ceilings: {error}")
    return given, Settings(**chosen, ceilings=ceilings or measure_ceilings(device, dtypes, chosen["threads"]))


def measure(steps: Sequence[Step], screen: Console) -> tuple[list[Row], bool]:
    """Runs the steps; the rows, and whether an interruption ended it early."""
    rows = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=screen, transient=True) as progress:
            task = progress.add_task("", total=sum(step.rows for step in steps))
            for step in steps:
                progress.update(task, description=f"{step.label:<24}")
                for row in step.run():
                    rows.append(row)
                    progress.advance(task)
                    if _interrupted:
                        raise KeyboardInterrupt
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def run(argv: Sequence[str]) -> int:
    """Measures. Returns 0, or 1 where one of our own answers is wrong or missing, or 130 after an interruption."""
    given, settings = parse(argv)
    screen = console()

    def say(text: str) -> None:
        screen.print(text, soft_wrap=True)

    with convolution_flags(settings.dtypes[0]):
        env = environment(settings.threads) | {"ceilings": settings.ceilings.as_dict()}
    hardware = env["gpu"]["name"] if settings.device == "cuda" else env["cpu"]
    say(f"fused_sepconv {env['fused_sepconv']}, PyTorch {env['torch']}, {hardware}, {env['threads']} CPU threads")
    if env["load_average"] > env["cpu_cores"] / 2:
        say(f"This machine is busy (load {env['load_average']:.1f}, {env['cpu_cores']} cores): expect poor timings.")
    say(f"Ceilings: {settings.ceilings}")
    rows, interrupted = measure(steps_of(settings), screen)
    if interrupted:
        say("Interrupted: what follows is what was measured until then.")
    if env["gpu"]:
        env["gpu"]["clocks_after"] = clocks()
    summary = summarize(rows)
    write(given.json, env, rows, summary)
    for table in result_tables(rows, summary):
        table.show(screen)
    for row in summary["failed"]:
        say(f"No figures for {row['impl']}, {row['case']}, {row['layout']}, {row['pass']}: {row['error']}")
    for path in plots.draw(given.json, rows, summary):
        say(f"Picture: {path}")
    say(f"Result: {given.json}")
    return INTERRUPTED if interrupted else int(any(is_ours(row["impl"]) for row in summary["failed"]))


def main(argv: Sequence[str]) -> int:
    commands = {"compare": compare, "report": report.main}
    return commands[argv[0]](argv[1:]) if argv and argv[0] in commands else run(argv)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the first measurement, or while the files were written
        sys.exit(INTERRUPTED)
