"""What a run says of itself: on the terminal, in CSV files and to TensorBoard. Only the first rank has one.

OUTPUT/steps.csv     a row every --log-interval steps: the mean loss since the row before, ...
OUTPUT/epochs.csv    a row an epoch: the evaluation
OUTPUT/tensorboard   the same figures
"""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from .metrics import Result


@dataclass(frozen=True)
class StepRow:
    step: int
    """Steps of the optimiser that were done."""
    epoch: int
    loss: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class EpochRow:
    step: int
    epoch: int
    loss: float
    top1: float
    top5: float
    map100: float | None


STEPS, EPOCHS = "steps.csv", "epochs.csv"


class Journal:
    """Args:
    folder: the run's.
    steps, epochs: that are done already, in a run that is resumed: later rows of the files are dropped, as they come
        again.
    """

    def __init__(self, folder: Path, steps: int, epochs: int) -> None:
        self.console = Console(highlight=False, markup=False, stderr=True)
        _keep_rows(folder / STEPS, StepRow, "step", steps)
        _keep_rows(folder / EPOCHS, EpochRow, "epoch", epochs)
        self.files = {name: open(folder / name, "a", newline="", encoding="utf-8") for name in (STEPS, EPOCHS)}  # noqa: SIM115
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=steps + 1)
        self.bar: Progress | None = None

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.tensorboard.close()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def epoch(self, number: int, epochs: int, steps: int, done: int) -> Iterator[None]:
        """Within, a bar shows how far the epoch is, where there is a terminal to show it on."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            self.bar = bar
            bar.add_task("", total=steps, completed=done, epoch=f"{number + 1}/{epochs}", figures="")
            try:
                yield
            finally:
                self.bar = None

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0])

    def step(self, row: StepRow) -> None:
        self._write(STEPS, asdict(row))
        for name in ("loss", "lr", "images_per_second"):
            self.tensorboard.add_scalar(f"train/{name}", getattr(row, name), row.step)
        figures = f"loss {row.loss:.4f}  {row.images_per_second:.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], figures=figures)
        elif not self.console.is_terminal:
            self.say(f"step {row.step}  {figures}")

    def evaluation(self, epoch: int, step: int, result: Result) -> None:
        self._write(EPOCHS, asdict(EpochRow(step=step, epoch=epoch, **asdict(result))))
        for name, value in asdict(result).items():
            if value is not None:
                self.tensorboard.add_scalar(f"evaluation/{name}", value, step)
        more = "" if result.map100 is None else f"  MAP@100 {result.map100:.1f}"
        self.say(f"epoch {epoch}  evaluation loss {result.loss:.4f}  {result}{more}")

    def _write(self, name: str, row: dict[str, Any]) -> None:
        csv.DictWriter(self.files[name], list(row)).writerow(row)
        self.files[name].flush()


def read(folder: Path, name: str) -> list[dict[str, float]]:
    """The rows of STEPS or EPOCHS, as numbers; what is missing in a row is left out."""
    with open(folder / name, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _keep_rows(path: Path, kind: type, by: str, last: int) -> None:
    """Leaves the header and the rows whose number `by` is at most `last`; makes the file where there is none."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            # A row that was being written when the process was killed has no end.
            complete = [line for line in file if line.endswith("\n")]
        rows = [row for row in csv.DictReader(complete) if int(row[by]) <= last]
    replacement = path.with_suffix(".tmp")
    with open(replacement, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(replacement, path)
