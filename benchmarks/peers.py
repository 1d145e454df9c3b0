"""The implementations of a layer that are compared. Ours begin with "fused"; the others are what a PyTorch user has."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from problem import Geometry, SeparableConv, convolution_flags

import fused_sepconv

OURS = "fused_sepconv"


def ours(
    x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """What a user of the package gets: the plan chooses what runs."""
    return fused_sepconv.separable_conv2d(x, depthwise_weight, pointwise_weight, None, *geometry)


def eager(
    x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """PyTorch's two convolutions, one after the other."""
    return F.conv2d(F.conv2d(x, depthwise_weight, None, *geometry, groups=x.shape[1]), pointwise_weight)


@cache
def compiled(mode: str) -> SeparableConv:
    """`torch.compile` of the two convolutions; each shape is compiled for itself when it is first called."""
    return torch.compile(eager, mode=mode, dynamic=False)


def tensorrt(
    x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    """TensorRT's engine for the two convolutions."""
    if torch.is_grad_enabled():
        raise NotImplementedError("TensorRT has no backward")
    return tensorrt_engines()(x, depthwise_weight, pointwise_weight, geometry)


@cache
def tensorrt_engines() -> SeparableConv:
    import torch_tensorrt  # noqa: F401  registers the compiler's backend

    return torch.compile(eager, backend="tensorrt", dynamic=False)


@dataclass(frozen=True)
class Implementation:
    name: str
    function: SeparableConv
    layout: str
    """The memory layout that it is given."""
    depthwise_kernel: str = field(default="auto", kw_only=True)
    """See `convolution_flags`."""
    is_compiled: bool = field(default=False, kw_only=True)

    @property
    def is_ours(self) -> bool:
        return is_ours(self.name)

    @contextmanager
    def settings(self, dtype: str) -> Iterator[None]:
        """PyTorch's settings under which it is prepared and runs."""
        with convolution_flags(dtype, self.depthwise_kernel):
            if not self.is_compiled:
                yield
                return
            import torch._dynamo.config as dynamo
            import torch._functorch.config as functorch

            # A function that was compiled for eight shapes otherwise runs uncompiled on the ninth; and a compiled
            # backward reuses the memory of what was saved for it, and runs only once.
            with dynamo.patch(cache_size_limit=64), functorch.patch(donated_buffer=False):
                yield


def is_ours(name: str) -> bool:
    return name.startswith("fused")


PEERS = ("eager", "forced", "compile", "max-autotune", "tensorrt")
"""Kinds of peers: PyTorch's two convolutions; the same with the depthwise kernel forced; `torch.compile` in two modes;
TensorRT."""

_COMPILE_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Graphs of its own would be measured as launches here, and can't be captured into ours: launch-free rows are those
that are replayed (see timing.py), whoever made them."""


def default_peers(device: str, quick: bool) -> tuple[str, ...]:
    """On the CPU ours is PyTorch's own two convolutions: compilers would take minutes to show nothing of ours."""
    if device == "cpu":
        return ("eager",)
    quickly_ready = ("eager", "forced") if hasattr(torch.backends.cudnn, "depthwise_kernel") else ("eager",)
    if quick:
        return quickly_ready
    return (*quickly_ready, "compile", "max-autotune", *(["tensorrt"] if find_spec("torch_tensorrt") else []))


def implementations(device: str, layouts: Sequence[str], peers: Sequence[str] = ("eager",)) -> list[Implementation]:
    """What runs on a device when `layouts` are asked for, peers first.

    On a GPU eager PyTorch takes another kernel in each layout (its own depthwise kernel in NCHW, cuDNN's in NHWC), and
    either may be the faster: both are peers of ours, whatever layout ours is given. A depthwise kernel is forced in
    NCHW alone: in NHWC PyTorch takes cuDNN's whatever the setting says.
    """
    found = []
    eager_layouts = ("nchw", "nhwc") if device == "cuda" else layouts
    if "eager" in peers:
        found += [Implementation(f"eager-{layout}", eager, layout) for layout in eager_layouts]
    if "forced" in peers:
        found += [
            Implementation(f"{kernel}-nchw", eager, "nchw", depthwise_kernel=kernel) for kernel in ("cudnn", "native")
        ]
    for kind, mode in _COMPILE_MODES.items():
        if kind in peers:
            found += [
                Implementation(f"{kind}-{layout}", compiled(mode), layout, is_compiled=True) for layout in layouts
            ]
    if "tensorrt" in peers:
        found += [Implementation(f"tensorrt-{layout}", tensorrt, layout, is_compiled=True) for layout in layouts]
    return [*found, *(Implementation(OURS, ours, layout) for layout in layouts)]
