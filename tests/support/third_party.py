"""The implementations that ours is held against, imported so that they run beside whichever PyTorch is installed."""

import os

import tests.support.torchvision_operators  # noqa: F401 - before what imports torchvision

os.environ["KERAS_BACKEND"] = "torch"  # read once, when Keras is imported

import keras
import segmentation_models_pytorch
import timm
import torchvision

__all__ = ["keras", "segmentation_models_pytorch", "timm", "torchvision"]
