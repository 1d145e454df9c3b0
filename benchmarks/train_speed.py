"""How fast does it train? Images/s of examples/train.py: Xception, with and without our kernels, and Inception V3.

    python benchmarks/train_speed.py --json benchmarks/results/train_H200.json

Random images of 299 pixels, the paper's recipe, bfloat16 and channels_last; what is not known here goes to train.py:
`--batch-size 128 --workers 16`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from environment import environment

import train
from training import journal

SCHEMA = 1

RUNS = {
    "xception, auto": ("--model", "xception", "--backend", "auto"),
    "xception, reference": ("--model", "xception", "--backend", "reference"),
    "inception_v3": ("--model", "inception_v3"),
}
COMMON = ("--dataset", "synthetic", "--synthetic-images", "9600", "--epochs", "1", "--recipe", "imagenet")
ENGINE = ("--amp", "--channels-last", "--workers", "8", "--log-interval", "10")
WARM_UP = 2
"""Rows of the log that do not count."""


def measure(name: str, flags: Sequence[str]) -> dict[str, Any]:
    """The median over the rows of a run's log, and the fastest and slowest of them."""
    with tempfile.TemporaryDirectory() as output:
        status = train.main([*COMMON, *ENGINE, *RUNS[name], *flags, "--output", output])
        if status:
            raise SystemExit(status)
        speeds = [row["images_per_second"] for row in journal.read(Path(output), journal.STEPS)][WARM_UP:]
    if not speeds:
        raise SystemExit(f"{name}: too few steps; --synthetic-images makes them more")
    return {
        "run": name,
        "flags": [*COMMON, *ENGINE, *RUNS[name], *flags],
        "images_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "samples": len(speeds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, default=Path("train_speed.json"), metavar="PATH")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    options, flags = parser.parse_known_args(argv)
    if not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {options.json.parent}")
    env = environment(torch.get_num_threads())
    rows = []
    for name in options.runs:
        rows.append(measure(name, flags))
        options.json.write_text(json.dumps({"schema": SCHEMA, "env": env, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['run']:<20} {row['images_per_second']:8.1f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
