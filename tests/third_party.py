"""The implementations that ours is held against, imported so that they run beside whichever PyTorch is installed."""

import os
import sys

import torch

os.environ["KERAS_BACKEND"] = "torch"  # read once, when Keras is imported


def _declare_torchvision_operators() -> torch.library.Library | None:
    """torchvision cannot be imported where its compiled half was built for another PyTorch (such as the CUDA one): it
    registers shapes for operators that are then missing. No network calls them, so their declarations will do."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_operators = _declare_torchvision_operators()  # kept: a library's operators live as long as it does

import keras  # noqa: E402
import segmentation_models_pytorch  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402

__all__ = ["keras", "segmentation_models_pytorch", "timm", "torchvision"]
