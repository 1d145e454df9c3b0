"""Images and what they show: a folder tree, or scikit-learn's digits; and which rank reads which of them when.

one class an image        DIR/train/CLASS/*.jpg   DIR/val/CLASS/*.jpg
many labels an image      DIR/train/labels.csv    DIR/val/labels.csv    with a header line `image,labels`; images
                          relative to the file's folder, labels with spaces between: `a/1.jpg,dog grass`

Every use of random numbers has a seed made of the run's seed and the place of use: an epoch's order, an image's
augmentation in an epoch, a micro-batch's dropout. So a run that is resumed, or that has other numbers of ranks or
workers, draws what an uninterrupted one would have drawn, and no generator's state is saved.
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
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ASPECT_RATIO = 4 / 3
"""Longer by shorter side of a training crop, at most."""
FOLDER_WORKERS = 4

Key = tuple[int, int, bool]
"""(epoch, number of the image, whether it counts: an evaluation is filled up to the same length in all ranks)"""


class UserError(Exception):
    """An error that is the user's to mend: its text is printed, without a traceback."""


def derive(seed: int, use: str, *place: int) -> int:
    """A 63-bit seed for `use` ("order", "dropout", ...) at `place`."""
    sequence = np.random.SeedSequence((seed, zlib.crc32(use.encode()), *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class Images(Dataset):
    """(tensor (3, size, size), target, whether it counts) by `Key`; the target is a class's number, or, for many
    labels, float32 (classes,) of zeros and ones.

    Args:
        sources: paths, or arrays uint8 (H, W, 3).
        labels: each image's, as numbers.
        augment: a random crop and flip, else the middle.
    """

    def __init__(self, options: Namespace, sources: Sequence, labels: list[list[int]], classes: int, augment: bool):
        self.options, self.sources, self.labels = options, sources, labels
        self.classes, self.augment = classes, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Any, bool]:
        epoch, index, counts = key
        source, labels = self.sources[index], self.labels[index]
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else _read_image(source)
        rng = np.random.default_rng(derive(self.options.seed, "augmentation", epoch, index))
        image = self._random_crop(image, rng) if self.augment else self._middle(image)
        x = (np.asarray(image, np.float32) / 255 - np.float32(self.options.mean)) / np.float32(self.options.std)
        target = np.isin(range(self.classes), labels).astype(np.float32) if self.options.multi_label else labels[0]
        return torch.from_numpy(x.transpose(2, 0, 1).copy()), target, counts

    def _random_crop(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A crop of random area and shape, at most the image; flipped by chance."""
        area = image.width * image.height * rng.uniform(*self.options.scale)
        ratio = ASPECT_RATIO ** rng.uniform(-1, 1)
        width = min(image.width, round(math.sqrt(area * ratio)))
        height = min(image.height, round(math.sqrt(area / ratio)))
        left, top = rng.integers((image.width - width, image.height - height), endpoint=True).tolist()
        box, size = (left, top, left + width, top + height), (self.options.img_size,) * 2
        image = image.resize(size, Image.Resampling.BILINEAR, box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.options.hflip else image

    def _middle(self, image: Image.Image) -> Image.Image:
        size, resized = self.options.img_size, math.floor(self.options.img_size / self.options.crop_pct)
        image = image.resize([resized * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in image.size)
        return image.crop((left, top, left + size, top + size))


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from None


class ImageData(lightning.LightningDataModule):
    """The images to train on (None where an evaluation has no such folder), and those to evaluate on.

    `classes` are their names, `class_weights` what each counts in MAP@100 (None: 1). An epoch has `steps` steps.
    """

    def __init__(self, options: Namespace) -> None:
        super().__init__()
        self.options, self.train, self.class_weights = options, None, None
        self.classes: list[str] = []
        alone = options.evaluate and not options.dataset and not (options.data_dir / "train").is_dir()
        if not alone:
            self.train = self._images(*_read(options, "train"), augment=True)
        parts = ("val", "validation", "test", *([""] if alone else []))
        self.evaluation = self._images(*_read(options, *parts), augment=False)
        if options.class_weights:
            given = {name: float(weight) for name, weight in _read_csv(options.class_weights, "label", "weight")}
            self.class_weights = torch.tensor([given.get(name, 1.0) for name in self.classes])
        self.images_per_step = options.batch_size * options.grad_accum_steps * options.ranks
        self.steps = len(self.train or ()) // self.images_per_step

    def _images(self, sources: Sequence, names: list[list[str]], augment: bool) -> Images:
        """The classes are those of the training images; the others may have no more."""
        self.classes = self.classes or sorted({name for of_image in names for name in of_image})
        number = {name: index for index, name in enumerate(self.classes)}
        unknown = sorted({name for of_image in names for name in of_image if name not in number})
        if unknown or not names:
            what = f"no training images of {', '.join(unknown[:3])}" if unknown else "no images to train or evaluate"
            raise UserError(f"--data-dir: {self.options.data_dir} has {what}")
        labels = [[number[name] for name in of_image] for of_image in names]
        return Images(self.options, sources, labels, len(self.classes), augment)

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
        if workers is None:
            workers = 0 if self.options.dataset == "digits" else FOLDER_WORKERS
        more = {"persistent_workers": workers > 0, "pin_memory": self.options.device == "cuda"}
        return DataLoader(images, batch_sampler=batches, num_workers=workers, **more)


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
        epoch, done = divmod(self.data.trainer.global_step, self.data.steps)
        rng, size = np.random.default_rng(derive(self.options.seed, "order", epoch)), self.options.batch_size
        order = rng.permutation(len(self.data.train)).tolist()
        for turn in range(done * self.options.grad_accum_steps, len(self)):
            begin = (turn * self.options.ranks + self.options.rank) * size
            yield [(epoch, index, True) for index in order[begin : begin + size]]


def _read(options: Namespace, *parts: str) -> tuple[Sequence, list[list[str]]]:
    """Sources, and what each shows, of the first part that there is."""
    if options.dataset == "digits":  # a fixed fifth of each digit is the test set
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, digits = load_digits().images, load_digits().target
        pixels = np.repeat((pixels * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
        split = train_test_split(pixels, digits, test_size=0.2, random_state=0, stratify=digits)
        which = "train" not in parts
        return split[which], [[str(digit)] for digit in split[2 + which]]
    folder = next((options.data_dir / part for part in parts if (options.data_dir / part).is_dir()), None)
    if folder is None:
        raise UserError(f"--data-dir: there is no folder {options.data_dir / parts[0]}")
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
