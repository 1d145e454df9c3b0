"""Images and what they show: a folder tree, or scikit-learn's digits; and which rank reads which of them when.

one class an image        DIR/train/CLASS/*.jpg   DIR/val/CLASS/*.jpg
many labels an image      DIR/train/labels.csv    DIR/val/labels.csv    with a header line `image,labels`; images
                          relative to the file's folder, labels with spaces between: `a/1.jpg,dog grass`

Every use of random numbers has a generator made of the run's seed and the place of use. So a run that is resumed, or
that has other numbers of ranks or workers, draws what an uninterrupted one would have drawn.
"""

import csv
import math
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ASPECT_RATIO = 4 / 3
"""Longer by shorter side of a training crop, at most."""

Key = tuple[int, int, bool]
"""(epoch, number of the image, whether it counts: an evaluation is filled up to the same length in all ranks)"""


class UserError(Exception):
    """An error that is the user's to mend: its text is printed, without a traceback."""


def generator(seed: int, use: str, *place: int) -> np.random.Generator:
    """Random numbers for `use` ("order", "dropout", ...) at `place`."""
    return np.random.default_rng((seed, zlib.crc32(use.encode()), *place))


class Images(Dataset):
    """(tensor (3, size, size), target, whether it counts) by `Key`; the target is a class's number, or, for many
    labels, float32 (classes,) of zeros and ones. Training images have a random crop and flip, the others the middle.
    """

    def __init__(self, options: Namespace, part: str, classes: Sequence[str] = ()) -> None:
        self.options, self.augment = options, part == "train"
        self.sources, names = _read_digits(self.augment) if options.dataset else _read_folder(options, part)
        self.classes = classes or sorted({name for of_image in names for name in of_image})
        number = {name: index for index, name in enumerate(self.classes)}
        unknown = sorted({name for of_image in names for name in of_image if name not in number})
        if unknown or not names:
            what = f"no training images of {', '.join(unknown[:3])}" if unknown else "no images to train or evaluate"
            raise UserError(f"--data-dir: {options.data_dir} has {what}")
        self.labels = [[number[name] for name in of_image] for of_image in names]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Any, bool]:
        epoch, index, counts = key
        options, image, labels = self.options, _opened(self.sources[index]), self.labels[index]
        rng = generator(options.seed, "augmentation", epoch, index)
        image = self._random_crop(image, rng) if self.augment else self._middle(image)
        x = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
        target = np.isin(range(len(self.classes)), labels).astype(np.float32) if options.multi_label else labels[0]
        return torch.from_numpy(x.copy()), target, counts

    def _random_crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A crop of random area and shape, at most the image; flipped by chance."""
        area = image.width * image.height * rng.uniform(*self.options.scale)
        ratio = ASPECT_RATIO ** rng.uniform(-1, 1)
        width = min(image.width, round(math.sqrt(area * ratio)))
        height = min(image.height, round(math.sqrt(area / ratio)))
        left, top = rng.integers((image.width - width, image.height - height), endpoint=True).tolist()
        box, size = (left, top, left + width, top + height), (self.options.img_size,) * 2
        image = image.resize(size, Image.Resampling.BILINEAR, box)
        return ImageOps.mirror(image) if rng.random() < self.options.hflip else image

    def _middle(self, image: Image.Image) -> Image.Image:
        size, border = (self.options.img_size,) * 2, (1 - self.options.crop_pct) / 2
        return ImageOps.fit(image, size, Image.Resampling.BILINEAR, border)


def _opened(source: Image.Image | str) -> Image.Image:
    try:
        return source if isinstance(source, Image.Image) else Image.open(source).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{source} cannot be read as an image: {' '.join(str(error).split())}") from None


class ImageData(lightning.LightningDataModule):
    """The images to train on (None where an evaluation has no such folder), and those to evaluate on.

    `classes` are their names, `class_weights` what each counts in MAP@100 (None: 1). An epoch has `steps` steps.
    """

    def __init__(self, options: Namespace) -> None:
        super().__init__()
        alone = options.evaluate and not options.dataset and not (options.data_dir / "train").is_dir()
        self.options, self.train = options, None if alone else Images(options, "train")
        self.evaluation = Images(options, "" if alone else "val", () if alone else self.train.classes)
        self.classes, self.class_weights = self.evaluation.classes, None
        if options.class_weights:
            given = {name: float(weight) for name, weight in _read_csv(options.class_weights, "label", "weight")}
            self.class_weights = torch.tensor([given.get(name, 1.0) for name in self.classes])
        self.images_per_step = options.batch_size * options.grad_accum_steps * options.ranks
        self.steps = len(self.train or ()) // self.images_per_step

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, MicroBatches(self))

    def val_dataloader(self) -> DataLoader:
        """This rank's share. All have as many batches: a sharded network needs all ranks at each."""
        images, ranks, size = len(self.evaluation), self.options.ranks, self.options.batch_size
        padded = -(-images // ranks) * ranks
        keys = [(0, i % images, i < images) for i in range(self.options.rank, padded, ranks)]
        return self._loader(self.evaluation, [keys[begin : begin + size] for begin in range(0, len(keys), size)])

    def _loader(self, images: Images, batches: Any) -> DataLoader:
        workers = self.options.workers
        how = {"persistent_workers": workers > 0, "pin_memory": self.options.device == "cuda"}
        return DataLoader(images, batch_sampler=batches, num_workers=workers, **how)


class MicroBatches:
    """The keys of this rank's micro-batches of an epoch: one random order of all images, dealt to the ranks in turn.

    So two ranks see in a step what one rank with two accumulation steps sees, and a run is resumed at any step by
    counting the trainer's. Images that do not fill a last step wait for another epoch's order.
    """

    def __init__(self, data: ImageData) -> None:
        self.data, self.options = data, data.options

    def __len__(self) -> int:
        return self.data.steps * self.options.grad_accum_steps

    def __iter__(self) -> Iterator[list[Key]]:
        options, (epoch, done) = self.options, divmod(self.data.trainer.global_step, self.data.steps)
        order = generator(options.seed, "order", epoch).permutation(len(self.data.train)).tolist()
        for turn in range(done * options.grad_accum_steps, len(self)):
            begin = (turn * options.ranks + options.rank) * options.batch_size
            yield [(epoch, index, True) for index in order[begin : begin + options.batch_size]]


def _read_digits(training: bool) -> tuple[list[Image.Image], list[list[str]]]:
    """scikit-learn's 1,797; a fixed fifth of each digit is the test set."""
    pixels, digits = load_digits(return_X_y=True)
    pixels = (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    split = train_test_split(pixels, digits, test_size=0.2, random_state=0, stratify=digits)
    pixels, digits = split[0::2] if training else split[1::2]
    return [Image.fromarray(p).convert("RGB") for p in pixels], [[str(digit)] for digit in digits]


def _read_folder(options: Namespace, part: str) -> tuple[list[str], list[list[str]]]:
    """The paths of the images, and the names of what each shows."""
    folder = options.data_dir / part
    if not folder.is_dir():
        raise UserError(f"--data-dir: there is no folder {folder}")
    if options.multi_label:
        rows = _read_csv(folder / "labels.csv", "image", "labels")
        return [str(folder / image) for image, _ in rows], [labels.split() for _, labels in rows]
    files = sorted(f for f in glob("*/**/*", root_dir=folder, recursive=True) if f.lower().endswith(IMAGE_SUFFIXES))
    return [str(folder / file) for file in files], [[Path(file).parts[0]] for file in files]


def _read_csv(path: Path, *columns: str) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    if tuple(head) != columns or any(len(row) != len(columns) for row in rows):
        raise UserError(f"{path}: expected rows of {','.join(columns)} under a line that says so")
    return rows
