"""The implementations of a layer that are compared. Ours begin with "fused"; the others are what a PyTorch user has."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from problem import Geometry, SeparableConv, convolution_flags
from torch import Tensor

import fused_sepconv

OURS = "fused_sepconv"

PEERS = ("eager", "compile", "max-autotune")  # PyTorch's two convolutions, and `torch.compile` of them in two modes

_COMPILE_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Without CUDA graphs: they would copy their inputs, and launches are hidden for all alike (see timing.py)."""


def is_ours(name: str) -> bool:
    return name.startswith("fused")


def ours(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    """Ours, as a user of the package gets it under "auto"."""
    return fused_sepconv.separable_conv2d(x, depthwise_weight, pointwise_weight, None, *geometry)


def eager(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    """PyTorch's two convolutions, one after the other."""
    return F.conv2d(F.conv2d(x, depthwise_weight, None, *geometry, groups=x.shape[1]), pointwise_weight)


@cache
def compiled(mode: str) -> SeparableConv:
    """`torch.compile` of the two convolutions; each shape is compiled for itself when it is first called."""
    return torch.compile(eager, mode=mode, dynamic=False)


@dataclass(frozen=True)
class Implementation:
    name: str
    function: SeparableConv
    layout: str  # memory layout of its x
    is_compiled: bool = False

    @property
    def is_ours(self) -> bool:
        return is_ours(self.name)

    @contextmanager
    def settings(self, dtype: str) -> Iterator[None]:
        """PyTorch's settings under which it is prepared and runs."""
        with convolution_flags(dtype):
            if not self.is_compiled:
                yield
                return
            import torch._dynamo.config as dynamo
            import torch._functorch.config as functorch

            # A function that was compiled for eight shapes otherwise runs uncompiled on the ninth; and a compiled
            # backward reuses the memory of what was saved for it, and runs only once.
            with dynamo.patch(cache_size_limit=64), functorch.patch(donated_buffer=False):
                yield


def implementations(device: str, layouts: Sequence[str], peers: Sequence[str] = ("eager",)) -> list[Implementation]:
    """Everything that runs on a device when `layouts` are asked for, peers first.

    On a GPU eager PyTorch takes another kernel in each layout (its own depthwise kernel in NCHW, cuDNN's in NHWC), and
    either may be the faster: both are peers of ours, whatever layout ours is given.
    """
    eager_layouts = ("nchw", "nhwc") if device == "cuda" else layouts
    found = [Implementation(f"eager-{layout}", eager, layout) for layout in eager_layouts if "eager" in peers]
    for kind in (kind for kind in _COMPILE_MODES if kind in peers):
        function = compiled(_COMPILE_MODES[kind])
        found += [Implementation(f"{kind}-{layout}", function, layout, is_compiled=True) for layout in layouts]
    return [*found, *(Implementation(OURS, ours, layout) for layout in layouts)]
