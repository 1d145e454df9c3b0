"""The hypothesis behind Xception, as modules: Figures 1 to 4 of the paper (https://arxiv.org/abs/1610.02357).

An Inception module looks at correlations across channels with 1 x 1 convolutions, and at those across space with 3 x 3
convolutions of a few channels each. Its simplified form (Figure 2) is one 1 x 1 convolution whose result is cut into
segments, with a 3 x 3 convolution in each (Figure 3). One segment makes it a regular convolution; a segment for every
channel (Figure 4) separates the two kinds of correlation entirely. In between lies a spectrum.

Figure 4 is a depthwise separable convolution but for the order of its two halves, which does not matter where modules
are stacked.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_sepconv.ops.arguments import check_activation, integer
from fused_sepconv.tensors.activations import ACTIVATIONS


class InceptionModule(nn.Module):
    """Figure 1, the canonical module of Inception V3: four towers side by side.

    1 x 1; 1 x 1 and 3 x 3; 1 x 1, 3 x 3 and 3 x 3; average pooling and 1 x 1. Each convolution has a ReLU after it.

    Args:
        in_channels: C.
        tower_channels: of each tower's result, and between its convolutions.
        device, dtype: of the parameters, as in all modules here.

    Shape: (N, C, H, W) -> (N, 4 * tower_channels, H, W).
    """

    def __init__(self, in_channels: int, tower_channels: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        channels, width = integer("in_channels", in_channels, 1), integer("tower_channels", tower_channels, 1)
        conv = partial(_relu_conv, device=device, dtype=dtype)
        self.tower1 = conv(channels, width, 1)
        self.tower2 = nn.Sequential(conv(channels, width, 1), conv(width, width, 3))
        self.tower3 = nn.Sequential(conv(channels, width, 1), conv(width, width, 3), conv(width, width, 3))
        self.tower4 = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), conv(channels, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower1(x), self.tower2(x), self.tower3(x), self.tower4(x)], 1)


class GoogLeNetModule(nn.Module):
    """GoogLeNet's module (https://arxiv.org/abs/1409.4842, Figure 2): 1 x 1, 3 x 3, 5 x 5 and a max-pooling.

    They are side by side. Each convolution has a ReLU after it.

    Args:
        in_channels: C.
        channels: of the 1 x 1, the 3 x 3 and the 5 x 5 convolution.
        reductions: None is the naive module, whose pooling keeps all C channels; else the channels of the 1 x 1
            convolutions before the 3 x 3, before the 5 x 5 and after the pooling.

    Shape: (N, C, H, W) -> (N, sum(channels) + (C or reductions[2]), H, W).
    """

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, int, int],
        reductions: tuple[int, int, int] | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        fan_in = integer("in_channels", in_channels, 1)
        one, three, five = _three("channels", channels)
        conv = partial(_relu_conv, device=device, dtype=dtype)
        pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.tower1 = conv(fan_in, one, 1)
        if reductions is None:
            self.tower2, self.tower3, self.tower4 = conv(fan_in, three, 3), conv(fan_in, five, 5), pool
        else:
            before3, before5, after_pool = _three("reductions", reductions)
            self.tower2 = nn.Sequential(conv(fan_in, before3, 1), conv(before3, three, 3))
            self.tower3 = nn.Sequential(conv(fan_in, before5, 1), conv(before5, five, 5))
            self.tower4 = nn.Sequential(pool, conv(fan_in, after_pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower1(x), self.tower2(x), self.tower3(x), self.tower4(x)], 1)


class SimplifiedInception(nn.Module):
    """Figure 2: towers of a 1 x 1 and a 3 x 3 convolution each, side by side.

    Args:
        in_channels: C.
        out_channels: F, a multiple of `segments`; the towers' 1 x 1 convolutions have as many together.
        segments: towers.
        mid_activation: between the two convolutions, as `SeparableConv2d`'s.

    Shape: (N, C, H, W) -> (N, F, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        segments: int = 3,
        *,
        mid_activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        width = _segment_width(out_channels, segments)
        channels = integer("in_channels", in_channels, 1)
        self.mid_activation = check_activation("mid_activation", mid_activation)
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, width, 1, bias=False, **factory) for _ in range(segments))
        self.spatial = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False, **factory) for _ in range(segments)
        )

    def forward(self, x: Tensor) -> Tensor:
        mid = ACTIVATIONS[self.mid_activation].forward
        towers = zip(self.pointwise, self.spatial, strict=True)
        return torch.cat([spatial(mid(pointwise(x))) for pointwise, spatial in towers], 1)


