"""`SeparableConv2d`: the drop-in module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_sepconv.nn.functional import separable_conv2d
from fused_sepconv.nn.inputs import check_channels, padding_sides_of, parameters_of, refuse_script
from fused_sepconv.nn.normalised import Normalised
from fused_sepconv.nn.padding import check_padding_mode, divide, pad_image
from fused_sepconv.ops import backend, eager
from fused_sepconv.ops.arguments import Padding, Pair, check_activation, check_save, integer, padding_form, pair
from fused_sepconv.ops.operators import SEPARABLE_CONV2D
from fused_sepconv.tensors.activations import ACTIVATIONS

# torch.fx leaves them as one call in what it traces: what they look at in x, a traced x has not.
torch.fx.wrap("separable_conv2d")
torch.fx.wrap("check_channels")
torch.fx.wrap("pad_image")


class SeparableConv2d(nn.Module):
    """A depthwise and a pointwise convolution that run as one: ``y = act(pointwise(mid_act(depthwise(pre_act(x)))))``.

    The two convolutions are ordinary `nn.Conv2d` children, `depthwise` (C -> C * m, groups = C) and `pointwise`
    (C * m -> F, 1 x 1), so that state dicts, initialisers and optimisers see what they know. Their parameters and their
    stride, padding and dilation are read at every call. Where a child is more than a plain `nn.Conv2d` (it carries a
    hook, a parametrisation or pruning, or was replaced by another module), the children are called one after the other
    instead, whatever the backend, so that what a user attached keeps working. (Hooks for all modules, such as
    `torch.nn.modules.module.register_module_forward_hook`'s, see this module alone.)

    Args:
        in_channels: C.
        out_channels: F.
        kernel_size, stride, dilation: of the depthwise convolution, in pixels; an int or (vertical, horizontal).
        padding: an int, (vertical, horizontal), ((top, bottom), (left, right)), "valid" or "same" (TensorFlow's rule,
            out = ceil(in / stride), for every stride). A padding that `nn.Conv2d` cannot express is applied by this
            module, and the child's own is 0.
        bias: a bias after the pointwise convolution.
        depth_multiplier: m, depthwise channels per input channel.
        depthwise_bias: a bias after the depthwise convolution.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        pre_activation, mid_activation, activation: None, "relu", "relu6", "elu", "silu", "hardswish" or "gelu": on the
            input, between the convolutions, and on the output.
        save_intermediate: "auto", True or False: whether the backward is given the depthwise result, or computes it
            again (`separable_conv2d` says when). It may be set at any time.
        device, dtype: of the parameters.

    Shape: x (N, C, H, W) or (C, H, W); the result (N, F, out_h, out_w) or (F, out_h, out_w), in x's memory format.
    """

    save_intermediate: bool | str = "auto"  # of a module that was pickled before there was a choice
    _child_names: ClassVar[tuple[str, str]] = ("depthwise", "pointwise")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | str | Pair | tuple[Pair, Pair] = 0,
        dilation: int | Pair = 1,
        *,
        bias: bool = True,
        depth_multiplier: int = 1,
        depthwise_bias: bool = False,
        padding_mode: str = "zeros",
        pre_activation: str | None = None,
        mid_activation: str | None = None,
        activation: str | None = None,
        save_intermediate: bool | str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = integer("in_channels", in_channels, 1)
        intermediate = in_channels * integer("depth_multiplier", depth_multiplier, 1)
        kernel_size = pair("kernel_size", kernel_size, 1)
        stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
        check_padding_mode(padding_mode)
        own_padding, child_padding = divide(padding_form(padding), stride)
        factory = {"device": device, "dtype": dtype}
        depthwise = nn.Conv2d(
            in_channels,
            intermediate,
            kernel_size,
            stride,
            child_padding,
            dilation,
            groups=in_channels,
            bias=depthwise_bias,
            padding_mode=padding_mode,
            **factory,
        )
        pointwise = nn.Conv2d(intermediate, integer("out_channels", out_channels, 1), 1, bias=bias, **factory)
        self._init(depthwise, pointwise, own_padding, pre_activation, mid_activation, activation, save_intermediate)

    @classmethod
    def from_convs(
        cls,
        depthwise: nn.Conv2d,
        pointwise: nn.Conv2d,
        *,
        pre_activation: str | None = None,
        mid_activation: str | None = None,
        activation: str | None = None,
        save_intermediate: bool | str = "auto",
    ) -> SeparableConv2d:
        """Adopts two existing convolutions, which become the children: their parameters are shared, not copied.

        Raises:
            TypeError: an argument that is no `nn.Conv2d`.
            ValueError: a `depthwise` that is not depthwise, or a `pointwise` that is not 1 x 1 on its channels.
        """
        for name, conv in (("depthwise", depthwise), ("pointwise", pointwise)):
            if not isinstance(conv, nn.Conv2d):
                raise TypeError(f"{name}: expected an nn.Conv2d, got {type(conv).__name__}")
        if depthwise.groups != depthwise.in_channels:
            raise ValueError(
                f"depthwise: expected as many groups as input channels ({depthwise.in_channels}), "
                f"got groups = {depthwise.groups}"
            )
        if not is_pointwise(pointwise):
            raise ValueError(
                f"pointwise: expected a 1 x 1 convolution, stride 1, no padding, one group, got {pointwise}"
            )
        if pointwise.in_channels != depthwise.out_channels:
            raise ValueError(
                f"pointwise: expected depthwise's {depthwise.out_channels} output channels as its input, "
                f"got {pointwise.in_channels}"
            )
        module = cls.__new__(cls)
        module._init(depthwise, pointwise, None, pre_activation, mid_activation, activation, save_intermediate)
        return module

    def _init(
        self,
        depthwise: nn.Conv2d,
        pointwise: nn.Conv2d,
        own_padding: Padding | str | None,
        pre_activation: str | None,
        mid_activation: str | None,
        activation: str | None,
        save_intermediate: bool | str,
    ) -> None:
        nn.Module.__init__(self)
        self.depthwise, self.pointwise = depthwise, pointwise
        self._own_padding = own_padding  # (top, bottom, left, right) or "same": what the child cannot express
        self.pre_activation = check_activation("pre_activation", pre_activation)
        self.mid_activation = check_activation("mid_activation", mid_activation)
        self.activation = check_activation("activation", activation)
        check_save(save_intermediate)
        self.save_intermediate = save_intermediate

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual`, of the output's shape, is added before the last activation."""
        if type(x) is Normalised:
            if self.runs_normalised(x.activation):
                return x.separable_conv2d(self.call(x.norm.x, residual))
            x = x.tensor()
        first, second = self._child_names  # as `halves`, without its call
        depthwise, pointwise = self._modules[first], self._modules[second]
        if not _run_as_one(depthwise, pointwise):
            return self._call_children(x, residual)
        tensors, options = self._call(depthwise, pointwise, x, residual)
        y = eager.run(SEPARABLE_CONV2D, tensors, options, backend.default)
        return separable_conv2d(**_named(tensors, options)) if y is None else y

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """The two convolutions, or what was put in their place."""
        depthwise, pointwise = self._child_names
        return self._modules[depthwise], self._modules[pointwise]

    def runs_as_one(self) -> bool:
        """Whether nothing is attached to the children that calling `separable_conv2d` would pass over."""
        return _run_as_one(*self.halves())

    def runs_normalised(self, activation: str | None = None) -> bool:
        """Whether a BatchNorm, and an activation after it, can run together with this module."""
        plain = self.runs_as_one() and self.halves()[0].padding_mode == "zeros"
        return plain and not (activation and self.pre_activation)

    def call(self, x: Tensor, residual: Tensor | None = None) -> dict[str, Any]:
        """The arguments of `separable_conv2d` that this module is, for an input."""
        return _named(*self._call(*self.halves(), x, residual))

    def _call(
        self, depthwise: nn.Conv2d, pointwise: nn.Conv2d, x: Tensor, residual: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The tensors and the options of a call."""
        x = check_channels(x, depthwise.groups)
        padding = depthwise.padding if self._own_padding is None else self._own_padding
        if depthwise.padding_mode != "zeros":
            # Activations work element by element, so the padding may come before the pre-activation.
            x, padding = self._padded(x, self._own_padding or padding_sides_of(depthwise)), 0
        elif isinstance(self._own_padding, tuple):
            padding = padding[:2], padding[2:]
        depthwise_weight, depthwise_bias = parameters_of(depthwise)
        pointwise_weight, bias = parameters_of(pointwise)
        return (
            (x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual),
            (
                depthwise.stride,
                padding,
                depthwise.dilation,
                self.pre_activation,
                self.mid_activation,
                self.activation,
                self.save_intermediate,
            ),
        )

    def _call_children(self, x: Tensor, residual: Tensor | None) -> Tensor:
        z = self._children_result(x)
        if residual is not None:
            z = _added(z, residual)
        return ACTIVATIONS[self.activation].forward(z)

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self)

    def _children_result(self, x: Tensor) -> Tensor:
        x = ACTIVATIONS[self.pre_activation].forward(x)
        if self._own_padding is not None:
            x = self._padded(x, self._own_padding)
        depthwise, pointwise = self.halves()
        return pointwise(ACTIVATIONS[self.mid_activation].forward(depthwise(x)))

    def _padded(self, x: Tensor, padding: Any) -> Tensor:
        conv, _ = self.halves()
        return pad_image(x, padding, conv.padding_mode, conv.kernel_size, conv.stride, conv.dilation)

    def extra_repr(self) -> str:
        shown = {
            "padding": self._own_padding,
            "pre_activation": self.pre_activation,
            "mid_activation": self.mid_activation,
            "activation": self.activation,
        }
        if self.save_intermediate != "auto":
            shown["save_intermediate"] = self.save_intermediate
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)


_NAMES = (
    ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual"),
    ("stride", "padding", "dilation", "pre_activation", "mid_activation", "activation", "save_intermediate"),
)


def _named(*values: tuple[Any, ...]) -> dict[str, Any]:
    """The tensors and options of a call by their names."""
    return {
        name: value for names, part in zip(_NAMES, values, strict=True) for name, value in zip(names, part, strict=True)
    }


@torch.fx.wrap
def _added(z: Tensor, residual: Tensor) -> Tensor:
    if residual.shape != z.shape:
        raise ValueError(f"residual: expected the output's shape {tuple(z.shape)}, got {tuple(residual.shape)}")
    return z + residual.to(z.dtype)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution sees each pixel by itself, and all channels of it."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )


def _run_as_one(depthwise: nn.Module, pointwise: nn.Module) -> bool:
    """Whether calling both is nothing but their convolutions: no subclass, hook or replaced forward."""
    for child in (depthwise, pointwise):
        if (
            type(child) is not nn.Conv2d
            or child._forward_hooks
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or "forward" in child.__dict__  # two questions: Dynamo before 2.13 can't trace the dictionary's keys()
            or "_conv_forward" in child.__dict__
        ):
            return False
    return depthwise.groups == depthwise.in_channels and is_pointwise(pointwise)
