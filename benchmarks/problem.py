"""One problem to solve and to time: a layer at a batch size, in a dtype and a layout, on a device."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from layers import Layer

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The tensors' dtype by the name of the arithmetic. "float32" is strict, "tf32" lets the tensor cores round."""

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

PASSES = {"fwd": "forward", "bwd": "backward", "both": "forward and backward"}

GRADIENTS = ("x", "depthwise_weight", "pointwise_weight")  # the tensors whose gradients a backward computes


class Inputs(NamedTuple):
    x: torch.Tensor
    depthwise_weight: torch.Tensor
    pointwise_weight: torch.Tensor
    grad_output: torch.Tensor


class Geometry(NamedTuple):
    """How the depthwise convolution moves over the image: the same down as across."""

    stride: int
    padding: int
    dilation: int


SeparableConv = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Geometry], torch.Tensor]
"""(x, depthwise_weight, pointwise_weight, geometry) -> y."""


@dataclass(frozen=True)
class Problem:
    layer: Layer
    batch: int
    dtype: str
    layout: str
    device: str

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of the tensors of `Inputs`, in their order."""
        layer = self.layer
        return (
            (self.batch, layer.in_channels, layer.size, layer.size),
            (layer.in_channels, 1, layer.kernel_size, layer.kernel_size),
            (layer.out_channels, layer.in_channels, 1, 1),
            (self.batch, layer.out_channels, layer.out_size, layer.out_size),
        )

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.layer.stride, self.layer.padding, self.layer.dilation)

    def inputs(self, seed: int) -> Inputs:
        """Random tensors, the weights scaled so that the output's variance is about one."""
        generator = torch.Generator(self.device).manual_seed(seed)
        layer = self.layer
        fans_in = (1, layer.kernel_size**2, layer.in_channels, 1)
        return Inputs(
            *(
                (torch.randn(shape, generator=generator, device=self.device) / math.sqrt(fan_in)).to(
                    DTYPES[self.dtype], memory_format=LAYOUTS[self.layout]
                )
                for shape, fan_in in zip(self.shapes, fans_in, strict=True)
            )
        )

    def meta_inputs(self) -> Inputs:
        """The same tensors without their data."""
        like = {"dtype": DTYPES[self.dtype], "memory_format": LAYOUTS[self.layout], "device": "meta"}
        return Inputs(*(torch.empty(shape, **like) for shape in self.shapes))


def prepare(function: SeparableConv, direction: str, inputs: Inputs, geometry: Geometry) -> Callable[[], object]:
    """A call without arguments that does one pass.

    "fwd" runs without autograd, "bwd" runs the backward of a graph built here and kept, "both" runs forward and
    backward as a training step does.
    """
    leaves = tuple(tensor.detach() for tensor in inputs[:3])
    if direction == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return function(*leaves, geometry)

        return forward

    for leaf in leaves:
        leaf.requires_grad_()
    if direction == "bwd":
        output = function(*leaves, geometry)
        return lambda: torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=True)
    return lambda: torch.autograd.grad(function(*leaves, geometry), leaves, inputs.grad_output)


def convolution_flags(dtype: str) -> AbstractContextManager[None]:
    """PyTorch's convolution settings while a dtype is measured: TF32 as the dtype says, cuDNN free to search."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=dtype == "tf32")
