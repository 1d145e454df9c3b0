"""The files of a run: its figures, its checkpoints, and how it stops; the figures again as a table and a picture."""

import csv
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, Checkpoint
from matplotlib import colormaps
from matplotlib.figure import Figure

from .data import UserError

CHECKPOINTS = 2
"""So many stay, the newest."""

Rows = list[dict[str, float]]


class Interrupted(Exception):
    """All ranks have stopped after the same step, which is saved. `signal` is this rank's, None if another's."""

    def __init__(self, signal: int | None, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps, which are saved: --resume goes on")
        self.signal = signal


class Log(Callback):
    """Figures of training, means over `interval` steps and all ranks, and of evaluations: to Lightning's loggers; to
    stderr too where that is no terminal, and so has no progress bar.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.began, self.first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if between_steps(trainer) or step % self.interval:
            return
        loss = float(pl_module.loss.compute())
        pl_module.loss.reset()
        if not math.isfinite(loss):
            raise UserError(f"--lr: the loss is {loss} after step {step}: the training has diverged")
        speed = (step - self.first) * pl_module.images_per_step / (time.perf_counter() - self.began)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._note(trainer, pl_module, {"train/loss": loss, "train/lr": rate, "train/images_per_second": speed})
        pl_module.log_dict({"loss": loss, "images/s": speed}, prog_bar=True, logger=False)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit":
            metrics = trainer.callback_metrics.items()
            self._note(trainer, pl_module, {name: float(value) for name, value in metrics if name.startswith("val/")})

    def _note(self, trainer: lightning.Trainer, pl_module: Any, figures: dict[str, float]) -> None:
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": step / pl_module.steps, **figures}, step)
        if trainer.is_global_zero and trainer.progress_bar_callback is None:
            print(f"step {step}", *(f"{k} {v:.4g}" for k, v in figures.items()), sep="  ", file=sys.stderr)
        self.on_train_start(trainer, pl_module)


def between_steps(trainer: lightning.Trainer) -> bool:
    """Tells whether more batches belong to the step under way."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


class Checkpoints(Checkpoint):
    """A checkpoint every `interval` steps (0: none) and after each epoch's evaluation.

    After SIGTERM (a scheduler takes the machine back) or Ctrl-C the step under way is finished and saved; a second
    Ctrl-C stops at once. Lightning's own handler is replaced, as it exchanges tensors inside of the handler, where
    ranks are at different places.
    """

    def __init__(self, folder: Path, interval: int) -> None:
        self.folder, self.interval, self.signal = folder, interval, None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)  # until Lightning puts back those of before

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        # At the end of an epoch it is the evaluation's turn first: Lightning would leave it out after a resume.
        if not between_steps(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer, bool(self.interval) and trainer.global_step % self.interval == 0)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer, True)

    def _save(self, trainer: lightning.Trainer, due: bool) -> None:
        step, path = trainer.global_step, self.folder / "new"
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if stop or due:
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:  # now it is whole
                os.replace(path, self.folder / f"step-{step:08d}.ckpt")
                for old in sorted(self.folder.glob("step-*.ckpt"))[:-CHECKPOINTS]:
                    old.unlink()
        if stop:
            raise Interrupted(self.signal, step)


def latest(output: Path) -> Path | None:
    return max((output / "checkpoints").glob("step-*.ckpt"), default=None)


def read(output: Path) -> Rows:
    """A row a step that has figures. A resumed run has a file of its own, whose rows go before those that were lost."""
    rows = defaultdict(dict)
    for path in sorted((output / "csv").glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows[int(row["step"])] |= {name: float(value) for name, value in row.items() if value}
    return [rows[step] for step in sorted(rows)]


def shown(figures: Mapping[str, float]) -> dict[str, str]:
    """An evaluation's figures as people read them."""
    values = {name[4:]: value for name, value in figures.items() if name.startswith("val/")}
    return {name: f"{value:.4f}" if name == "loss" else f"{value:.1f}" for name, value in values.items()}


def last_evaluation(rows: Rows) -> dict[str, str]:
    return next((shown(row) for row in reversed(rows) if "val/loss" in row), {})


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """In columns, as the first row has them."""
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join("  ".join(line.get(name, "").rjust(width) for name, width in widths.items()) for line in lines)


def draw(runs: Mapping[str, Rows], title: str, colours: Sequence = colormaps["tab10"].colors) -> Figure:
    """Loss, accuracy (MAP@100 where there are many labels) and learning rate of one run, or of several."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    figure.suptitle(title, wrap=True)
    loss, score, rate = figure.subplots(1, 3, width_ratios=(2, 2, 1))
    measure = "MAP@100" if any("val/MAP@100" in row for rows in runs.values() for row in rows) else "top-1"
    panels = [(loss, "train/loss", ":"), (loss, "val/loss", ".-"), (score, f"val/{measure}", ".-")]
    panels += [(rate, "train/lr", "-")]
    for (name, rows), colour in zip(runs.items(), colours, strict=False):
        for axes, column, style in panels:
            points = [(row["epoch"], row[column]) for row in rows if column in row]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
    # An evaluation by statistics of a few batches can be far above all of training.
    loss.set_ylim(0, max(1.1 * row["train/loss"] for rows in runs.values() for row in rows if "train/loss" in row))
    loss.set_title("Loss: evaluation solid, training (as regularised) dotted")
    score.set_title(f"Evaluation: {measure}, %")
    rate.set(title="Learning rate", ylim=0)
    for axes in figure.axes:
        axes.set(xlabel="epoch", xlim=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    return figure
