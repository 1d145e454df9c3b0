"""The hypothesis behind Xception, as modules: Figures 1 to 4 of the paper (https://arxiv.org/abs/1610.02357).

An Inception module looks at correlations across channels with 1 x 1 convolutions, and at those across space with 3 x 3
convolutions of a few channels each. Its simplified form (Figure 2) is one 1 x 1 convolution whose result is cut into
segments, with a 3 x 3 convolution in each (Figure 3). One segment makes it a regular convolution; a segment for every
channel (Figure 4) separates the two kinds of correlation entirely. In between lies a spectrum.

Figure 4 is a depthwise separable convolution but for the order of its two halves, which does not matter where modules
are stacked.
"""

from __future__ import annotations

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

    Shape: (N, C, H, W) -> (N, 4 * tower_channels, H, W).
    """

    def __init__(self, in_channels: int, tower_channels: int, **factory: Any) -> None:
        super().__init__()
        channels, width = integer("in_channels", in_channels, 1), integer("tower_channels", tower_channels, 1)

        def conv(fan_in: int, size: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(fan_in, width, size, padding=size // 2, bias=False, **factory), nn.ReLU())

        self.tower1 = conv(channels, 1)
        self.tower2 = nn.Sequential(conv(channels, 1), conv(width, 3))
        self.tower3 = nn.Sequential(conv(channels, 1), conv(width, 3), conv(width, 3))
        self.tower4 = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), conv(channels, 1))

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
        **factory: Any,
    ) -> None:
        super().__init__()
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
        self, in_channels: int, out_channels: int, segments: int, *, mid_activation: str | None = None, **factory: Any
    ) -> None:
        super().__init__()
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
    """Figure 4: a 1 x 1 convolution, then one 3 x 3 convolution for each channel of its result."""

    def __init__(self, in_channels: int, out_channels: int, *, mid_activation: str | None = None, **factory: Any):
        super().__init__(in_channels, out_channels, out_channels, mid_activation=mid_activation, **factory)


def _segment_width(out_channels: int, segments: int) -> int:
    features, segments = integer("out_channels", out_channels, 1), integer("segments", segments, 1)
    if features % segments:
        raise ValueError(f"segments: expected a divisor of out_channels = {features}, got {segments}")
    return features // segments
