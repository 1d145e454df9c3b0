"""Runs of examples/train.py that take seconds: on noise, with a tiny network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import train
from training.run import read

NETWORK = ("--model", "xception", "--model-kwargs", "width=0.02", "middle_blocks=1", "--img-size", "32")
"""8 to 40 channels. With dropout and averaged weights, as these have random numbers and a state too."""
RECIPE = ("--lr", "0.01", "--warmup-epochs", "1", "--drop", "0.3", "--log-interval", "1", "-j", "0")
CHECKPOINT_EVERY = 3

TINY = (*NETWORK, *RECIPE, "--epochs", "2", "--recovery-interval", str(CHECKPOINT_EVERY))
STEPS = 2 * 5
"""Of TINY, with 8 images a step; two of the images are left over in each epoch."""


def make_noise(folder: Path) -> Path:
    """42 training images in six classes, the last in a folder of their own, and 12 to evaluate; a hidden folder."""
    for i in range(54):
        path = folder / ("val" if i % 9 > 6 else "train") / str(i % 6) / ("more" if i % 6 == 5 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
    (folder / "train" / ".thumbnails").mkdir()
    (folder / "train" / ".thumbnails" / "0.png").write_bytes(b"")
    return folder


def run(output: Path, *flags: str) -> int:
    """In this process; gives the exit status."""
    return train.main(["--output", str(output), *flags])


def rows(output: Path) -> list[dict[str, float]]:
    """Without what is another in every run."""
    return [{name: v for name, v in row.items() if "second" not in name} for row in read(output)]


def losses(output: Path) -> list[float]:
    """Of each step; there must be a row for each, in order."""
    steps = rows(output)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["train/loss"] for row in steps]


def evaluations(output: Path) -> list[float]:
    return [row["val/loss"] for row in rows(output) if "val/loss" in row]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.stem for path in (output / "checkpoints").iterdir())
