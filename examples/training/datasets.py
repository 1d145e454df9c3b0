"""Images and what they show: (PIL image in RGB, target) pairs from a folder tree, scikit-learn's digits, or noise.

one class an image        DIR/train/CLASS/*.jpg   DIR/val/CLASS/*.jpg
many labels an image      DIR/train/labels.csv    DIR/val/labels.csv    with a header line `image,labels`; images
                          relative to the file's folder, labels with spaces between: `a/1.jpg,dog grass`
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from .errors import ImageError, UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
EVALUATION_FOLDERS = ("val", "validation", "test")
LABELS_FILE = "labels.csv"

DIGITS_TEST_SHARE = 0.2
SYNTHETIC_DIFFERENT = 64
"""Images, then they come again."""
SYNTHETIC_SIZE = 64
"""Pixels a side; what the network gets is resized from that."""


class Images(Protocol):
    """A map-style dataset. `classes` are names, in the order of the logits."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]: ...


@dataclass(frozen=True)
class Splits:
    train: Images | None
    """None where only an evaluation was asked for."""
    evaluation: Images


def read_image(path: str) -> Image.Image:
    """In RGB. Raises ImageError where the file is missing, truncated, or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read as an image: {' '.join(str(error).split())}") from None


class FolderOfClasses:
    """One folder a class, whose images may lie in folders below it; targets are class numbers.

    Args:
        classes: names that the folder must have exactly; None takes its subfolders, sorted.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not found:
            raise UserError(f"--data-dir: {root} has no subfolders; expected one for each class")
        if classes is not None and list(classes) != found:
            extra, missing = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
            raise UserError(f"--data-dir: {root} has other classes than its twin: {_differences(extra, missing)}")
        self.classes = found
        files = [_image_files(root / name) for name in found]
        if empty := [str(root / name) for name, inside in zip(found, files, strict=True) if not inside]:
            raise UserError(f"--data-dir: no images in {_some(empty)}")
        self.samples = [(file, label) for label, inside in enumerate(files) for file in inside]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


class FolderOfLabels:
    """Images with any number of labels each, listed in labels.csv; targets are float32 (classes,) of zeros and ones."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        listing = root / LABELS_FILE
        try:
            with open(listing, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != ["image", "labels"]:
                    raise UserError(f"{listing}: expected the header line image,labels, got {reader.fieldnames}")
                rows = [(str(root / row["image"]), (row["labels"] or "").split()) for row in reader]
        except FileNotFoundError:
            raise UserError(f"--multi-label: there is no {listing}") from None
        found = sorted({label for _, labels in rows for label in labels})
        if not found:
            raise UserError(f"{listing} lists no images with labels")
        if classes is not None and (extra := sorted(set(found) - set(classes))):
            raise UserError(f"{listing} has labels that the training images do not have: {_some(extra)}")
        self.classes = list(classes) if classes is not None else found
        number = {name: index for index, name in enumerate(self.classes)}
        self.samples = [(path, [number[label] for label in labels]) for path, labels in rows]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
        path, labels = self.samples[index]
        target = torch.zeros(len(self.classes))
        target[labels] = 1
        return read_image(path), target


class ImagesInMemory:
    """Arrays: images uint8 (n, H, W, 3), used again from the first where there are more class numbers (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index % len(self.images)]), int(self.labels[index])


def digits() -> Splits:
    """scikit-learn's 1797 handwritten digits, 8 x 8: a fixed fifth of each digit is the test set."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise UserError("--dataset digits: the images come with scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits().images, load_digits().target
    images = np.repeat((images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=-1)
    parts = train_test_split(images, labels, test_size=DIGITS_TEST_SHARE, random_state=0, stratify=labels)
    classes = [str(digit) for digit in range(10)]
    return Splits(ImagesInMemory(parts[0], parts[2], classes), ImagesInMemory(parts[1], parts[3], classes))


def synthetic(images: int, classes: int) -> Splits:
    """Noise with random labels: to measure the training's speed without a disk."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (SYNTHETIC_DIFFERENT, SYNTHETIC_SIZE, SYNTHETIC_SIZE, 3), dtype=np.uint8)
    data = ImagesInMemory(pixels, generator.integers(0, classes, images), [str(number) for number in range(classes)])
    return Splits(data, data)


def folders(root: Path, multi_label: bool, evaluation_only: bool) -> Splits:
    """The splits of a tree. For an evaluation alone `root` may also be the evaluated folder itself."""
    if not root.is_dir():
        raise UserError(f"--data-dir: there is no folder {root}")
    kind = FolderOfLabels if multi_label else FolderOfClasses
    evaluation = next((root / name for name in EVALUATION_FOLDERS if (root / name).is_dir()), None)
    if evaluation_only:
        return Splits(None, kind(evaluation or root))
    if not (root / "train").is_dir():
        raise UserError(f"--data-dir: {root} has no folder train")
    if evaluation is None:
        raise UserError(f"--data-dir: {root} has no folder {' or '.join(EVALUATION_FOLDERS)}")
    train = kind(root / "train")
    return Splits(train, kind(evaluation, train.classes))


def _image_files(folder: Path) -> list[str]:
    files = (os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES)


def _differences(extra: Sequence[str], missing: Sequence[str]) -> str:
    parts = []
    if extra:
        parts.append(f"{_some(extra)} only here")
    if missing:
        parts.append(f"without {_some(missing)}")
    return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
