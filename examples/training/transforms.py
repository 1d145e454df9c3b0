"""From a PIL image to a normalised float32 tensor (3, size, size).

By torchvision's transforms v2 where they can be imported, else by the same few steps in PIL and torch: both draw the
same random numbers, and give the same result.

    training    a crop of random area and shape, resized; a horizontal flip by chance
    evaluation  resized by the shorter side, the middle
    both        scaled to [0, 1], (x - mean) / std
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

try:
    from torchvision.transforms import v2
except (ImportError, RuntimeError):  # the latter where it was built for another PyTorch
    v2 = None

ASPECT_RATIOS = (3 / 4, 4 / 3)
CROP_TRIALS = 10

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preparation:
    """How images are prepared; the names are those of timm's flags."""

    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: tuple[float, float]
    """Smallest and largest area of a training crop, as a share of the image."""
    hflip: float
    """Probability of a flip."""
    crop_pct: float
    """Share of the resized image's side that the evaluated middle has."""

    @property
    def resized(self) -> int:
        """Pixels of the shorter side, before the middle is taken."""
        return math.floor(self.img_size / self.crop_pct)


def training_transform(how: Preparation) -> Transform:
    if v2 is None:
        return lambda image: _normalise(_flip(_random_crop(image, how), how), how)
    return v2.Compose(
        [
            v2.RandomResizedCrop(how.img_size, how.scale, ASPECT_RATIOS),
            v2.RandomHorizontalFlip(how.hflip),
            *_torchvision_normalise(how),
        ]
    )


def evaluation_transform(how: Preparation) -> Transform:
    if v2 is None:
        return lambda image: _normalise(_middle(image, how), how)
    return v2.Compose([v2.Resize(how.resized), v2.CenterCrop(how.img_size), *_torchvision_normalise(how)])


def _torchvision_normalise(how: Preparation) -> list[Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(how.mean, how.std)]


def _random_crop(image: Image.Image, how: Preparation) -> Image.Image:
    width, height = image.size
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for _ in range(CROP_TRIALS):
        area = width * height * torch.empty(1).uniform_(*how.scale).item()
        ratio = math.exp(torch.empty(1).uniform_(low, high).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)))
            left = int(torch.randint(0, width - w + 1, (1,)))
            break
    else:  # a very long image: the largest crop from its middle
        w = min(width, round(height * ASPECT_RATIOS[1]))
        h = min(height, round(width / ASPECT_RATIOS[0]))
        top, left = (height - h) // 2, (width - w) // 2
    image = image.crop((left, top, left + w, top + h))
    return image.resize((how.img_size, how.img_size), Image.Resampling.BILINEAR)


def _flip(image: Image.Image, how: Preparation) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < how.hflip else image


def _middle(image: Image.Image, how: Preparation) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    size = [int(how.resized * side / shorter) for side in (width, height)]
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - how.img_size) / 2) for side in size)
    return image.crop((left, top, left + how.img_size, top + how.img_size))


def _normalise(image: Image.Image, how: Preparation) -> Tensor:
    x = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (how.mean, how.std))
    return (x - mean) / std
