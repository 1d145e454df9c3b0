"""One epoch of training, and an evaluation."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .distributed import Ranks, gradient_sync
from .errors import ImageError, UserError
from .journal import Journal, StepRow
from .loaders import EvaluationData, MicroBatches
from .metrics import Result, Score
from .randomness import derive, set_seed
from .state import TrainingState

GO_ON, STOP, BAD_IMAGE = range(3)
"""What the ranks tell each other before a step; the largest decides."""


class Interruption:
    """SIGTERM (a scheduler takes the machine back) or Ctrl-C: the step under way is finished, and a checkpoint saved.

    A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def watched(self) -> Iterator["Interruption"]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Interrupted(Exception):
    """All ranks have stopped before the same step. `cause` is this rank's signal or error, None if another's."""

    def __init__(self, cause: int | ImageError | None) -> None:
        self.cause = cause


@dataclass(frozen=True)
class Precision:
    """What a forward computes in, and how images are laid out."""

    device: torch.device
    amp_dtype: torch.dtype | None
    memory_format: torch.memory_format

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def place(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        return images, targets.to(self.device, non_blocking=True)


def train_epoch(
    state: TrainingState,
    data: DataLoader,
    batches: MicroBatches,
    criterion: nn.Module,
    precision: Precision,
    ranks: Ranks,
    journal: Journal | None,
    log_interval: int,
    after_step: Callable[[], None],
    interruption: Interruption,
) -> None:
    """From the state's position to the end of its epoch.

    Args:
        log_interval: steps; counted since the beginning of the run.
        after_step: called when a step is done; what it takes is not counted in images/s.

    Raises:
        Interrupted: in all ranks before the same step, after a signal to any of them or an unreadable image.
        UserError: where the loss is no longer finite.
    """
    state.replica.train()
    position = state.position
    batches.start_at(position.epoch, position.step)
    arriving = iter(data)
    clock, timed_steps = time.perf_counter(), 0
    for _ in range(position.step, batches.steps):
        micro_batches, cause = _fetch(arriving, batches.turns, interruption)
        code = GO_ON if cause is None else BAD_IMAGE if isinstance(cause, ImageError) else STOP
        if ranks.agree(code) != GO_ON:
            raise Interrupted(cause)

        first = (position.steps * batches.turns) * ranks.world + ranks.rank
        places = [first + turn * ranks.world for turn in range(batches.turns)]
        state.window.add(_step(state, micro_batches, places, criterion, precision, batches.seed))
        position.step += 1
        position.steps += 1
        timed_steps += 1

        if position.steps % log_interval == 0:
            lr = state.optimizer.param_groups[0]["lr"]
            loss = state.window.take(ranks)  # waits for the device, so that the clock is right
            speed = timed_steps * batches.images_per_step / (time.perf_counter() - clock)
            if journal:
                journal.step(StepRow(position.steps, position.epoch + 1, loss, lr, speed))
            if not torch.isfinite(torch.tensor(loss)):
                raise UserError(f"--lr: the loss is {loss} after step {position.steps}: the training has diverged")
        if journal:
            journal.advance()
        state.scheduler.step()
        before = time.perf_counter()
        after_step()
        clock += time.perf_counter() - before
        if position.steps % log_interval == 0:
            clock, timed_steps = time.perf_counter(), 0


def _fetch(arriving: Iterator, turns: int, interruption: Interruption) -> tuple[list, Any]:
    """The micro-batches of a step, or why there is none."""
    if interruption.signal is not None:
        return [], interruption.signal
    try:
        return [next(arriving) for _ in range(turns)], None
    except ImageError as error:
        return [], error


def _step(
    state: TrainingState, micro_batches: list, places: list[int], criterion: nn.Module, precision: Precision, seed: int
) -> Tensor:
    """One step of the optimiser; the mean loss of this rank's micro-batches.

    Args:
        places: the number of each micro-batch among those of all ranks since the beginning of the run.
    """
    total = torch.zeros((), device=precision.device)
    for place, (images, targets) in zip(places, micro_batches, strict=True):
        images, targets = precision.place(images, targets)
        set_seed(derive(seed, "dropout", place), precision.device)
        with gradient_sync(state.replica, place == places[-1]):
            with precision.autocast():
                loss = criterion(state.replica(images), targets) / len(micro_batches)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.average is not None:
        state.average.update_parameters(state.network)
    return total


@torch.no_grad()
def evaluate(
    network: nn.Module,
    data: EvaluationData,
    criterion: nn.Module,
    classes: int,
    multi_label: bool,
    precision: Precision,
) -> Result:
    """Of all ranks together, each on its share; every image counts once."""
    was_training = network.training
    network.eval()
    score = Score(classes, multi_label, precision.device)
    left = data.share.mine
    for images, targets in data.images:
        images, targets = precision.place(images, targets)
        with precision.autocast():
            logits = network(images)
        count = max(0, min(len(images), left))
        left -= count
        logits, targets = logits[:count].float(), targets[:count]
        score.add(logits, targets, criterion(logits, targets))
    network.train(was_training)
    return score.result()
