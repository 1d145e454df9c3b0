"""Two convolutions of somebody else's model, run as one where they are, under the names that they have there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_sepconv.nn import separable
from fused_sepconv.nn.functional import separable_conv2d
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops.arguments import DTYPES
from fused_sepconv.transforms.lookahead import next_module


class AdoptedSeparableConv2d(SeparableConv2d):
    """In place of a module that did nothing but call the two: its children keep their names, and so their keys."""

    @classmethod
    def adopt(cls, module: nn.Module, depthwise: str, pointwise: str) -> AdoptedSeparableConv2d:
        """From a module and the names of its two convolutions, children of it in the order in which it has them."""
        adopted = SeparableConv2d.from_convs(module.get_submodule(depthwise), module.get_submodule(pointwise))
        adopted.__class__ = AdoptedSequential if isinstance(module, nn.Sequential) else cls
        adopted._child_names, adopted._modules = (depthwise, pointwise), module._modules.copy()
        adopted.training = module.training
        return adopted

    def __getattr__(self, name: str) -> Any:
        if name in ("depthwise", "pointwise") and name not in self._modules:  # a child's own name comes first
            return self.halves()[name == "pointwise"]
        return super().__getattr__(name)


class AdoptedSequential(AdoptedSeparableConv2d, nn.Sequential):
    """In place of an `nn.Sequential` of the two: one still, to be indexed, sliced, iterated over and added to."""

    def __init__(self, *args: Any) -> None:
        nn.Sequential.__init__(self, *args)  # what a slice of it is made by: an `nn.Sequential` like any other

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self._is_the_pair() else nn.Sequential.forward(self, input)

    def runs_as_one(self) -> bool:
        return self._is_the_pair() and super().runs_as_one()

    def _is_the_pair(self) -> bool:
        return tuple(self._modules) == self._child_names

    def extra_repr(self) -> str:
        return super().extra_repr() if self._is_the_pair() else ""


class _Handed:
    """A depthwise convolution that its pointwise one will do together with its own: what passes between the two."""

    __slots__ = ("depthwise", "x")

    def __init__(self, depthwise: DepthwiseOfPair, x: Tensor) -> None:
        self.depthwise, self.x = depthwise, x


class HalfOfPair:
    """A convolution of a pair in the midst of a longer forward, which stays as it is.

    Each half is the convolution that it was, and looks like it: its class has the name, the constructor and the
    attributes of the one that it stands for, `conv_class`. Nothing links the halves. Where the depthwise half finds
    that the code that is calling it hands its result straight to a pointwise half, and to nobody else, it leaves the
    work to that one; in every other case both compute what they always did.
    """

    conv_class: ClassVar[type[nn.Conv2d]]
    half: ClassVar[type[HalfOfPair]]

    @classmethod
    def take(cls, conv: nn.Conv2d) -> None:
        """Makes a convolution such a half, where it is."""
        conv.__class__ = half_class(cls, type(conv))

    def __reduce_ex__(self, protocol: int) -> tuple:  # a class made at run time is not found by its name
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _empty_half, (self.half, self.conv_class), state


@cache
def half_class(half: type[HalfOfPair], conv_class: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The class of a convolution that is half of a pair."""
    namespace = {name: getattr(conv_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(conv_class.__name__, (half, conv_class), {**namespace, "half": half, "conv_class": conv_class})


def _empty_half(half: type[HalfOfPair], conv_class: type[nn.Conv2d]) -> nn.Conv2d:
    conv = half_class(half, conv_class)
    return conv.__new__(conv)


class DepthwiseOfPair(HalfOfPair):
    """The depthwise half."""

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Conv2d
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        elif torch.compiler.is_compiling():
            return super().forward(input)
        else:
            return self._handed_on(input, sys._getframe())

    def _handed_on(self, x: Tensor, forward: FrameType) -> Any:
        pointwise = next_module(self, forward)
        if isinstance(pointwise, PointwiseOfPair) and _fit(x, self, pointwise):
            return _Handed(self, x)
        return super().forward(x)


class PointwiseOfPair(HalfOfPair):
    """The pointwise half."""

    watchers: ClassVar[list[Callable[[nn.Conv2d, dict[str, Any]], None]]] = []
    """Called with the depthwise half and the arguments of `separable_conv2d`, for each pair that runs as one."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:
            return self._both(input) if type(input) is _Handed else super().forward(input)

    def _both(self, handed: Any) -> Tensor:
        depthwise = handed.depthwise
        call = {
            "x": handed.x,
            "depthwise_weight": depthwise.weight,
            "pointwise_weight": self.weight,
            "bias": self.bias,
            "stride": depthwise.stride,
            "padding": own_padding(depthwise) or depthwise.padding,
            "dilation": depthwise.dilation,
            "depthwise_bias": depthwise.bias,
        }
        for watch in PointwiseOfPair.watchers:
            watch(depthwise, call)
        return separable_conv2d(**call)


def _fit(x: Any, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> bool:
    """Whether two convolutions are, for an input, what `separable_conv2d` computes; an error is left to PyTorch."""
    if not (
        is_depthwise(depthwise)
        and is_pointwise(pointwise)
        and is_plain(depthwise)
        and is_plain(pointwise)
        and depthwise.padding_mode == "zeros"
        and depthwise.out_channels == pointwise.in_channels
        and type(depthwise).forward is DepthwiseOfPair.forward
        and type(pointwise).forward is PointwiseOfPair.forward
    ):
        return False
    tensors = [x, depthwise.weight, pointwise.weight]
    tensors += [bias for bias in (depthwise.bias, pointwise.bias) if bias is not None]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided for tensor in tensors)
        and all(tensor.device == x.device and tensor.dtype in DTYPES for tensor in tensors)
        and (len({t.dtype for t in tensors}) == 1 or torch.is_autocast_enabled(x.device.type))
        and x.dim() in (3, 4)
        and x.shape[-3] == depthwise.in_channels
        and tensors[1].shape == (depthwise.out_channels, 1, *depthwise.kernel_size)
        and tensors[2].shape == (pointwise.out_channels, pointwise.in_channels, 1, 1)
    )


# What kind of convolution a module is --------------------------------------------------------------------------------


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and separable.is_pointwise(module)


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether calling it is its convolution and nothing else."""
    if {"forward", "_conv_forward"} & set(vars(conv)):
        return False
    return (
        _conv_class(conv) is nn.Conv2d
        or own_padding(conv) is not None
        or (is_detectron2(conv) and conv.norm is None and conv.activation is None)
    )


def own_padding(conv: nn.Conv2d) -> str | None:
    """The word "same" for a convolution that pads by TensorFlow's rule where `nn.Conv2d` cannot: timm's."""
    return "same" if class_name(conv) == "timm.layers.conv2d_same.Conv2dSame" else None


def is_detectron2(conv: nn.Conv2d) -> bool:
    """Whether it is detectron2's, which is `nn.Conv2d` with two attributes, a norm and an activation, that come after
    it or are None."""
    return class_name(conv) == "detectron2.layers.wrappers.Conv2d"


def class_name(module: nn.Module) -> str:
    kind = _conv_class(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _conv_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, or the one that half of a pair stands for."""
    is_half = isinstance(module, HalfOfPair) and type(module) is half_class(module.half, module.conv_class)
    return module.conv_class if is_half else type(module)
