"""The one table of problems that every test draws from, and the definition that they are held against.

A case is a named call of ``separable_conv2d``: it says its sizes and options, and makes its tensors from a seed. The
definition, ``two_convolutions``, is written here from plain PyTorch operators and shares nothing with the package: in
float64 it is the oracle, in the dtype under test it is the eager result that sets the yardstick. ``depthwise(cases)``
are the depthwise halves of cases, calls of ``depthwise_conv2d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(vertical, horizontal) of an option that is given as one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's rule: ceil(size / stride) outputs, and what padding is odd goes after."""
    out = math.ceil(size / stride)
    total = max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def four_sides(
    padding: Any, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of any form that padding may take."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        top, bottom = same_padding(size[0], kernel[0], stride[0], dilation[0])
        left, right = same_padding(size[1], kernel[1], stride[1], dilation[1])
        return (top, bottom, left, right)
    vertical, horizontal = pair(padding)
    return (*pair(vertical), *pair(horizontal))


def depthwise_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """What ``depthwise_conv2d`` means, as the grouped convolution that it replaces."""
    stride, dilation = pair(stride), pair(dilation)
    kernel = (weight.shape[-2], weight.shape[-1])
    top, bottom, left, right = four_sides(padding, (x.shape[-2], x.shape[-1]), kernel, stride, dilation)
    image = F.pad(ACTIVATIONS[pre_activation](x), (left, right, top, bottom))
    return ACTIVATIONS[activation](F.conv2d(image, weight, bias, stride, 0, dilation, groups=x.shape[-3]))


def normalised_convolution(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    pre_activation: str | None = None,
) -> Tensor:
    """The depthwise convolution of scale * x + shift, which is made in float32 where x is narrower."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (each.to(wide).view(-1, 1, 1) for each in (scale, shift))
    affine = (scale * x.to(wide) + shift).to(x.dtype)
    return depthwise_convolution(affine, weight, bias, stride, padding, dilation, pre_activation=pre_activation)


def two_convolutions(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    depthwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    pointwise: Callable[..., Tensor] = F.conv2d,
) -> Tensor:
    """What ``separable_conv2d`` means, as the two convolutions that it replaces; the second may be another's."""
    between = depthwise_convolution(
        x, depthwise_weight, depthwise_bias, stride, padding, dilation,
        pre_activation=pre_activation, activation=mid_activation,
    )  # fmt: skip
    z = pointwise(between, pointwise_weight, bias)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


@dataclass(frozen=True)
class Case:
    """One problem. N is None where the input has no batch dimension."""

    name: str
    N: int | None
    C: int
    H: int
    W: int
    F: int
    kernel: int | tuple[int, int] = 3
    multiplier: int = 1
    stride: int | tuple[int, int] = 1
    padding: Any = 1
    dilation: int | tuple[int, int] = 1
    bias: bool = False
    depthwise_bias: bool = False
    residual: bool = False
    pre_activation: str | None = None
    mid_activation: str | None = None
    activation: str | None = None

    operator: ClassVar[str] = "separable_conv2d"
    definition: ClassVar[Callable[..., Tensor]] = staticmethod(two_convolutions)
    inputs: ClassVar[tuple[str, ...]] = (
        "x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual"
    )  # fmt: skip
    activations: ClassVar[tuple[str, ...]] = ("pre_activation", "mid_activation", "activation")

    def __str__(self) -> str:
        return self.name

    @property
    def K(self) -> int:
        """Channels between the two convolutions."""
        return self.C * self.multiplier

    @property
    def output_size(self) -> tuple[int, int]:
        kernel, stride, dilation = pair(self.kernel), pair(self.stride), pair(self.dilation)
        sides = four_sides(self.padding, (self.H, self.W), kernel, stride, dilation)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        return (
            (self.H + sides[0] + sides[1] - reach[0]) // stride[0] + 1,
            (self.W + sides[2] + sides[3] - reach[1]) // stride[1] + 1,
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (() if self.N is None else (self.N,)) + (self.C, self.H, self.W)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (() if self.N is None else (self.N,)) + (self.F, *self.output_size)

    @property
    def multiplications(self) -> int:
        """How many products the forward makes: what a run costs."""
        n = 1 if self.N is None else self.N
        kernel = pair(self.kernel)
        return n * math.prod(self.output_size) * self.K * (kernel[0] * kernel[1] + self.F)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that are not tensors."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", *self.activations)}

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """The tensor arguments, float64 on the CPU; those that the case does not have are missing.

        Weights are scaled so that every stage has about the spread of x: 1, or 4 where an activation bends again away
        from zero (relu6 at 6, hardswish at -3 and 3), so that values fall on every side of the bends.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        bends = {"relu6", "hardswish"} & {self.pre_activation, self.mid_activation, self.activation}
        spread, gain = (4.0, 3.0) if bends else (1.0, 1.0)
        kh, kw = pair(self.kernel)
        tensors = {
            "x": normal(*self.x_shape, scale=spread),
            "depthwise_weight": normal(self.K, 1, kh, kw, scale=gain / math.sqrt(kh * kw)),
            "pointwise_weight": normal(self.F, self.K, 1, 1, scale=gain / math.sqrt(self.K)),
        }
        if self.bias:
            tensors["bias"] = normal(self.F, scale=spread)
        if self.depthwise_bias:
            tensors["depthwise_bias"] = normal(self.K, scale=spread)
        if self.residual:
            tensors["residual"] = normal(*self.output_shape, scale=spread)
        return tensors


@dataclass(frozen=True)
class DepthwiseCase(Case):
    """A call of ``depthwise_conv2d``. F is C * multiplier, and bias and activation are this convolution's own."""

    operator: ClassVar[str] = "depthwise_conv2d"
    definition: ClassVar[Callable[..., Tensor]] = staticmethod(depthwise_convolution)
    inputs: ClassVar[tuple[str, ...]] = ("x", "weight", "bias")
    activations: ClassVar[tuple[str, ...]] = ("pre_activation", "activation")

    def __str__(self) -> str:
        return f"depthwise: {self.name}"

    @property
    def multiplications(self) -> int:
        return math.prod(self.output_shape) * math.prod(pair(self.kernel))

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        tensors = super().tensors(seed)
        tensors["weight"] = tensors.pop("depthwise_weight")
        return {name: tensors[name] for name in self.inputs if name in tensors}


