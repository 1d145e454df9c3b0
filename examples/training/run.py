"""A run's files: its checkpoints, its logs and their picture."""

import csv
import signal
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from matplotlib.figure import Figure

COLOURS = ("#d1495b", "#30638e", "#2a9d8f", "#edae49", "#7b5ea7", "#8a8f98", "#5c4033", "#00798c")


class Interrupted(Exception):
    """All ranks have stopped after the same step, which is saved. `signal` is this rank's, None if another's."""

    def __init__(self, number: int | None, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps, which are saved: --resume goes on")
        self.signal = number


class Checkpoints(Checkpoint):
    """A checkpoint every `interval` steps (0: none) and after each epoch's evaluation; the newest `keep` stay.

    After SIGTERM (a scheduler takes the machine back) or Ctrl-C the step under way is finished and saved. Lightning's
    own handler is replaced, as it exchanges tensors inside of the handler, where ranks are at different places.
    """

    def __init__(self, folder: Path, interval: int, keep: int) -> None:
        self.folder, self.interval, self.keep = folder, interval, keep
        self.signal: int | None = None
        self.stopping = False
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        # At the end of an epoch it is the evaluation's turn first: Lightning would leave it out after a resume.
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not last and (stop or (self.interval and trainer.global_step % self.interval == 0)):
            self._save(trainer)
            self.stopping = stop

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self.stopping:  # not before the module has written the step's row
            raise Interrupted(self.signal, trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer)
        if trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False):
            raise Interrupted(self.signal, trainer.global_step)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()


def table(rows: list[dict[str, str]]) -> str:
    """In columns; numbers stand to the right."""
    columns = {name: [name, *(row.get(name, "") for row in rows)] for name in rows[0]}
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    padded = [
        [text.ljust(width) if first else text.rjust(width) for text in cells]
        for first, width, cells in zip([True] + [False] * len(columns), widths.values(), columns.values(), strict=False)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def latest(output: Path) -> Path | None:
    return max((output / "checkpoints").glob("step-*.ckpt"), default=None)


def read(output: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics, a step each, in order. Where it was resumed, the later process's rows count."""
    steps: dict[float, dict[str, float]] = {}
    for number in range(len(list(output.glob("csv/version_*")))):
        path = output / "csv" / f"version_{number}" / "metrics.csv"
        if not path.exists():  # stopped before its first row
            continue
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        steps = {step: row for step, row in steps.items() if not rows or step < rows[0]["step"]}
        for row in rows:
            steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def draw(runs: dict[str, Path], path: Path, title: str) -> None:
    """Loss, accuracy (MAP@100 where there are many labels) and learning rate of one run, or of several in one picture.

    Args:
        runs: names and folders.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    loss, score, rate = figure.subplots(1, 3, width_ratios=(2, 2, 1))
    for (name, folder), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        rows = read(folder)
        measure = "map100" if any("val/map100" in row for row in rows) else "top1"
        shown = [(loss, "train/loss", ":", f"{name}, training"), (loss, "val/loss", ".-", f"{name}, evaluation")]
        shown += [(score, f"val/{measure}", ".-", name), (rate, "train/lr", "-", name)]
        for axes, column, style, label in shown:
            points = [(row["epoch"], row[column]) for row in rows if column in row]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
        score.set_title({"map100": "MAP@100, %", "top1": "Top-1 accuracy, %"}[measure])
    loss.set_title("Loss: training dotted, evaluation solid")
    rate.set_title("Learning rate")
    score.legend(frameon=False, loc="lower right", fontsize="small")
    for axes in (loss, score, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    loss.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
