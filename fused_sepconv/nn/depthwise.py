"""`DepthwiseConv2d` and `DepthwiseConv1d`: PyTorch's convolutions, run by `depthwise_conv2d`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_sepconv.nn.functional import depthwise_conv2d
from fused_sepconv.nn.inputs import check_channels, padding_sides_of, refuse_script
from fused_sepconv.nn.normalised import Normalised
from fused_sepconv.nn.padding import check_padding_mode, divide, pad_image
from fused_sepconv.ops.arguments import Pair, TensorSpec, check_activation, integer, padding_form, pair

# torch.fx leaves them as one call in what it traces: what they look at in x, a traced x has not.
torch.fx.wrap("depthwise_conv2d")
torch.fx.wrap("check_channels")
torch.fx.wrap("pad_image")


class DepthwiseConv(nn.Module):
    """The base of both modules. Everything is read at every call, from the attributes that PyTorch's modules have."""

    conv_type: ClassVar[type[nn.Conv1d | nn.Conv2d]]  # PyTorch's, whose attributes these are
    pre_activation: str | None
    activation: str | None

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Normalised:
            if self.runs_normalised(x.activation):
                return x.depthwise_conv2d(self.call(x.norm.x))
            x = x.tensor()
        return depthwise_conv2d(**self.call(x))

    def runs_normalised(self, activation: str | None = None) -> bool:
        """Whether a BatchNorm, and an activation after it, can run together with this module."""
        two_dimensional, plain = isinstance(self, nn.Conv2d), self.padding_mode == "zeros"
        return two_dimensional and plain and not (activation and self.pre_activation)

    def call(self, x: Tensor) -> dict[str, Any]:
        """The arguments of `depthwise_conv2d` that this module is, for an input."""
        raise NotImplementedError

    def _finish(self, own_padding: Any, pre_activation: str | None, activation: str | None) -> None:
        """Sets what PyTorch's constructor does not know; `own_padding` is the padding that it can't express."""
        if isinstance(own_padding, str):
            self.padding = own_padding
        elif own_padding is not None:
            rows, columns = own_padding[:2], own_padding[2:]
            self.padding = (rows, columns) if self.conv_type is nn.Conv2d else columns
            self._reversed_padding_repeated_twice = [*columns, *(rows if self.conv_type is nn.Conv2d else ())]
        self.pre_activation = check_activation("pre_activation", pre_activation)
        self.activation = check_activation("activation", activation)

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self)

    def extra_repr(self) -> str:
        shown = [super().extra_repr()]
        shown += [f"{name}={getattr(self, name)!r}" for name in ("pre_activation", "activation") if getattr(self, name)]
        return ", ".join(shown)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d | nn.Conv1d, *, pre_activation: str | None = None, activation: str | None = None
    ) -> DepthwiseConv:
        """A module with an existing convolution's parameters, which are shared, not copied, and its options.

        Raises:
            TypeError: a `conv` that is no convolution of as many dimensions.
            ValueError: a `conv` that is not depthwise.
        """
        if not isinstance(conv, cls.conv_type):
            raise TypeError(f"conv: expected an nn.{cls.conv_type.__name__}, got {type(conv).__name__}")
        if conv.groups != conv.in_channels:
            raise ValueError(
                f"conv: expected as many groups as input channels ({conv.in_channels}), got groups = {conv.groups}"
            )
        module = cls(
            conv.in_channels,
            conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
            bias=False,
            depth_multiplier=conv.out_channels // conv.in_channels,
            padding_mode=conv.padding_mode,
            pre_activation=pre_activation,
            activation=activation,
            device="meta",
        )
        module.padding = conv.padding
        module._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        module.weight, module.bias = conv.weight, conv.bias
        return module.train(conv.training)


class DepthwiseConv2d(DepthwiseConv, nn.Conv2d):
    """A depthwise convolution: ``y = act(depthwise(pre_act(x)) + bias)``, every channel with kernels of its own.

    It is an `nn.Conv2d` with as many groups as channels, and has its parameters (`weight`, (C * m, 1, kh, kw), and
    `bias`) and attributes: a state dict of the one loads into the other, initialisers and optimisers see what they
    know, and hooks, pruning and parametrisations work as on any module.

    Args:
        in_channels: C.
        kernel_size, stride, dilation: in pixels; an int or (vertical, horizontal).
        padding: an int, (vertical, horizontal), ((top, bottom), (left, right)), "valid" or "same" (TensorFlow's rule,
            out = ceil(in / stride), for every stride).
        bias: a bias after the convolution.
        depth_multiplier: m, output channels per input channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        pre_activation, activation: None, "relu", "relu6", "elu", "silu", "hardswish" or "gelu": on the input and on the
            output.
        device, dtype: of the parameters.

    Shape: x (N, C, H, W) or (C, H, W); the result (N, C * m, out_h, out_w) or (C * m, out_h, out_w), in x's memory
    format.
    """

    conv_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | Pair,
        *unnamed: Any,
        stride: int | Pair = 1,
        padding: int | str | Pair | tuple[Pair, Pair] = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        depth_multiplier: int = 1,
        padding_mode: str = "zeros",
        pre_activation: str | None = None,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse_unnamed(type(self), unnamed)
        in_channels = integer("in_channels", in_channels, 1)
        stride = pair("stride", stride, 1)
        own_padding, conv_padding = divide(padding_form(padding), stride)
        super().__init__(
            in_channels,
            in_channels * integer("depth_multiplier", depth_multiplier, 1),
            pair("kernel_size", kernel_size, 1),
            stride,
            conv_padding,
            pair("dilation", dilation, 1),
            groups=in_channels,
            bias=bias,
            padding_mode=check_padding_mode(padding_mode),
            device=device,
            dtype=dtype,
        )
        self._finish(own_padding, pre_activation, activation)

    def call(self, x: Tensor) -> dict[str, Any]:
        x, padding = check_channels(x, self.groups), self.padding
        if self.padding_mode != "zeros":
            if not _pads_by_size(padding, self.stride):
                padding = padding_sides_of(self)
            # Activations work element by element, so the padding may come before the pre-activation.
            x = pad_image(x, padding, self.padding_mode, self.kernel_size, self.stride, self.dilation)
            padding = 0
        return {
            "x": x,
            "weight": self.weight,
            "bias": self.bias,
            "stride": self.stride,
            "padding": padding,
            "dilation": self.dilation,
            "pre_activation": self.pre_activation,
            "activation": self.activation,
        }


