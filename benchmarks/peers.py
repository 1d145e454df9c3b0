"""The implementations that are compared. Ours begin with "fused"; the others are what a PyTorch user has today."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from problem import SeparableConv

import fused_sepconv

OURS = "fused_sepconv"


def ours(x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, padding: int) -> torch.Tensor:
    """What a user of the package gets: the plan chooses what runs."""
    return fused_sepconv.separable_conv2d(x, depthwise_weight, pointwise_weight, padding=padding)


def eager(
    x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, padding: int
) -> torch.Tensor:
    """PyTorch's two convolutions, one after the other."""
    return F.conv2d(F.conv2d(x, depthwise_weight, padding=padding, groups=x.shape[1]), pointwise_weight)


@dataclass(frozen=True)
class Implementation:
    name: str
    function: SeparableConv
    layout: str
    """The memory layout that it is given."""

    @property
    def is_ours(self) -> bool:
        return is_ours(self.name)


def is_ours(name: str) -> bool:
    return name.startswith("fused")


def implementations(device: str, layouts: Sequence[str]) -> list[Implementation]:
    """What runs on a device when `layouts` are asked for, peers first.

    On a GPU eager PyTorch takes another kernel in each layout (its own depthwise kernel in NCHW, cuDNN's in NHWC), and
    either may be the faster: both are peers of ours, whatever layout ours is given.
    """
    if device == "cuda":
        peers = [Implementation(f"eager-{layout}", eager, layout) for layout in ("nchw", "nhwc")]
        return [*peers, *(Implementation(OURS, ours, layout) for layout in layouts)]
    return [
        Implementation(name, function, layout)
        for layout in layouts
        for name, function in (("eager", eager), (OURS, ours))
    ]
