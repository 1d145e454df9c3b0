"""`replace_depthwise_convs`: a model's own depthwise convolutions, run by `depthwise_conv2d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_sepconv.nn.depthwise import DepthwiseConv, DepthwiseConv1d, DepthwiseConv2d
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops.arguments import DTYPES
from fused_sepconv.transforms.adopted import HalfOfPair
from fused_sepconv.transforms.report import ReplacementReport, check_model


class _DropIn:
    """What stands in a model for PyTorch's convolution: made as that one is, and that one where it isn't depthwise.

    Tools make more of a model's layers by `type(layer)(in_channels, out_channels, kernel_size, ...)`.
    """

    pre_activation = activation = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.conv_type.__init__(self, *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if _is_depthwise(self) else self.conv_type.forward(self, input)


class DropInDepthwiseConv1d(_DropIn, DepthwiseConv1d):
    """`DepthwiseConv1d` in the place of an `nn.Conv1d`."""


class DropInDepthwiseConv2d(_DropIn, DepthwiseConv2d):
    """`DepthwiseConv2d` in the place of an `nn.Conv2d`."""


_REPLACEMENTS = {replacement.conv_type: replacement for replacement in (DropInDepthwiseConv1d, DropInDepthwiseConv2d)}


def replace_depthwise_convs(model: nn.Module) -> ReplacementReport:
    """Makes every plain depthwise `nn.Conv2d` and `nn.Conv1d` of a model a `DepthwiseConv2d` or `DepthwiseConv1d`.

    In place, and the modules themselves: parameters, `state_dict` keys, hooks, pruning, and whatever else refers to a
    module, stay what they are, and so do results and gradients. (One thing differs from `nn.Conv2d`: the memory format
    of a result is x's, whatever the weight's.) Depthwise is a convolution with more than one group and as many groups
    as input channels, any depth multiplier. To run a depthwise convolution together with a pointwise one,
    `replace_separable_convs` comes first; this is for what is left.

    Returns:
        A report: `.replaced` names the modules, `.skipped` has (name, reason) of every depthwise convolution that was
        left: subclasses of PyTorch's, parametrised ones, transposed and three-dimensional ones, and those inside a
        `SeparableConv2d`.

    Raises:
        TypeError: a `model` that is no `nn.Module`.
    """
    check_model(model)
    inside = {
        child: f"the SeparableConv2d {name or '(the model)'} runs it"
        for name, module in model.named_modules()
        if isinstance(module, SeparableConv2d)
        for child in module.modules()
    }
    replaced, skipped = [], []
    for name, module in model.named_modules():
        if not _is_depthwise(module) or isinstance(module, DepthwiseConv):
            continue
        name = name or "(the model)"
        if reason := inside.get(module) or _why_not(module):
            skipped.append((name, reason))
            continue
        module.__class__ = _REPLACEMENTS[type(module)]
        replaced.append(name)
    return ReplacementReport(tuple(replaced), tuple(skipped))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def _why_not(conv: nn.Module) -> str:
    """Why a depthwise convolution is not replaced; empty if it is."""
    if isinstance(conv, HalfOfPair):
        return "it runs with a pointwise convolution"
    if parametrize.is_parametrized(conv):
        return "it is parametrised; replaced first and parametrised then, it works"
    if type(conv) not in _REPLACEMENTS:
        plain = type(conv).__module__.startswith("torch.nn.")
        return (
            f"there is no depthwise {type(conv).__name__}"
            if plain
            else f"a {type(conv).__name__} is a class of its own"
        )
    if {"forward", "_conv_forward"} & conv.__dict__.keys():
        return "its forward was replaced"
    if conv.weight.dtype not in DTYPES:
        return f"its dtype is {conv.weight.dtype}"
    return ""