class DepthwiseConv1d(DepthwiseConv, nn.Conv1d):
    """`DepthwiseConv2d` for sequences: an `nn.Conv1d` with as many groups as channels, run as an image of one row.

    Args: as `DepthwiseConv2d`'s, in one dimension. padding may also be (before, after): (kernel_size - 1, 0) is causal.

    Shape: x (N, C, L) or (C, L); the result (N, C * m, out) or (C * m, out). Where the channels of x are its fastest
    dimension (a transposed (N, L, C)), so are the result's.
    """

    conv_type = nn.Conv1d

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int],
        *unnamed: Any,
        stride: int | tuple[int] = 1,
        padding: int | str | tuple[int] | Pair = 0,
        dilation: int | tuple[int] = 1,
        bias: bool = True,
        depth_multiplier: int = 1,
        padding_mode: str = "zeros",
        pre_activation: str | None = None,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse_unnamed(type(self), unnamed)
        in_channels = integer("in_channels", in_channels, 1)
        stride = _single("stride", stride, 1)
        own_padding, conv_padding = divide(padding_form(_in_a_row(padding)), (1, stride))
        super().__init__(
            in_channels,
            in_channels * integer("depth_multiplier", depth_multiplier, 1),
            _single("kernel_size", kernel_size, 1),
            stride,
            conv_padding[1] if isinstance(conv_padding, tuple) else conv_padding,
            _single("dilation", dilation, 1),
            groups=in_channels,
            bias=bias,
            padding_mode=check_padding_mode(padding_mode),
            device=device,
            dtype=dtype,
        )
        self._finish(own_padding, pre_activation, activation)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-2)

    def call(self, x: Tensor) -> dict[str, Any]:
        x = _row(check_channels(x, self.groups, 1))
        padding, stride, dilation = _in_a_row(self.padding), (1, *self.stride), (1, *self.dilation)
        if self.padding_mode != "zeros":
            if not _pads_by_size(padding, stride):
                padding = 0, 0, *self._reversed_padding_repeated_twice
            x, padding = pad_image(x, padding, self.padding_mode, (1, *self.kernel_size), stride, dilation), 0
        return {
            "x": x,
            "weight": self.weight.unsqueeze(-2),
            "bias": self.bias,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "pre_activation": self.pre_activation,
            "activation": self.activation,
        }


def _pads_by_size(padding: Any, stride: tuple[int, ...]) -> bool:
    """Whether the sizes of x decide a padding: "same" with a stride, which PyTorch's modules do not know."""
    return padding == "same" and any(step != 1 for step in stride)


def _refuse_unnamed(kind: type, unnamed: tuple) -> None:
    """A third argument may be meant as `nn.Conv2d`'s kernel_size, after out_channels: stride goes by name."""
    if unnamed:
        raise TypeError(
            f"stride: expected by name, {kind.__name__}(in_channels, kernel_size, stride=...), got {unnamed!r} after "
            "kernel_size; there is no out_channels, it is in_channels * depth_multiplier"
        )


def _single(name: str, value: Any, minimum: int) -> int:
    """An int, or a tuple of one, as an int."""
    return integer(name, value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value, minimum)


def _in_a_row(padding: Any) -> Any:
    """The padding of a sequence as that of an image of one row."""
    if isinstance(padding, str):
        return padding
    before, after = (
        padding * 2 if isinstance(padding, (tuple, list)) and len(padding) == 1 else pair("padding", padding, 0)
    )
    return (0, 0), (before, after)


@torch.fx.wrap
def _row(x: Tensor) -> Tensor:
    """A sequence as an image of one row."""
    shape = TensorSpec.of("x", x).shape
    if len(shape) not in (2, 3):
        raise ValueError(f"x: expected (N, C, L) or (C, L), got {tuple(shape)}")
    return x.unsqueeze(-2)
