"""Import this first, and torchvision can be imported beside whichever PyTorch is installed."""

import sys

import torch


def _declare() -> torch.library.Library | None:
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


_operators = _declare()  # kept: a library's operators live as long as it does
