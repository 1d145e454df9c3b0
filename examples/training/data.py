"""Images and what they show: a folder tree, scikit-learn's digits, or noise; and which rank reads which of them when.

one class an image        DIR/train/CLASS/*.jpg   DIR/val/CLASS/*.jpg
many labels an image      DIR/train/labels.csv    DIR/val/labels.csv    with a header line `image,labels`; images
                          relative to the file's folder, labels with spaces between: `a/1.jpg,dog grass`

Every use of random numbers has a seed made of the run's seed and the place of use: an epoch's order, an image's
augmentation in an epoch, a micro-batch's dropout. So a run that is resumed, or that has other numbers of ranks or
workers, draws what an uninterrupted one would have drawn, and no generator's state is saved.
"""

import csv
import math
import os
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .errors import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
EVALUATION_FOLDERS = ("val", "validation", "test")
ASPECT_RATIOS = (3 / 4, 4 / 3)
FOLDER_WORKERS = 4
SYNTHETIC_IMAGES, SYNTHETIC_SIZE, SYNTHETIC_CLASSES = 64, 64, 1000
"""So many noise images, which then come again, of so many pixels a side."""

Key = tuple[int, int, bool]
"""(epoch, number of the image, whether it counts: an evaluation is filled up to the same length in all ranks)"""


