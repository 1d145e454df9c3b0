"""A run's files: its figures and their picture, its checkpoints."""

import csv
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from matplotlib import colormaps
from matplotlib.figure import Figure

from .data import UserError

NAMES = {"loss": "loss", "top1": "top-1", "top5": "top-5", "map100": "MAP@100"}
"""An evaluation's figures, and what people call them."""


class Interrupted(Exception):
    """All ranks have stopped after the same step, which is saved. `signal` is this rank's, None if another's."""

    def __init__(self, number: int | None, steps: int) -> None:
        super().__init__(f"stopped after {steps} steps, which are saved: --resume goes on")
        self.signal = number


class Log(Callback):
    """Figures of training every `interval` steps, the means since the row before of all ranks, and of evaluations: to
    metrics.csv, TensorBoard and the terminal. The rows are a part of every checkpoint, so a resumed run has them all.
    """

    def __init__(self, path: Path, interval: int) -> None:
        self.path, self.interval = path, interval
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.losses, self.began, self.first = [], time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        step = trainer.global_step
        self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning has divided it
        if between_steps(trainer) or step % self.interval:
            return
        loss = float(trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        if not math.isfinite(loss):
            raise UserError(f"--lr: the loss is {loss} after step {step}: the training has diverged")
        speed = (step - self.first) * pl_module.images_per_step / (time.perf_counter() - self.began)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._note(trainer, pl_module.steps, {"train/loss": loss, "train/lr": rate, "train/images_per_second": speed})
        pl_module.log_dict({"loss": loss, "images/s": speed}, prog_bar=True, logger=False)
        if trainer.progress_bar_callback is None:
            pl_module.print(f"step {step}  loss {loss:.4f}  {speed:.0f} images/s")
        self.on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.state.fn == "fit":
            figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val/"}
            self._note(trainer, pl_module.steps, figures)
            text = "  ".join(f"{name} {figure}" for name, figure in shown(figures).items())
            pl_module.print(f"epoch {trainer.global_step / pl_module.steps:g}  evaluation {text}")
            self.on_train_start(trainer, pl_module)

    def _note(self, trainer: lightning.Trainer, steps: int, figures: dict[str, float]) -> None:
        step = trainer.global_step
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step, "epoch": step / steps})
        self.rows[-1] |= figures
        if trainer.is_global_zero:
            trainer.logger.log_metrics({"epoch": step / steps, **figures}, step)
            with open(self.path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.rows for name in row)))
                writer.writeheader()
                writer.writerows(self.rows)


def between_steps(trainer: lightning.Trainer) -> bool:
    """Tells whether more batches belong to the step under way."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


class Checkpoints(Checkpoint):
    """A checkpoint every `interval` steps (0: none) and after each epoch's evaluation; the newest `keep` stay.

    After SIGTERM (a scheduler takes the machine back) or Ctrl-C the step under way is finished and saved; a second
    Ctrl-C stops at once. Lightning's own handler is replaced, as it exchanges tensors inside of the handler, where
    ranks are at different places.
    """

    def __init__(self, folder: Path, interval: int, keep: int) -> None:
        self.folder, self.interval, self.keep = folder, interval, keep
        self.signal: int | None = None

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
        stop, path = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False), self.folder / "new"
        if stop or due:
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:  # now it is whole
                os.replace(path, self.folder / f"step-{trainer.global_step:08d}.ckpt")
                for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                    old.unlink()
        if stop:
            raise Interrupted(self.signal, trainer.global_step)


def latest(output: Path) -> Path | None:
    return max((output / "checkpoints").glob("step-*.ckpt"), default=None)


def shown(figures: Mapping[str, Any]) -> dict[str, str]:
    """An evaluation's figures as people read them."""
    values = {name: figures[f"val/{name}"] for name in NAMES if f"val/{name}" in figures}
    return {NAMES[name]: f"{float(v):.4f}" if name == "loss" else f"{float(v):.1f}" for name, v in values.items()}


def last_evaluation(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    return next((shown(row) for row in reversed(rows) if "val/loss" in row), {})


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """In columns, as the first row has them."""
    widths = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join("  ".join(line.get(name, "").rjust(width) for name, width in widths.items()) for line in lines)


def read(output: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv."""
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def draw(runs: dict[str, list[dict[str, float]]], path: Path, title: str) -> None:
    """Loss, accuracy (MAP@100 where there are many labels) and learning rate of one run, or of several in one picture.

    Args:
        runs: names and rows.
    """
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    figure.suptitle(title)
    loss, score, rate = figure.subplots(1, 3, width_ratios=(2, 2, 1))
    measure = "map100" if any("val/map100" in row for rows in runs.values() for row in rows) else "top1"
    # A few runs have colours of their own; many are in an order, from dark to bright.
    palette = colormaps["tab10"].colors if len(runs) < 6 else colormaps["viridis"].resampled(len(runs) + 1).colors
    panels = [(loss, "train/loss", ":"), (loss, "val/loss", ".-"), (score, f"val/{measure}", ".-")]
    for (name, rows), colour in zip(runs.items(), palette, strict=False):
        for axes, column, style in (*panels, (rate, "train/lr", "-")):
            points = [(row["epoch"], row[column]) for row in rows if column in row]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
    loss.set(title="Loss: evaluation solid, training (as regularised) dotted", xlabel="epoch", xlim=0)
    # An evaluation by statistics of a few batches can be far above all of training.
    loss.set_ylim(0, max(1.1 * row["train/loss"] for rows in runs.values() for row in rows if "train/loss" in row))
    score.set(title=f"Evaluation: {NAMES[measure]}, %", xlabel="epoch", xlim=0)
    rate.set(title="Learning rate", xlabel="epoch", xlim=0, ylim=0)
    for axes in (loss, score, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    if len(runs) > 1:  # the ends of the curves are what is compared
        ends = [[row[f"val/{measure}"] for row in rows if "val/loss" in row][-1] for rows in runs.values()]
        bottom = max(0, min(95, 100 - 4 * (100 - min(ends))))
        score.set_ylim(bottom, max(ends) + (100 - bottom) / 10)
        figure.legend(*score.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=110)
