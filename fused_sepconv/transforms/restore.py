"""`restore_convs`: a model's convolutions as PyTorch's own again, for exporters and scripts."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_sepconv.nn.depthwise import DepthwiseConv, DepthwiseConv1d
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.transforms.report import ReplacementReport, check_model

Sides = tuple[int, int, int, int]


def restore_convs(model: nn.Module) -> ReplacementReport:
    """Makes plain `nn.Conv2d`s and `nn.Conv1d`s of everything in a model that this package runs.

    In place, and the modules themselves: parameters, `state_dict` keys, hooks and results stay what they are. For what
    knows PyTorch's own modules and operators alone: `torch.jit.script`, exporters, quantisation, pruning libraries. To
    keep the model as well, restore a copy: ``restore_convs(copy.deepcopy(model))``.

    A convolution that `nn.Conv2d` cannot express (an activation of its own, four sides of padding, "same" with a
    stride) becomes a subclass of it, and a `SeparableConv2d` a module of two, in PyTorch's operators, that
    `torch.jit.script` compiles. A pair that stood for a module of somebody else's is an `nn.Sequential` afterwards.

    Returns:
        A report: `.replaced` names the modules, `.skipped` has (name, reason) of those that were left: subclasses of
        this package's modules with a forward of their own.

    Raises:
        TypeError: a `model` that is no `nn.Module`.
    """
    check_model(model)
    replaced, skipped = [], []
    for name, module in list(model.named_modules()):
        owner = next((base for base in type(module).__mro__ if "forward" in vars(base)), nn.Module)
        if not _is_ours(module):
            continue
        if not owner.__module__.startswith("fused_sepconv."):
            skipped.append((name or "(the model)", f"a {type(module).__name__} has a forward of its own"))
            continue
        if isinstance(module, SeparableConv2d):
            _restore_pair(module)
        elif isinstance(module, DepthwiseConv):
            _restore_depthwise(module)
        else:  # half of a pair
            _become(module, getattr(module, "conv_class", nn.Conv2d))
        replaced.append(name or "(the model)")
    return ReplacementReport(tuple(replaced), tuple(skipped))


class PlainSeparableConv2d(nn.Module):
    """What a `SeparableConv2d` computes, in two convolutions and PyTorch's operators between them."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.depthwise
        x = activated(x, self.pre_activation)
        if self.same or self.sides != (0, 0, 0, 0):
            x = padded(x, self.same, self.sides, conv.kernel_size, conv.stride, conv.dilation, conv.padding_mode)
        z = self.pointwise(activated(self.depthwise(x), self.mid_activation))
        if residual is not None:
            z = z + residual
        return activated(z, self.activation)


class PlainDepthwiseConv2d(nn.Conv2d):
    """What a `DepthwiseConv2d` computes and `nn.Conv2d` does not."""

    def forward(self, x: Tensor) -> Tensor:
        x = activated(x, self.pre_activation)
        if self.same or self.sides != (0, 0, 0, 0):
            x = padded(x, self.same, self.sides, self.kernel_size, self.stride, self.dilation, self.padding_mode)
        return activated(self._conv_forward(x, self.weight, self.bias), self.activation)


class PlainDepthwiseConv1d(nn.Conv1d):
    """What a `DepthwiseConv1d` computes and `nn.Conv1d` does not."""

    def forward(self, x: Tensor) -> Tensor:
        x = activated(x, self.pre_activation)
        if self.same or self.sides != (0, 0, 0, 0):
            kernel, stride, dilation = (1, self.kernel_size[0]), (1, self.stride[0]), (1, self.dilation[0])
            row = x.unsqueeze(-2)
            x = padded(row, self.same, self.sides, kernel, stride, dilation, self.padding_mode).squeeze(-2)
        return activated(self._conv_forward(x, self.weight, self.bias), self.activation)


# What torch.jit.script compiles with them, in the Python that it knows.