def derive(seed: int, use: str, *place: int) -> int:
    """A 63-bit seed for `use` ("order", "dropout", ...) at `place`."""
    sequence = np.random.SeedSequence((seed, zlib.crc32(use.encode()), *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class Images:
    """(PIL image in RGB, class number) pairs; or (image, float32 (classes,) of zeros and ones), of lists of numbers.

    `sources` are paths, or arrays uint8 (H, W, 3); used again from the first where there are more targets.
    """

    def __init__(self, sources: Sequence[Any], targets: Sequence[Any], classes: Sequence[str]) -> None:
        self.sources, self.targets, self.classes = sources, targets, list(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        source, target = self.sources[index % len(self.sources)], self.targets[index]
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else read_image(source)
        if isinstance(target, list):
            labels, target = target, torch.zeros(len(self.classes))
            target[labels] = 1
        return image, target


def read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from None


def splits(options: Namespace) -> tuple[Images | None, Images]:
    """The images to train on (None for an evaluation), and those to evaluate on."""
    if options.dataset == "digits":
        return _digits()
    if options.dataset == "synthetic":
        generator, shape = np.random.default_rng(0), (SYNTHETIC_IMAGES, SYNTHETIC_SIZE, SYNTHETIC_SIZE, 3)
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        classes = options.num_classes or SYNTHETIC_CLASSES
        targets = generator.integers(0, classes, options.synthetic_images).tolist()
        return (Images(list(pixels), targets, [str(number) for number in range(classes)]),) * 2
    root, read = options.data_dir, _labels if options.multi_label else _classes
    evaluation = next((root / name for name in EVALUATION_FOLDERS if (root / name).is_dir()), None)
    if not root.is_dir():
        raise UserError(f"--data-dir: there is no folder {root}")
    if options.evaluate:
        return None, read(evaluation or root, None)
    if not (root / "train").is_dir() or evaluation is None:
        missing = " or ".join(EVALUATION_FOLDERS) if (root / "train").is_dir() else "train"
        raise UserError(f"--data-dir: {root} has no folder {missing}")
    train = read(root / "train", None)
    return train, read(evaluation, train.classes)


def _digits() -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, 8 x 8: a fixed fifth of each digit is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits().images, load_digits().target
    images = np.repeat((images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    names = [str(digit) for digit in range(10)]
    return tuple(Images(list(parts[i]), parts[i + 2].tolist(), names) for i in (0, 1))


def _classes(root: Path, twin: Sequence[str] | None) -> Images:
    """One folder a class, whose images may lie in folders below it. `twin`: the classes that it must have."""
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise UserError(f"--data-dir: {root} has no subfolders; expected one for each class")
    if twin is not None and found != twin:
        differences = [f"{name} only here" for name in found if name not in twin]
        differences += [f"without {name}" for name in twin if name not in found]
        raise UserError(f"--data-dir: {root} has other classes than its twin: {', '.join(differences[:3])}")
    samples = []
    for label, name in enumerate(found):
        files = (Path(at, file) for at, _, files in os.walk(root / name, followlinks=True) for file in files)
        inside = sorted(str(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
        if not inside:
            raise UserError(f"--data-dir: no images in {root / name}")
        samples += [(file, label) for file in inside]
    return Images(*zip(*samples, strict=True), found)


def _labels(root: Path, twin: Sequence[str] | None) -> Images:
    """Images with any number of labels each, listed in labels.csv. `twin`: the labels that it may have."""
    rows = read_csv(root / "labels.csv", ["image", "labels"])
    labels = [(row["labels"] or "").split() for row in rows]
    found = sorted({label for of_image in labels for label in of_image})
    if not found:
        raise UserError(f"{root / 'labels.csv'} lists no images with labels")
    if twin is not None and (extra := sorted(set(found) - set(twin))):
        raise UserError(
            f"{root / 'labels.csv'} has labels that the training images do not have: {', '.join(extra[:3])}"
        )
    number = {name: index for index, name in enumerate(twin or found)}
    targets = [[number[label] for label in of_image] for of_image in labels]
    return Images([str(root / row["image"]) for row in rows], targets, list(number))


def read_csv(path: Path, columns: list[str]) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise UserError(f"{path}: expected the header line {','.join(columns)}, got {reader.fieldnames}")
        return list(reader)


class Prepared(Dataset):
    """(tensor (3, size, size), target, whether it counts). Its keys have the epoch, for the augmentation's seed."""

    def __init__(self, images: Images, options: Namespace, augment: bool) -> None:
        self.images, self.options, self.augment = images, options, augment
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (options.mean, options.std))

    def __getitem__(self, key: Key) -> tuple[Tensor, Any, bool]:
        epoch, index, counts = key
        image, target = self.images[index]
        generator = torch.Generator().manual_seed(derive(self.options.seed, "augmentation", epoch, index))
        image = self._random_crop(image, generator) if self.augment else self._middle(image)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (x - self.mean) / self.std, target, counts

    def _random_crop(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """A crop of random area and shape, flipped by chance; of a very long image, the largest from its middle."""
        width, height = image.size
        low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
        w, h = min(width, round(height * ASPECT_RATIOS[1])), min(height, round(width / ASPECT_RATIOS[0]))
        left, top = (width - w) // 2, (height - h) // 2
        smallest, largest = self.options.scale
        for draw in torch.rand(10, 4, generator=generator).tolist():
            area = width * height * (smallest + (largest - smallest) * draw[0])
            ratio = math.exp(low + (high - low) * draw[1])
            size = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < size[0] <= width and 0 < size[1] <= height:
                (w, h), left, top = size, int(draw[2] * (width - size[0] + 1)), int(draw[3] * (height - size[1] + 1))
                break
        box, size = (left, top, left + w, top + h), (self.options.img_size,) * 2
        image = image.resize(size, Image.Resampling.BILINEAR, box)
        flip = torch.rand((), generator=generator) < self.options.hflip
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image

    def _middle(self, image: Image.Image) -> Image.Image:
        size, resized = self.options.img_size, math.floor(self.options.img_size / self.options.crop_pct)
        image = image.resize([resized * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in image.size)
        return image.crop((left, top, left + size, top + size))


class MicroBatches(Sampler[list[Key]]):
    """The keys of this rank's micro-batches of an epoch: one random order of all images, dealt to the ranks in turn.

    So two ranks see in a step what one rank with two accumulation steps sees, and a run is resumed at any step by
    counting the trainer's. Images that do not fill a last step wait for another epoch's order.
    """

    def __init__(self, images: int, steps: int, options: Namespace, trainer: lightning.Trainer) -> None:
        self.images, self.steps, self.options, self.trainer = images, steps, options, trainer

    def __len__(self) -> int:
        return self.steps * self.options.grad_accum_steps

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, done = divmod(self.trainer.global_step, self.steps)
        generator = torch.Generator().manual_seed(derive(self.options.seed, "order", epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for turn in range(done * self.options.grad_accum_steps, len(self)):
            begin = (turn * self.trainer.world_size + self.trainer.global_rank) * self.options.batch_size
            yield [(epoch, index, True) for index in order[begin : begin + self.options.batch_size]]


class ImageData(lightning.LightningDataModule):
    def __init__(self, options: Namespace, train: Images | None, evaluation: Images) -> None:
        super().__init__()
        self.options, self.train, self.evaluation = options, train, evaluation

    def train_dataloader(self) -> DataLoader:
        steps = self.trainer.lightning_module.steps
        batches = MicroBatches(len(self.train), steps, self.options, self.trainer)
        return self._loader(Prepared(self.train, self.options, augment=True), batches)

    def val_dataloader(self) -> DataLoader:
        """This rank's share. All have as many batches: a sharded network needs all ranks at each."""
        images, world = len(self.evaluation), self.trainer.world_size
        padded = -(-images // world) * world
        keys = [(0, i % images, i < images) for i in range(self.trainer.global_rank, padded, world)]
        size = self.options.batch_size
        batches = [keys[begin : begin + size] for begin in range(0, len(keys), size)]
        return self._loader(Prepared(self.evaluation, self.options, augment=False), batches)

    def _loader(self, dataset: Dataset, batches: Any) -> DataLoader:
        workers = self.options.workers
        if workers is None:
            workers = FOLDER_WORKERS if self.options.dataset == "folder" else 0
        more = {"persistent_workers": workers > 0, "pin_memory": self.options.device == "cuda"}
        return DataLoader(dataset, batch_sampler=batches, num_workers=workers, **more)
