"""The layers that are timed: the separable convolutions of four networks, and a tiny one for what a call costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A depthwise k x k convolution followed by a pointwise one, on a square image; neither has a bias.

    It is padded by dilation * (k // 2) on each side, so a stride of s makes ceil(size / s) pixels of size.
    """

    in_channels: int
    out_channels: int
    size: int
    """Height and width of the input image, in pixels."""
    count: int = 1
    """How often the network has this layer."""
    kernel_size: int = 3
    stride: int = 1
    """Of the depthwise convolution."""
    dilation: int = 1
    network: str = "xception"

    @property
    def name(self) -> str:
        """Such as "728->728@19", and what is not 3 x 3, stride 1, dilation 1 behind it: "96->384@56 k7"."""
        extras = [
            f" {letter}{value}"
            for letter, value, usual in (
                ("k", self.kernel_size, 3),
                ("s", self.stride, 1),
                ("d", self.dilation, 1),
            )
            if value != usual
        ]
        return f"{self.in_channels}->{self.out_channels}@{self.size}{''.join(extras)}"

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel_size // 2)

    @property
    def out_size(self) -> int:
        """Height and width of the output image, in pixels."""
        return (self.size - 1) // self.stride + 1


XCEPTION = (
    Layer(64, 128, 147),
    Layer(128, 128, 147),
    Layer(128, 256, 74),
    Layer(256, 256, 74),
    Layer(256, 728, 37),
    Layer(728, 728, 37),
    Layer(728, 728, 19, count=25),
    Layer(728, 1024, 19),
    Layer(1024, 1536, 10),
    Layer(1536, 2048, 10),
)
"""The 34 separable convolutions of Xception (Chollet 2017, figure 5) on 299 x 299 images, as ten distinct shapes."""

MOBILENET = (
    Layer(32, 64, 112, network="mobilenet"),
    Layer(64, 128, 112, stride=2, network="mobilenet"),
    Layer(128, 128, 56, network="mobilenet"),
    Layer(128, 256, 56, stride=2, network="mobilenet"),
    Layer(256, 256, 28, network="mobilenet"),
    Layer(256, 512, 28, stride=2, network="mobilenet"),
    Layer(512, 512, 14, count=5, network="mobilenet"),
    Layer(512, 1024, 14, stride=2, network="mobilenet"),
    Layer(1024, 1024, 7, network="mobilenet"),
)
"""The 13 pairs of MobileNet (Howard et al. 2017, table 1) on 224 x 224 images, without the norm between the two."""

DEEPLAB = (
    Layer(1024, 1536, 33, dilation=2, network="deeplab"),
    Layer(1536, 1536, 33, dilation=2, network="deeplab"),
    Layer(1536, 2048, 33, dilation=2, network="deeplab"),
    Layer(2048, 256, 33, dilation=6, network="deeplab"),
    Layer(2048, 256, 33, dilation=12, network="deeplab"),
    Layer(2048, 256, 33, dilation=18, network="deeplab"),
    Layer(304, 256, 129, network="deeplab"),
    Layer(256, 256, 129, network="deeplab"),
)
"""The exit flow, the pyramid and the decoder of DeepLabv3+ (Chen et al. 2018) on 513 x 513 images, output stride 16."""

CONVNEXT = (
    Layer(96, 384, 56, count=3, kernel_size=7, network="convnext"),
    Layer(192, 768, 28, count=3, kernel_size=7, network="convnext"),
    Layer(384, 1536, 14, count=9, kernel_size=7, network="convnext"),
    Layer(768, 3072, 7, count=3, kernel_size=7, network="convnext"),
)
"""The 7 x 7 convolution and the first 1 x 1 of ConvNeXt-T's 18 blocks (Liu et al. 2022), without the norm between."""

NETWORKS = {"xception": XCEPTION, "mobilenet": MOBILENET, "deeplab": DEEPLAB, "convnext": CONVNEXT}

QUICK_TO_COMPUTE = Layer(8, 8, 3, network="none")
"""So little arithmetic that the time of a call is the host's work round it."""