def activated(x: Tensor, name: str | None) -> Tensor:
    if name is None:
        return x
    if name == "relu":
        return F.relu(x)
    if name == "relu6":
        return F.relu6(x)
    if name == "elu":
        return F.elu(x)
    if name == "silu":
        return F.silu(x)
    if name == "hardswish":
        return F.hardswish(x)
    return F.gelu(x)


def padded(
    x: Tensor,
    same: bool,
    sides: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    mode: str,
) -> Tensor:
    top, bottom, left, right = sides
    if same:
        top, bottom = same_sides(x.shape[-2], kernel[0], stride[0], dilation[0])
        left, right = same_sides(x.shape[-1], kernel[1], stride[1], dilation[1])
    return F.pad(x, [left, right, top, bottom], "constant" if mode == "zeros" else mode)


def same_sides(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's rule, as `fused_sepconv.ops.arguments.padding_sides` has it."""
    span = dilation * (kernel - 1) + 1
    total = (size - 1) // stride * stride + span - size
    if span < stride:
        total = max(total, 0)
    return total // 2, total - total // 2


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is one of this package's that run our operators: pairs, halves, depthwise convolutions."""
    if isinstance(module, (SeparableConv2d, DepthwiseConv)):
        return True
    return isinstance(module, nn.Conv2d) and any(
        base.__module__.startswith("fused_sepconv.") and not base.__name__.startswith("Plain")
        for base in type(module).__mro__
    )


def _restore_pair(module: SeparableConv2d) -> None:
    (depthwise, pointwise), own = module.halves(), module._own_padding
    children = dict(module.named_children())
    if children.get("depthwise") is depthwise and children.get("pointwise") is pointwise:
        _pad_before(module, own)
        _become(module, PlainSeparableConv2d)
        return
    # In place of somebody else's module that called the two and nothing else, in this order.
    names = {child: name for name, child in children.items()}
    module._modules = {names[child]: child for child in (depthwise, pointwise)}
    for name in ("_own_padding", "_child_names", "pre_activation", "mid_activation", "activation", "save_intermediate"):
        module.__dict__.pop(name, None)
    _become(module, nn.Sequential)


def _restore_depthwise(conv: DepthwiseConv) -> None:
    row, padding, own = isinstance(conv, DepthwiseConv1d), conv.padding, None
    if padding == "same":
        own = None if all(step == 1 for step in conv.stride) else "same"
    elif not isinstance(padding, str) and (len(padding) == 2 if row else isinstance(padding[0], tuple)):
        own = (0, 0, *padding) if row else (*padding[0], *padding[1])
    if own is not None:
        conv.padding = (0,) if row else (0, 0)
    if own != "same" and conv.padding_mode != "zeros":
        own = None  # any mode but zeros pads by `_reversed_padding_repeated_twice`
    plain, extended = (nn.Conv1d, PlainDepthwiseConv1d) if row else (nn.Conv2d, PlainDepthwiseConv2d)
    if own is None and conv.pre_activation is None and conv.activation is None:
        _become(conv, plain)
        return
    _pad_before(conv, own)
    activations = conv.pre_activation, conv.activation
    _become(conv, extended)
    conv.pre_activation, conv.activation = activations


def _pad_before(module: nn.Module, own: Sides | str | None) -> None:
    """The padding that a plain convolution cannot express, as what is restored has it."""
    module.same = own == "same"
    module.sides = (0, 0, 0, 0) if own is None or own == "same" else tuple(own)


def _become(module: nn.Module, new: type[nn.Module]) -> None:
    """Makes a module one of another class, without the attributes that its own declares."""
    for base in type(module).__mro__:
        if base.__module__.startswith("fused_sepconv.") and not issubclass(base, SeparableConv2d):
            for name in inspect.get_annotations(base):
                module.__dict__.pop(name, None)
    if parametrize.is_parametrized(module):
        type(module).__bases__ = (new,)  # a class of its own, made for this one module
    else:
        module.__class__ = new
