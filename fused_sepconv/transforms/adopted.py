"""Two convolutions of somebody else's model, run as one where they are, under the names that they have there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_sepconv.nn.functional import separable_conv2d
from fused_sepconv.nn.separable import SeparableConv2d


class AdoptedSeparableConv2d(SeparableConv2d):
    """In place of a module that did nothing but call the two: its children keep their names, and so their keys."""

    @classmethod
    def adopt(cls, module: nn.Module, depthwise: str, pointwise: str) -> AdoptedSeparableConv2d:
        """From a module and the names of its two convolutions, children of it in the order in which it has them."""
        adopted = SeparableConv2d.from_convs(module.get_submodule(depthwise), module.get_submodule(pointwise))
        adopted.__class__ = AdoptedSequential if isinstance(module, nn.Sequential) else cls
        del adopted.depthwise, adopted.pointwise
        for name, child in module.named_children():
            adopted.add_module(name, child)
        adopted._child_names = (depthwise, pointwise)
        return adopted.train(module.training)

    def __getattr__(self, name: str) -> Any:
        if name in ("depthwise", "pointwise"):
            name = self._child_names[("depthwise", "pointwise").index(name)]
            return self._modules[name]
        return super().__getattr__(name)


class AdoptedSequential(AdoptedSeparableConv2d, nn.Sequential):
    """In place of an `nn.Sequential` of the two: one still, to be indexed and iterated over."""


class DepthwiseOfPair(nn.Conv2d):
    """A depthwise convolution that also runs the pointwise one which its model calls next.

    For a pair in the midst of a longer forward, which stays as it is. Each of the two is still the module that it was,
    with its parameters; while hooks look at what is between them, each runs by itself. (To take one of them out of the
    model, take both.)
    """

    _pointwise: tuple[PointwiseOfPair]  # in a tuple, so that it stays a child of its own parent alone
    _own_class: type[nn.Conv2d]
    _own_padding: str | None

    @staticmethod
    def join(depthwise: nn.Conv2d, pointwise: nn.Conv2d, padding: str | None) -> None:
        """Makes a pair of two convolutions where they are; `padding` is what the first pads beyond `nn.Conv2d`."""
        depthwise._own_class, depthwise._own_padding = type(depthwise), padding
        depthwise.__class__ = DepthwiseOfPair
        pointwise.__class__ = PointwiseOfPair
        depthwise._pointwise, pointwise._depthwise = (pointwise,), (depthwise,)

    def forward(self, x: Tensor) -> Tensor:
        return separable_conv2d(**self.call(x)) if self.runs_as_one() else self._own_class.forward(self, x)

    def runs_as_one(self) -> bool:
        """Whether nobody looks at what is between the two."""
        (pointwise,) = self._pointwise
        return not (
            self._forward_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or pointwise._forward_pre_hooks
            or pointwise._backward_hooks
            or pointwise._backward_pre_hooks
        )

    def call(self, x: Tensor) -> dict[str, Any]:
        """The arguments of `separable_conv2d` that the pair is, for an input."""
        (pointwise,) = self._pointwise
        return {
            "x": x,
            "depthwise_weight": self.weight,
            "pointwise_weight": pointwise.weight,
            "bias": pointwise.bias,
            "stride": self.stride,
            "padding": self._own_padding or self.padding,
            "dilation": self.dilation,
            "depthwise_bias": self.bias,
        }


class PointwiseOfPair(nn.Conv2d):
    """The pointwise convolution of a pair: its input is already its result, where the pair runs as one."""

    _depthwise: tuple[DepthwiseOfPair]

    def forward(self, x: Tensor) -> Tensor:
        return x if self._depthwise[0].runs_as_one() else super().forward(x)