class SegmentedInception(nn.Module):
    """Figure 3, and with a segment a channel Figure 4: one 1 x 1 convolution, then a 3 x 3 one in each segment of it.

    Args:
        in_channels: C.
        out_channels: F, a multiple of `segments`.
        segments: 1 is a regular convolution, `out_channels` the "extreme" form: one spatial convolution a channel.
        mid_activation: between the two convolutions, as `SeparableConv2d`'s.

    Shape: (N, C, H, W) -> (N, F, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        segments: int,
        *,
        mid_activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        _segment_width(out_channels, segments)
        self.mid_activation = check_activation("mid_activation", mid_activation)
        self.pointwise = nn.Conv2d(integer("in_channels", in_channels, 1), out_channels, 1, bias=False, **factory)
        self.spatial = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=segments, bias=False, **factory)

    @classmethod
    def of(cls, simplified: SimplifiedInception) -> SegmentedInception:
        """The equivalent of a `SimplifiedInception`, with copies of its weights."""
        weights = [torch.cat([conv.weight for conv in convs]) for convs in (simplified.pointwise, simplified.spatial)]
        channels, features = weights[0].shape[1], weights[0].shape[0]
        module = cls(
            channels,
            features,
            len(simplified.spatial),
            mid_activation=simplified.mid_activation,
            device=weights[0].device,
            dtype=weights[0].dtype,
        )
        with torch.no_grad():
            module.pointwise.weight.copy_(weights[0])
            module.spatial.weight.copy_(weights[1])
        return module

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(ACTIVATIONS[self.mid_activation].forward(self.pointwise(x)))


class ExtremeInception(SegmentedInception):
    """Figure 4: a 1 x 1 convolution, then one 3 x 3 convolution for each channel of its result.

    Args:
        mid_activation: None, "relu" or another; Inception has a ReLU after each operation, Xception none here.
        activation: the same, after the spatial convolution.
        norm: whether a BatchNorm follows each convolution, before its activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mid_activation: str | None = None,
        activation: str | None = None,
        norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, out_channels, mid_activation=mid_activation, **factory)
        self.activation = check_activation("activation", activation)
        self.mid_norm = nn.BatchNorm2d(out_channels, **factory) if norm else nn.Identity()
        self.norm = nn.BatchNorm2d(out_channels, **factory) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        t = ACTIVATIONS[self.mid_activation].forward(self.mid_norm(self.pointwise(x)))
        return ACTIVATIONS[self.activation].forward(self.norm(self.spatial(t)))


class SegmentedSeparableConv2d(nn.Module):
    """`SeparableConv2d` with fewer segments than channels: a spatial convolution in each segment, then a 1 x 1 one.

    One segment is a regular convolution before the 1 x 1; a segment a channel would be `SeparableConv2d`. Where the
    channels do not divide, the first segments have one channel more.

    Args:
        segments: 1 to `in_channels`.
        (others): `SeparableConv2d`'s.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        segments: int,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
        pre_activation: str | None = None,
        mid_activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        channels, segments = integer("in_channels", in_channels, 1), integer("segments", segments, 1)
        if segments > channels:
            raise ValueError(f"segments: expected at most in_channels = {channels}, got {segments}")
        narrow, more = divmod(channels, segments)
        # Segments of the same width are the groups of one convolution: there are at most two.
        parts = [
            (groups, groups * width) for groups, width in ((more, narrow + 1), (segments - more, narrow)) if groups
        ]
        self.widths = [width for _, width in parts]
        factory = {"device": device, "dtype": dtype}
        spatial = {"padding": padding, "dilation": dilation, "bias": False, **factory}
        self.spatial = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size, groups=groups, **spatial) for groups, width in parts
        )
        self.pointwise = nn.Conv2d(channels, integer("out_channels", out_channels, 1), 1, bias=bias, **factory)
        self.pre_activation = check_activation("pre_activation", pre_activation)
        self.mid_activation = check_activation("mid_activation", mid_activation)

    def forward(self, x: Tensor) -> Tensor:
        pieces = ACTIVATIONS[self.pre_activation].forward(x).split(self.widths, 1)
        t = torch.cat([conv(piece) for conv, piece in zip(self.spatial, pieces, strict=True)], 1)
        return self.pointwise(ACTIVATIONS[self.mid_activation].forward(t))


def _relu_conv(fan_in: int, features: int, size: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(fan_in, features, size, padding=size // 2, bias=False, **factory), nn.ReLU())


def _three(name: str, values: Any) -> list[int]:
    if not isinstance(values, tuple | list) or len(values) != 3:
        raise ValueError(f"{name}: expected three numbers of channels, got {values!r}")
    return [integer(name, value, 1) for value in values]


def _segment_width(out_channels: int, segments: int) -> int:
    features, segments = integer("out_channels", out_channels, 1), integer("segments", segments, 1)
    if features % segments:
        raise ValueError(f"segments: expected a divisor of out_channels = {features}, got {segments}")
    return features // segments
