"""Runs of examples/train.py that take seconds: on noise, with a tiny network."""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tests.support.torchvision_operators  # noqa: F401 - torchmetrics imports torchvision where it is installed

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # as `python examples/train.py` has it

import train
from training.journal import Journal

NETWORK = ("--model", "xception", "--model-kwargs", "width=0.02", "middle_blocks=1", "--img-size", "32")
"""8 to 40 channels. With dropout and averaged weights, as these have random numbers and a state too."""
RECIPE = ("--lr", "0.01", "--warmup-epochs", "1", "--drop", "0.3", "--model-ema", "--log-interval", "1")
NOISE = ("--dataset", "synthetic", "--synthetic-images", "84", "--num-classes", "6")
CHECKPOINT_EVERY = 5

TINY = (*NETWORK, *RECIPE, *NOISE, "--epochs", "3", "--recovery-interval", str(CHECKPOINT_EVERY))
STEPS = 3 * 10
"""Of TINY, with 8 images a step."""


def run(output: Path, *flags: str) -> int:
    """In this process; gives the exit status."""
    return train.main(["--output", str(output), *flags])


def rows(output: Path, name: str = "steps.csv") -> list[dict[str, float]]:
    with open(output / name, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def losses(output: Path) -> list[float]:
    """Of each step; there must be a row for each, in order."""
    steps = rows(output)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def after_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Has `action` called once so many steps are done in this process, before the last one's checkpoint."""
    original, steps = Journal.advance, itertools.count(1)

    def noted(journal: Journal) -> None:
        original(journal)
        if next(steps) == step:
            action()

    patch.setattr(Journal, "advance", noted)
