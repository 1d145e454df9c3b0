"""Xception: François Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017
(https://arxiv.org/abs/1610.02357), Figure 5.

36 convolution layers in 14 modules, of which all but the first and the last have a residual connection round them:

    entry    module1   3x3 convolutions, 32 / 2 and 64
             module2-4 two separable convolutions each, 128, 256 and 728, and a max-pooling / 2
    middle   module1-8 three separable convolutions each, 728
    exit     module1   two separable convolutions, 728 and 1024, and a max-pooling / 2
             module2   two separable convolutions, 1536 and 2048
    head               global pooling, optional fully-connected layers, dropout, logistic regression
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_sepconv.models.inception_spectrum import SegmentedSeparableConv2d
from fused_sepconv.models.max_pool import MaxPool3x3, check_padding
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops.arguments import integer
from fused_sepconv.transforms.batch_norm import fuse_batch_norm

SMALLEST_IMAGE = 7  # pixels a side: what the stem's two unpadded convolutions leave at least one pixel of

_POOLS = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}
_GLOBAL_POOLS = (*_POOLS, "")


class Stem(nn.Module):
    """The entry flow's first module: two plain 3 x 3 convolutions without padding, the first with stride 2."""

    def __init__(self, in_channels: int, widths: tuple[int, int] = (32, 64), *, norm: dict[str, Any], **factory: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=2, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(widths[0], **norm, **factory)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(widths[1], **norm, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


class SeparableStack(nn.Module):
    """Separable convolutions, each with a ReLU before and a BatchNorm after it; a max-pooling; a residual connection.

    The residual connection is the input itself where the shape stays, else a strided 1 x 1 convolution with BatchNorm.

    Args:
        widths: output channels of each separable convolution.
        activate_first: whether the first has a ReLU before it too.
        pool: the max-pooling, or None.
        stride: of the pooling, and so of the residual connection.
        residual: whether there is a residual connection.
        dilation: of the separable convolutions.
        segments: None for separable convolutions, else `SegmentedSeparableConv2d`'s.
        norm: eps and momentum of the BatchNorms.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        *,
        activate_first: bool = True,
        pool: nn.Module | None = None,
        stride: int = 1,
        residual: bool = True,
        dilation: int = 1,
        mid_activation: str | None = None,
        segments: int | None = None,
        norm: dict[str, Any],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.depth = len(widths)
        channels = in_channels
        for number, width in enumerate(widths, 1):
            separable = segments is None or segments >= channels
            convolution = SeparableConv2d if separable else partial(SegmentedSeparableConv2d, segments=segments)
            sepconv = convolution(
                channels,
                width,
                3,
                padding=dilation,
                dilation=dilation,
                bias=False,
                pre_activation="relu" if number > 1 or activate_first else None,
                mid_activation=mid_activation,
                **factory,
            )
            setattr(self, f"sepconv{number}", sepconv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(width, **norm, **factory))
            channels = width
        self.pool = pool
        self.residual = residual
        self.skip: nn.Module | None = None
        self.skip_bn: nn.Module | None = None
        if residual and (stride != 1 or channels != in_channels):
            self.skip = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False, **factory)
            self.skip_bn = nn.BatchNorm2d(channels, **norm, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"sepconv{number}")(y))
        if self.pool is not None:
            y = self.pool(y)
        if not self.residual:
            return y
        return y + (x if self.skip is None else self.skip_bn(self.skip(x)))


class Xception(nn.Module):
    """The network of the paper, on `SeparableConv2d`; every ReLU before a separable convolution is fused into it.

    22,855,952 trainable parameters at 1000 classes. The original takes (3, 299, 299) images scaled to [-1, 1].

    The result is logits. For one class an image, train with `cross_entropy`. For many labels an image (the paper's JFT
    setting, 17,000 classes), train with `binary_cross_entropy_with_logits` and read probabilities by
    `model(x).sigmoid()`; with so many classes it helps to begin at the labels' frequency p,
    `model.classifier.bias.fill_(log(p / (1 - p)))`.

    Args:
        num_classes: logits; with 0 the pooled features are the result.
        in_channels: of the image.
        dropout: probability, before the last layer. The paper has 0.5 on ImageNet and none on JFT.
        hidden_units: widths of fully-connected layers with ReLU before the last one (the paper's, on JFT: 4096, 4096).
        residual: False leaves the residual connections out (the paper's Figure 9).
        mid_activation: None, "relu" or "elu", between the depthwise and the pointwise convolution (Figure 10).
        segments: None, or how many segments of its input's channels each separable convolution has a spatial
            convolution for (the paper's Figure 3): 1 makes it a regular one, as many as channels leave it as it is.
        middle_blocks: modules in the middle flow.
        width: multiplies the number of channels everywhere (rounded to a multiple of 8, at least 8), `hidden_units`
            excepted: a slim network has the same layers.
        output_stride: 32, 16 or 8: below 32, the last strides become dilations, for dense prediction. With the same
            weights, every 2nd (4th) pixel of `forward_features` is what it was with a stride of 32.
        features_only: `forward` gives a list of the features at strides 2, 4, 8, 16 and 32, each after its ReLU (as
            `timm.create_model("legacy_xception", features_only=True)` does), and there is no head.
        bn_eps: added to variances. 1e-3 is Keras's, where the network comes from; timm's weights have 1e-5.
        bn_momentum: weight of a new batch in the running statistics; 0.1 is PyTorch's, 0.01 would be Keras's.
        pool_padding: of the max-poolings. "same" is TensorFlow's rule, for Keras's weights; "symmetric" is PyTorch's
            one pixel on every side, for timm's. They differ where a size is even.
        global_pool: "avg", "max", or "" for none.
        fuse_norm: whether BatchNorms run together with what reads their results (`fuse_batch_norm`).
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W), at least 7 pixels a side -> (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        dropout: float = 0.0,
        hidden_units: Sequence[int] = (),
        residual: bool = True,
        mid_activation: str | None = None,
        segments: int | None = None,
        middle_blocks: int = 8,
        width: float = 1.0,
        output_stride: int = 32,
        features_only: bool = False,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        pool_padding: str = "same",
        global_pool: str = "avg",
        fuse_norm: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = 0 if features_only else integer("num_classes", num_classes, 0)
        self.in_channels = integer("in_channels", in_channels, 1)
        self.hidden_units = tuple(integer("hidden_units", width, 1) for width in hidden_units)
        self.features_only = features_only
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout!r}")
        if not 0 < width < float("inf"):
            raise ValueError(f"width: expected a factor above 0, got {width!r}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride!r}")
        check_padding("pool_padding", pool_padding)
        self.global_pool = _check_global_pool(global_pool)
        if not global_pool and (self.num_classes or self.hidden_units) and not features_only:
            raise ValueError('global_pool: "" leaves an image of features, which needs num_classes=0, hidden_units=()')

        factory = {"device": device, "dtype": dtype}
        options = {"residual": residual, "mid_activation": mid_activation, "norm": {"eps": bn_eps}, **factory}
        options["norm"]["momentum"] = bn_momentum
        options["segments"] = None if segments is None else integer("segments", segments, 1)

        def slim(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        c32, c64, c128, c256, c728, c1024, c1536, c2048 = map(slim, (32, 64, 128, 256, 728, 1024, 1536, 2048))

        def strided(in_channels: int, widths: Sequence[int], reduction: int, **more: Any) -> SeparableStack:
            """A module that would halve the image, from `reduction` / 2 to `reduction`, unless that is too much."""
            stride = 2 if reduction <= output_stride else 1
            dilation = max(reduction // 2 // output_stride, 1)
            pool = MaxPool3x3(stride, pool_padding, dilation)
            return SeparableStack(in_channels, widths, pool=pool, stride=stride, dilation=dilation, **more, **options)

        self.entry = _flow(
            Stem(self.in_channels, (c32, c64), norm=options["norm"], **factory),
            strided(c64, (c128, c128), 4, activate_first=False),  # the stem ends in a ReLU
            strided(c128, (c256, c256), 8),
            strided(c256, (c728, c728), 16),
        )
        middle_dilation = max(16 // output_stride, 1)
        self.middle = _flow(
            *(
                SeparableStack(c728, (c728, c728, c728), dilation=middle_dilation, **options)
                for _ in range(integer("middle_blocks", middle_blocks, 0))
            )
        )
        last = {**options, "residual": False, "dilation": 32 // output_stride}
        self.exit = _flow(
            strided(c728, (c728, c1024), 32),
            SeparableStack(c1024, (c1536, c2048), activate_first=False, **last),
        )

        self.num_features = c2048
        taps = (
            ("entry.module1", c64),
            ("entry.module2", c128),
            ("entry.module3", c256),
            ("middle", c728),
            ("exit", c2048),
        )
        self.feature_info = [
            {"num_chs": channels, "reduction": min(2 << i, output_stride), "module": name}
            for i, (name, channels) in enumerate(taps)
        ]
        self.head_hidden_size = self.hidden_units[-1] if self.hidden_units else self.num_features
        widths = () if features_only else self.hidden_units
        hidden = (
            layer
            for fan_in, width in pairwise((self.num_features, *widths))
            for layer in (nn.Linear(fan_in, width, **factory), nn.ReLU(inplace=True))
        )
        self.hidden = nn.Sequential(*hidden)
        self.dropout = nn.Dropout(dropout)
        self.classifier = self._new_classifier(**factory)
        self.reset_parameters()
        if fuse_norm:
            fuse_batch_norm(self)

    def reset_parameters(self) -> None:
        """He's initialisation of every convolution and hidden layer; the last layer starts near 0."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                depthwise = name.endswith("depthwise") or ".spatial." in name  # its input had its ReLU's gain already
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if depthwise else "relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        _initialise_classifier(self.classifier)

    def forward(self, x: Tensor) -> Any:
        if self.features_only:
            return self._features(x)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_features, h, w), after the last ReLU."""
        x = _check_image(x, self.in_channels)
        return F.relu(self.exit(self.middle(self.entry(x))), inplace=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits, or, with `pre_logits`, what the last layer would get."""
        if self.global_pool:
            x = _POOLS[self.global_pool](x, 1).flatten(1)
        x = self.dropout(self.hidden(x))
        return x if pre_logits else self.classifier(x)

    def _features(self, x: Tensor) -> list[Tensor]:
        x = _check_image(x, self.in_channels)
        features = [self.entry.module1(x)]
        x = self.entry.module2(features[0])
        features.append(F.relu(x))
        x = self.entry.module3(x)
        features.append(F.relu(x))
        x = self.middle(self.entry.module4(x))
        features.append(F.relu(x))
        features.append(F.relu(self.exit(x), inplace=True))
        return features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's way to the features at the five strides: (the last, a list of those asked for), or the list alone.

        Args:
            indices: which of the five, also counted from behind; an int asks for the last so many; None for all.
            norm, stop_early: accepted for timm's sake; there is no last norm, and the whole network runs.
            output_fmt: "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt: expected "NCHW", got {output_fmt!r}')
        count = len(self.feature_info)
        wanted = range(count) if indices is None else indices
        wanted = range(count - wanted, count) if isinstance(wanted, int) else wanted
        if any(not -count <= index < count for index in wanted):
            raise ValueError(f"indices: expected 0 to {count - 1}, or as many, got {indices!r}")
        features = self._features(x)
        chosen = [features[index] for index in wanted]
        return chosen if intermediates_only else (features[-1], chosen)

    @property
    def pool_padding(self) -> str:
        """How the max-poolings pad: "same" or "symmetric". It belongs to the weights, and `models.weights` sets it."""
        return self.exit.module1.pool.padding

    @pool_padding.setter
    def pool_padding(self, value: str) -> None:
        for module in self.modules():
            if isinstance(module, MaxPool3x3):
                module.padding = check_padding("pool_padding", value)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, on the model's device and in its dtype; the hidden layers before it stay.

        Args:
            num_classes: logits; 0 for none.
            global_pool: "avg", "max", "" for none; None leaves it as it is.
        """
        if self.features_only:
            raise ValueError("features_only: a model of features alone has no classifier")
        num_classes = integer("num_classes", num_classes, 0)
        global_pool = self.global_pool if global_pool is None else _check_global_pool(global_pool)
        if not global_pool and (num_classes or self.hidden_units):
            raise ValueError('global_pool: "" leaves an image of features, which needs num_classes=0, hidden_units=()')
        self.global_pool, self.num_classes = global_pool, num_classes
        like = self.entry.module1.conv1.weight
        self.classifier = self._new_classifier(device=like.device, dtype=like.dtype).train(self.training)
        _initialise_classifier(self.classifier)

    def _new_classifier(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.head_hidden_size, self.num_classes, **factory) if self.num_classes else nn.Identity()


def xception(num_classes: int = 1000, **options: Any) -> Xception:
    """`Xception` with random weights; `options` are its arguments. `models.weights` loads trained ones."""
    return Xception(num_classes, **options)


# torch.fx leaves it as one call in what it traces: what it looks at in x, a traced x has not.
@torch.fx.wrap
def _check_image(x: Tensor, channels: int) -> Tensor:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected (N, {channels}, H, W), got {tuple(x.shape)}")
    if x.shape[2] < SMALLEST_IMAGE or x.shape[3] < SMALLEST_IMAGE:
        raise ValueError(f"x: expected at least {SMALLEST_IMAGE} pixels a side, got {tuple(x.shape)}")
    return x


def _flow(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"module{number}", module) for number, module in enumerate(modules, 1)))


def _check_global_pool(value: Any) -> str:
    if value not in _GLOBAL_POOLS:
        raise ValueError(f"global_pool: expected one of {_GLOBAL_POOLS}, got {value!r}")
    return value


def _initialise_classifier(classifier: nn.Module) -> None:
    if isinstance(classifier, nn.Linear):
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