def depthwise(cases: Sequence[Case]) -> tuple[DepthwiseCase, ...]:
    """The depthwise half of each case, those that differ: of several that are alike, the first."""
    halves: dict[DepthwiseCase, DepthwiseCase] = {}
    for case in cases:
        half = DepthwiseCase(
            case.name, case.N, case.C, case.H, case.W, case.K, case.kernel, case.multiplier, case.stride, case.padding,
            case.dilation, bias=case.depthwise_bias, pre_activation=case.pre_activation, activation=case.mid_activation,
        )  # fmt: skip
        halves.setdefault(replace(half, name=""), half)
    return tuple(halves.values())


@dataclass(frozen=True)
class NormalisedCase(DepthwiseCase):
    """A depthwise convolution of a tensor that is scaled and shifted first, by a channel's own, 0 and negative too."""

    operator: ClassVar[str] = "normalised_depthwise"
    definition: ClassVar[Callable[..., Tensor]] = staticmethod(normalised_convolution)
    inputs: ClassVar[tuple[str, ...]] = ("x", "scale", "shift", "weight", "bias")
    activations: ClassVar[tuple[str, ...]] = ("pre_activation",)

    def __str__(self) -> str:
        return f"normalised: {self.name}"

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        tensors = super().tensors(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        for name in ("scale", "shift"):
            tensors[name] = torch.randn(self.C, generator=generator, dtype=torch.float64)
        tensors["scale"][1::5] = 0.0
        return {name: tensors[name] for name in self.inputs if name in tensors}


def normalised(cases: Sequence[DepthwiseCase]) -> tuple[NormalisedCase, ...]:
    """The same depthwise convolutions of a normalised tensor; without the activation of their result."""
    return tuple(
        NormalisedCase(**{**{field.name: getattr(case, field.name) for field in fields(case)}, "activation": None})
        for case in cases
    )


def joined_norm(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, other: Tensor, *, pooled: bool) -> Tensor:
    """BatchNorm of x, by its own statistics, then perhaps a max-pooling, and an addition."""
    u = F.batch_norm(x, None, None, norm_weight, norm_bias, training=True)
    return (F.max_pool2d(u, 3, 2, 1) if pooled else u) + other


@dataclass(frozen=True)
class JoinCase(Case):
    """A BatchNorm joined to what follows it."""

    pooled: bool = False

    operator: ClassVar[str] = "norm_join"
    definition: ClassVar[Callable[..., Tensor]] = staticmethod(joined_norm)
    inputs: ClassVar[tuple[str, ...]] = ("x", "norm_weight", "norm_bias", "other")
    activations: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        return {"pooled": self.pooled}

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """The values of a window lie well apart, and so do they normalised: rounding picks no other one."""
        generator = torch.Generator().manual_seed(seed)
        size = ((self.H + 1) // 2, (self.W + 1) // 2) if self.pooled else (self.H, self.W)
        shapes = (self.x_shape, (self.C,), (self.C,), (self.N, self.C, *size))
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in zip(self.inputs, shapes, strict=True)
        }
        place = (torch.arange(self.H).view(-1, 1) % 3 * 3 + torch.arange(self.W) % 3) * 2 % 9
        tensors["x"] = place / 2.0 - 2 + tensors["x"] / 50
        tensors["norm_weight"] += tensors["norm_weight"].sign() / 2
        return tensors


# The ten distinct layers of Xception (34 in all), at their full size and one image. "relu" stands where the network
# has an activation right before the convolution.
XCEPTION = (
    Case("64->128@147", 1, 64, 147, 147, 128),
    Case("128->128@147", 1, 128, 147, 147, 128, pre_activation="relu"),
    Case("128->256@74", 1, 128, 74, 74, 256, pre_activation="relu"),
    Case("256->256@74", 1, 256, 74, 74, 256, pre_activation="relu"),
    Case("256->728@37", 1, 256, 37, 37, 728, pre_activation="relu"),
    Case("728->728@37", 1, 728, 37, 37, 728, pre_activation="relu"),
    Case("728->728@19", 2, 728, 19, 19, 728, pre_activation="relu"),
    Case("728->1024@19", 2, 728, 19, 19, 1024, pre_activation="relu"),
    Case("1024->1536@10", 2, 1024, 10, 10, 1536, activation="relu"),
    Case("1536->2048@10", 2, 1536, 10, 10, 2048, activation="relu"),
)

# The same with an eighth of the channels (of 728: 88, which like it leaves 8 over after 16s) on smaller images of the
# same parity, for quick runs.
XCEPTION_REDUCED = (
    Case("64->128@147 reduced", 2, 8, 21, 21, 16),
    Case("128->128@147 reduced", 2, 16, 21, 21, 16, pre_activation="relu"),
    Case("128->256@74 reduced", 2, 16, 10, 10, 32, pre_activation="relu"),
    Case("256->256@74 reduced", 2, 32, 10, 10, 32, pre_activation="relu"),
    Case("256->728@37 reduced", 2, 32, 9, 9, 88, pre_activation="relu"),
    Case("728->728@37 reduced", 2, 88, 9, 9, 88, pre_activation="relu"),
    Case("728->728@19 reduced", 2, 88, 5, 5, 88, pre_activation="relu"),
    Case("728->1024@19 reduced", 2, 88, 5, 5, 128, pre_activation="relu"),
    Case("1024->1536@10 reduced", 1, 128, 4, 4, 192, activation="relu"),
    Case("1536->2048@10 reduced", 1, 192, 4, 4, 256, activation="relu"),
)

# One idea a case; all small enough for gradcheck.
SMALL = (
    Case("plain", 2, 3, 5, 5, 4),
    Case("biases", 2, 3, 5, 5, 4, bias=True, depthwise_bias=True),
    Case("residual", 2, 3, 5, 5, 4, residual=True),
    Case("all six tensors", 2, 3, 4, 5, 4, bias=True, depthwise_bias=True, residual=True),
    Case("residual before the activation", 2, 3, 4, 4, 4, bias=True, residual=True, activation="relu"),
    # images
    Case("odd sizes", 1, 3, 7, 5, 5),
    Case("wide", 1, 2, 2, 13, 3),
    Case("tall", 1, 2, 13, 2, 3),
    Case("1x1 image", 2, 4, 1, 1, 3, bias=True),
    Case("1x1 image and kernel", 3, 4, 1, 1, 5, kernel=1, padding=0, depthwise_bias=True),
    Case("one row", 2, 3, 1, 9, 4, kernel=(1, 3), padding=(0, 1)),
    Case("one column", 2, 3, 9, 1, 4, kernel=(3, 1), padding=(1, 0)),
    Case("one row under a square kernel", 1, 3, 1, 6, 2),
    Case("kernel larger than the image", 2, 3, 2, 3, 4, kernel=5, padding=2),
    Case("image wholly inside the kernel", 1, 2, 3, 3, 2, kernel=7, padding=(2, 3)),
    Case("windows in the padding alone", 1, 2, 2, 2, 3, kernel=2, padding=3, bias=True, depthwise_bias=True),
    # batch
    Case("batch 0", 0, 3, 5, 5, 4, bias=True, depthwise_bias=True, residual=True, activation="relu"),
    Case("batch 0, strided", 0, 3, 6, 5, 4, stride=2),
    Case("batch 5", 5, 2, 3, 3, 3),
    Case("unbatched", None, 3, 5, 4, 4, bias=True),
    Case(
        "unbatched, everything", None, 3, 5, 4, 4, stride=(2, 1), padding=((0, 1), (2, 0)), multiplier=2, bias=True,
        depthwise_bias=True, residual=True, pre_activation="silu", mid_activation="elu", activation="relu",
    ),
    # channels
    Case("one channel", 2, 1, 5, 5, 1),
    Case("one channel to many", 1, 1, 4, 4, 9, bias=True),
    Case("many channels to one", 1, 9, 4, 4, 1, depthwise_bias=True),
    Case("one over eight", 1, 9, 3, 3, 9),
    Case("one under eight", 1, 7, 3, 3, 7),
    Case("one over sixteen", 1, 17, 2, 3, 17),
    Case("depth multiplier 2", 2, 3, 5, 4, 4, multiplier=2),
    Case("depth multiplier 3", 1, 2, 4, 5, 5, multiplier=3, bias=True, depthwise_bias=True),
    Case("depth multiplier on one channel", 1, 1, 4, 4, 3, multiplier=4, stride=2),
    # kernels
    Case("1x1 kernel", 2, 3, 4, 4, 4, kernel=1, padding=0),
    Case("1x1 kernel, strided and padded", 1, 3, 4, 5, 4, kernel=1, stride=2, padding=1, bias=True),
    Case("2x2 kernel", 1, 3, 5, 5, 4, kernel=2, padding=0),
    Case("4x4 kernel", 1, 2, 6, 6, 3, kernel=4, padding=((1, 2), (1, 2))),
    Case("5x5 kernel", 1, 2, 6, 6, 3, kernel=5, padding=2),
    Case("7x7 kernel", 1, 2, 7, 7, 3, kernel=7, padding=3),
    Case("1x5 kernel", 1, 3, 4, 6, 3, kernel=(1, 5), padding=(0, 2)),
    Case("5x2 kernel", 1, 3, 6, 5, 3, kernel=(5, 2), padding=(2, 1)),
    # stride
    Case("stride 2", 2, 3, 6, 6, 4, stride=2),
    Case("stride 2, odd size", 1, 3, 7, 7, 4, stride=2),
    Case("stride 3", 1, 3, 8, 7, 4, stride=3),
    Case("stride larger than the kernel", 1, 3, 9, 8, 4, kernel=2, stride=4, padding=0),
    Case("stride larger than the image", 1, 3, 4, 4, 4, stride=5),
    Case("vertical stride", 1, 3, 7, 5, 4, stride=(2, 1)),
    Case("horizontal stride", 1, 3, 5, 7, 4, stride=(1, 3)),
    # dilation
    Case("dilation 2", 1, 3, 7, 7, 4, padding=2, dilation=2),
    Case("dilation 3, no padding", 1, 2, 8, 8, 3, padding=0, dilation=3),
    Case("vertical dilation", 1, 3, 7, 5, 4, padding=(2, 1), dilation=(2, 1)),
    Case("dilation beyond the image", 1, 2, 3, 3, 3, padding=4, dilation=4, bias=True),
    Case("dilation and stride", 1, 3, 9, 8, 4, stride=(2, 3), padding=(2, 1), dilation=(2, 1)),
    # padding
    Case("no padding", 2, 3, 5, 5, 4, padding=0),
    Case("valid", 1, 3, 5, 6, 4, padding="valid"),
    Case("valid, stride 2", 1, 3, 6, 7, 4, padding="valid", stride=2),
    Case("same", 1, 3, 5, 6, 4, padding="same"),
    Case("same, even kernel", 1, 3, 5, 6, 4, padding="same", kernel=(2, 4)),
    Case("same, stride 2, even size", 1, 3, 6, 6, 4, padding="same", stride=2),
    Case("same, stride 2, odd size", 1, 3, 7, 5, 4, padding="same", stride=2),
    Case("same, stride 3", 1, 3, 8, 7, 4, padding="same", stride=3),
    Case("same, stride 2, dilation 2", 1, 2, 8, 7, 3, padding="same", stride=2, dilation=2),
    Case("same, stride larger than the kernel", 1, 3, 7, 8, 4, padding="same", kernel=2, stride=3),
    Case("padding of a pair", 1, 3, 5, 4, 4, padding=(0, 2)),
    Case("top alone", 1, 3, 5, 4, 4, padding=((2, 0), (0, 0))),
    Case("bottom alone", 1, 3, 5, 4, 4, padding=((0, 2), (0, 0))),
    Case("left alone", 1, 3, 5, 4, 4, padding=((0, 0), (2, 0))),
    Case("right alone", 1, 3, 5, 4, 4, padding=((0, 0), (0, 2))),
    Case("four different sides", 1, 2, 5, 4, 3, padding=((1, 3), (0, 2)), stride=(2, 1), depthwise_bias=True),
    Case("padding far beyond the kernel", 1, 2, 3, 3, 2, padding=((5, 0), (0, 6)), bias=True),
    # activations: each at all three places, then each place alone, then mixed
    Case("relu thrice", 2, 3, 4, 4, 4, pre_activation="relu", mid_activation="relu", activation="relu"),
    Case("relu6 thrice", 2, 3, 4, 4, 4, pre_activation="relu6", mid_activation="relu6", activation="relu6"),
    Case("elu thrice", 2, 3, 4, 4, 4, pre_activation="elu", mid_activation="elu", activation="elu"),
    Case("silu thrice", 2, 3, 4, 4, 4, pre_activation="silu", mid_activation="silu", activation="silu"),
    Case(
        "hardswish thrice", 2, 3, 4, 4, 4,
        pre_activation="hardswish", mid_activation="hardswish", activation="hardswish",
    ),
    Case("gelu thrice", 2, 3, 4, 4, 4, pre_activation="gelu", mid_activation="gelu", activation="gelu"),
    Case("relu before", 1, 3, 5, 4, 4, pre_activation="relu"),
    Case("gelu before", 1, 3, 5, 4, 4, pre_activation="gelu", bias=True),
    Case("relu between", 1, 3, 5, 4, 4, mid_activation="relu", depthwise_bias=True),
    Case("silu between", 1, 3, 5, 4, 4, mid_activation="silu"),
    Case("relu after", 1, 3, 5, 4, 4, activation="relu"),
    Case("relu6 after", 1, 3, 5, 4, 4, activation="relu6", bias=True),
    Case("elu after", 1, 3, 5, 4, 4, activation="elu", residual=True),
    Case("silu after", 1, 3, 5, 4, 4, activation="silu", bias=True, residual=True),
    Case("hardswish after", 1, 3, 5, 4, 4, activation="hardswish"),
    Case("gelu after", 1, 3, 5, 4, 4, activation="gelu", residual=True),
    Case(
        "three activations, both biases", 2, 2, 4, 5, 3, stride=(1, 2), bias=True, depthwise_bias=True,
        pre_activation="elu", mid_activation="gelu", activation="hardswish",
    ),
    Case(
        "everything", 2, 2, 5, 4, 3, kernel=(2, 3), multiplier=2, stride=(2, 1), padding=((1, 0), (2, 1)),
        dilation=(1, 2), bias=True, depthwise_bias=True, residual=True,
        pre_activation="relu", mid_activation="silu", activation="elu",
    ),
)  # fmt: skip

# Tails in every dimension that a kernel tiles: a little over and a little under powers of two, beyond one tile each.
TAILS = (
    Case("pixels: one over 64", 1, 8, 5, 13, 8),
    Case("pixels: one over 128", 1, 8, 3, 43, 8),
    Case("pixels: one under 128", 1, 8, 1, 127, 8),
    Case("pixels: many images of few", 37, 8, 2, 2, 8),
    Case("channels: 33", 1, 33, 6, 6, 16),
    Case("channels: 63", 1, 63, 6, 6, 16, pre_activation="relu"),
    Case("channels: 65", 1, 65, 6, 6, 16),
    Case("channels: 129", 1, 129, 4, 4, 16, depthwise_bias=True),
    Case("channels: 104", 1, 104, 5, 5, 24),
    Case("outputs: 33", 1, 16, 6, 6, 33, bias=True),
    Case("outputs: 65", 1, 16, 6, 6, 65),
    Case("outputs: 127", 1, 16, 4, 4, 127, residual=True),
    Case("outputs: 257", 1, 16, 4, 4, 257),
    Case("every dimension: one over", 3, 17, 9, 17, 65, bias=True, depthwise_bias=True, activation="relu"),
    Case("every dimension: one over, strided", 3, 17, 17, 33, 33, stride=2, padding="same", residual=True),
    Case("every dimension: depth multiplier", 2, 11, 9, 9, 35, multiplier=3, mid_activation="relu"),
    Case("5x5 on a wide image", 1, 12, 6, 70, 20, kernel=5, padding=2),
    Case("7x7 on a tall image", 1, 12, 70, 6, 20, kernel=7, padding=3, stride=(2, 1)),
    Case("dilation wider than a tile", 1, 8, 40, 40, 8, padding=12, dilation=12),
)

# What the fast depthwise kernels do that the other cases, of few channels, leave out: several chunks of channels and a
# part of one, strips and tiles side by side, every kernel size, strides, phases of a dilation, windows that are all
# padding.
DEPTHWISE = (
    Case("two images", 2, 64, 9, 9, 4),
    Case("a chunk and an eighth", 2, 72, 19, 19, 4, pre_activation="relu", depthwise_bias=True),
    Case("5x5, two tiles", 2, 40, 12, 45, 4, kernel=5, padding=2, mid_activation="silu"),
    Case("7x7", 1, 40, 9, 35, 4, kernel=7, padding=3, depthwise_bias=True, pre_activation="elu", mid_activation="gelu"),
    Case("stride 2, three tiles", 2, 40, 13, 85, 4, padding=((0, 1), (1, 0)), stride=2, depthwise_bias=True),
    Case("5x5, stride 2", 1, 40, 13, 15, 4, kernel=5, padding=((3, 1), (1, 4)), stride=2, pre_activation="hardswish"),
    Case("7x7, stride 2", 1, 40, 23, 15, 4, kernel=7, padding=((3, 1), (1, 4)), stride=2, depthwise_bias=True),
    Case("strips in the padding alone", 1, 8, 4, 5, 4, padding=((2, 0), (50, 9)), depthwise_bias=True),
    Case("and a mid-activation", 1, 8, 4, 5, 4, padding=((0, 3), (50, 9)), depthwise_bias=True, mid_activation="relu"),
    Case("dilation 2", 1, 40, 23, 15, 4, padding=2, dilation=2, depthwise_bias=True),
    Case("dilation 3, stride 2", 1, 40, 23, 15, 4, padding=2, dilation=3, stride=2, depthwise_bias=True),
    Case("dilation 2, stride 2", 1, 40, 23, 15, 4, padding=2, dilation=2, stride=2, depthwise_bias=True),
    Case("dilation across alone", 1, 16, 23, 15, 4, padding=0, dilation=(1, 2), depthwise_bias=True),
    Case("dilation, in bands", 2, 8, 75, 33, 4, padding=(3, 5), dilation=(3, 5), pre_activation="relu"),
    Case(
        "5x5, dilation", 3, 8, 21, 18, 4, kernel=5, padding=((3, 9), (7, 2)), dilation=(3, 2), pre_activation="silu",
        mid_activation="silu", depthwise_bias=True,
    ),
    Case("multiplier 2", 1, 40, 9, 9, 4, multiplier=2),
    Case("multiplier 3", 2, 40, 9, 9, 4, multiplier=3, depthwise_bias=True, pre_activation="relu6"),
    Case("windows in the padding alone", 1, 8, 3, 3, 2, padding=((5, 0), (0, 6)), depthwise_bias=True),
    Case("dilation beyond the image", 1, 8, 3, 3, 3, padding=4, dilation=4, depthwise_bias=True),
    Case("no padding", 1, 8, 6, 7, 3, padding=0, depthwise_bias=True, mid_activation="relu6"),
    Case("one pixel", 3, 8, 1, 1, 3, depthwise_bias=True),
    Case("many small images", 9, 8, 4, 3, 3, pre_activation="silu", mid_activation="relu"),
    # what planted bugs showed to be missing
    Case("two strips of several groups", 1, 40, 9, 45, 2, pre_activation="silu", depthwise_bias=True),
    Case("more channels than shared memory has weights", 1, 264, 3, 3, 2, kernel=5, stride=2, padding=2),
    Case("more outputs than threads", 7, 8, 13, 12, 2, pre_activation="silu", mid_activation="silu"),
    Case("parts that end inside strips", 3, 8, 27, 33, 2, pre_activation="relu", depthwise_bias=True),
    Case(
        "5x5, stride 2, in bands", 1, 8, 61, 33, 2, kernel=5, stride=2, padding=((2, 1), (4, 3)), mid_activation="relu"
    ),
    Case("parts of several bands", 6, 8, 61, 33, 2, pre_activation="silu", depthwise_bias=True),
    Case("bands beyond the image", 1, 8, 3, 33, 2, padding=((70, 70), (1, 1)), depthwise_bias=True),
    Case(
        "5x5, dilation 3, stride 2", 2, 8, 12, 11, 2, kernel=5, padding=(3, 2), dilation=3, stride=2,
        depthwise_bias=True,
    ),
    Case("two strides and dilations", 1, 8, 13, 9, 2, padding=(4, 3), dilation=(4, 3), stride=(2, 1)),
    Case("multiplier 7", 1, 8, 5, 6, 2, multiplier=7, depthwise_bias=True),
)  # fmt: skip

CASES = (*SMALL, *TAILS, *XCEPTION_REDUCED, *XCEPTION)

assert len({case.name for case in CASES}) == len(CASES)


def named(*names: str) -> tuple[Case, ...]:
    """The cases of these names, in this order."""
    by_name = {case.name: case for case in CASES}
    return tuple(by_name[name] for name in names)


def both(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Cases and their depthwise halves: for what is true of either operator."""
    return (*cases, *depthwise(cases))


# A case for each feature: what the quick tier runs, and what PyTorch's own convolutions are asked in every dtype.
FEATURES = named(
    "all six tensors", "1x1 image and kernel", "batch 0", "unbatched, everything", "depth multiplier 3",
    "four different sides", "same, stride 2, dilation 2", "gelu thrice", "everything", "every dimension: one over",
    "728->728@19 reduced",
)  # fmt: skip
FEATURES = both(FEATURES)
