"""A photograph in, the five most likely of ImageNet's classes out.

    python examples/classify.py photo.jpg --weights xception_weights_tf_dim_ordering_tf_kernels.h5
    python examples/classify.py photo.jpg --weights xception-43020ad28.pth

The weights are yours to fetch: Keras's (`keras.applications.Xception().save("xception.keras")`, its .weights.h5 or the
older .h5), timm's `legacy_xception` (.pth or .safetensors), or what `fused_sepconv.models.weights.save_safetensors`
wrote. The names of the classes are in imagenet_classes.txt beside this file. Needs pillow, and h5py or safetensors:
`pip install "fused_sepconv[examples]"`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fused_sepconv import optimize_for_inference
from fused_sepconv.models import Xception, weights, xception

CLASSES = Path(__file__).with_name("imagenet_classes.txt")
RESIZED, CROPPED = 333, 299
"""Pixels: the shorter side, and the square in the middle of it, as timm evaluates these weights."""


def read_image(path: Path) -> Tensor:
    """(1, 3, 299, 299) between -1 and 1."""
    image = Image.open(path).convert("RGB")
    scale = RESIZED / min(image.size)
    width, height = (max(RESIZED, int(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - CROPPED) / 2), round((height - CROPPED) / 2)
    pixels = np.array(image.crop((left, top, left + CROPPED, top + CROPPED)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def load(model: Xception, path: Path) -> weights.LoadReport:
    """By the file's name: Keras's, ours or timm's."""
    if path.suffix in (".keras", ".h5", ".hdf5"):
        return weights.load_keras(model, path)
    if path.suffix == ".safetensors" and weights.is_own_file(path):
        return weights.load_safetensors(model, path)
    return weights.load_timm(model, path)


@torch.inference_mode()
def classify(model: Xception, image: Tensor, names: list[str], top: int) -> list[tuple[str, float]]:
    """(class, probability), the likeliest first."""
    probabilities, classes = model(image).softmax(1)[0].topk(top)
    return [(names[index], float(p)) for index, p in zip(classes.tolist(), probabilities, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path, nargs="+", help="a photograph, or several")
    parser.add_argument("--weights", type=Path, required=True, help="Keras's or timm's file for Xception")
    parser.add_argument("--classes", type=Path, default=CLASSES, help="names, one a line, in the order of the logits")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        names = options.classes.read_text(encoding="utf-8").splitlines()
        if not 1 <= options.top <= len(names):
            raise ValueError(f"--top: expected 1 to {len(names)}, got {options.top}")
        model = xception(len(names)).eval()
        load(model, options.weights)
        images = [read_image(path) for path in options.image]
    except (OSError, UnidentifiedImageError, ImportError, ValueError) as error:
        print(f"classify: {error}", file=sys.stderr)
        return 1
    optimize_for_inference(model)
    model.to(options.device, memory_format=torch.channels_last)
    for path, image in zip(options.image, images, strict=True):
        print(path)
        image = image.to(options.device, memory_format=torch.channels_last)
        for name, probability in classify(model, image, names, options.top):
            print(f"  {probability:6.1%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
