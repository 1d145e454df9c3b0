"""Which rank reads which image when.

An epoch is one random order of all images, cut into micro-batches, which are dealt to the ranks in turn:

    step            0                   1
    turn            0         1         0         1         grad_accum_steps = 2
    rank            0    1    0    1    0    1    0    1
    micro-batch     0    1    2    3    4    5    6    7

So two ranks see in a step what one rank with two accumulation steps sees, and a run can be resumed at any step by
counting. Images that do not fill a last step wait for another epoch's order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .datasets import Images
from .distributed import Ranks
from .errors import UserError
from .randomness import derive, set_seed
from .transforms import Transform

CPU = torch.device("cpu")

Key = tuple[int, int]
"""(epoch, number of the image)"""


class Prepared(Dataset):
    """Tensors of images. Its keys have the epoch too, on which the augmentation depends."""

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, Any]:
        epoch, index = key
        image, target = self.images[index]
        with torch.random.fork_rng(devices=[]):
            set_seed(derive(self.seed, "augmentation", epoch, index), CPU)
            return self.transform(image), target


class MicroBatches(Sampler[list[Key]]):
    """The keys of this rank's micro-batches, from `start_at`'s step to the end of its epoch."""

    def __init__(self, images: int, batch_size: int, grad_accum_steps: int, ranks: Ranks, seed: int) -> None:
        self.images, self.batch_size, self.turns, self.ranks, self.seed = (
            images,
            batch_size,
            grad_accum_steps,
            ranks,
            seed,
        )
        self.images_per_step = batch_size * grad_accum_steps * ranks.world
        self.steps = images // self.images_per_step
        if not self.steps:
            raise UserError(
                f"--batch-size: {images} training images do not fill one step of {self.images_per_step} (batch size "
                f"{batch_size} x {grad_accum_steps} accumulation steps x {ranks.world} ranks)"
            )
        self.epoch = self.first_step = 0

    def start_at(self, epoch: int, step: int) -> None:
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.turns

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for turn in range(self.first_step * self.turns, self.steps * self.turns):
            begin = (turn * self.ranks.world + self.ranks.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[begin : begin + self.batch_size]]


class EvaluationShare(Sampler[list[Key]]):
    """The keys of this rank's part of the evaluation set.

    All ranks have as many batches, as a sharded network needs all of them at each; at the end some images come again
    for it. The first `mine` images of this rank are the ones that count.
    """

    def __init__(self, images: int, batch_size: int, ranks: Ranks) -> None:
        padded = -(-images // ranks.world) * ranks.world
        self.keys = [(0, index % images) for index in range(ranks.rank, padded, ranks.world)]
        self.mine = len(range(ranks.rank, images, ranks.world))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for begin in range(0, len(self.keys), self.batch_size):
            yield self.keys[begin : begin + self.batch_size]


class EvaluationData(NamedTuple):
    share: EvaluationShare
    images: DataLoader


def loader(dataset: Prepared, batches: Sampler[list[Key]], workers: int, ranks: Ranks) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=ranks.device.type == "cuda",
    )
