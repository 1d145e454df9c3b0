"""All that a run changes as it goes, and so all that a checkpoint holds."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from .distributed import Ranks, average_statistics


@dataclass
class Position:
    epoch: int = 0
    step: int = 0
    """Of the epoch: the next to be done."""
    steps: int = 0
    """Since the beginning."""
    best: float = -1.0
    """The best top-1 of an epoch so far, in percent."""


class LossWindow:
    """The mean loss of the steps since the last row of the log. The sum stays on the device until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        self.steps = 0

    def add(self, loss: Tensor) -> None:
        self.total += loss
        self.steps += 1

    def merge(self, ranks: Ranks) -> None:
        """Makes it the same in every rank: their mean."""
        self.total = ranks.mean(self.total)

    def take(self, ranks: Ranks) -> float:
        """The mean over steps and ranks; the next window begins."""
        self.merge(ranks)
        mean = float(self.total) / self.steps
        self.total, self.steps = torch.zeros_like(self.total), 0
        return mean


@dataclass
class TrainingState:
    network: nn.Module
    """The network itself, its parameters sharded where FSDP2 is used."""
    replica: nn.Module
    """What a training step calls: the network, or DistributedDataParallel round it."""
    average: AveragedModel | None
    """The averaged weights, where they are asked for."""
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    window: LossWindow
    position: Position = field(default_factory=Position)

    @property
    def evaluated(self) -> nn.Module:
        return self.network if self.average is None else self.average.module

    def merge_ranks(self, ranks: Ranks) -> None:
        """Makes the same in every rank what each of them has gathered alone: BatchNorm's statistics and losses."""
        average_statistics(self.network, ranks)
        if self.average is not None:
            average_statistics(self.average, ranks)
        self.window.merge(ranks)
