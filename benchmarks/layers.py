"""The layers that are timed: the separable convolutions of four networks."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A depthwise k x k convolution followed by a pointwise one, on a square image; neither has a bias.

    It is padded by dilation * (k // 2) on each side, so a stride of s makes ceil(size / s) pixels of size.
    """

    in_channels: int
    out_channels: int
    size: int  # height and width of the input image, in pixels
    count: int = 1  # how often the network has this layer
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    network: str = "xception"

    @property
    def name(self) -> str:
        """Such as "728->728@19", and what is not 3 x 3, stride 1, dilation 1 behind it: "96->384@56 k7"."""
        parts = (("k", self.kernel_size, 3), ("s", self.stride, 1), ("d", self.dilation, 1))
        extras = "".join(f" {letter}{value}" for letter, value, usual in parts if value != usual)
        return f"{self.in_channels}->{self.out_channels}@{self.size}{extras}"

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel_size // 2)

    @property
    def out_size(self) -> int:
        """Height and width of the output image, in pixels."""
        return (self.size - 1) // self.stride + 1


def _layers(network: str, text: str) -> tuple[Layer, ...]:
    """Reads layers by their names, "25 x" in front of one that the network has 25 times."""
    found = []
    for part in text.split(","):
        count, channels, features, size, extras = re.fullmatch(
            r"(?:(\d+) x )?(\d+)->(\d+)@(\d+)(.*)", part.strip()
        ).groups()
        names = {"k": "kernel_size", "s": "stride", "d": "dilation"}
        more = {names[extra[0]]: int(extra[1:]) for extra in extras.split()}
        found.append(Layer(int(channels), int(features), int(size), int(count or 1), network=network, **more))
    return tuple(found)


NETWORKS = {
    # The 34 separable convolutions of Xception (Chollet 2017, figure 5) on 299 x 299 images, as ten distinct shapes.
    "xception": _layers(
        "xception",
        "64->128@147, 128->128@147, 128->256@74, 256->256@74, 256->728@37, 728->728@37, 25 x 728->728@19, "
        "728->1024@19, 1024->1536@10, 1536->2048@10",
    ),
    # The 13 pairs of MobileNet (Howard et al. 2017, table 1) on 224 x 224 images, without the norm between the two.
    "mobilenet": _layers(
        "mobilenet",
        "32->64@112, 64->128@112 s2, 128->128@56, 128->256@56 s2, 256->256@28, 256->512@28 s2, 5 x 512->512@14, "
        "512->1024@14 s2, 1024->1024@7",
    ),
    # Exit flow, pyramid and decoder of DeepLabv3+ (Chen et al. 2018) on 513 x 513 images, output stride 16.
    "deeplab": _layers(
        "deeplab",
        "1024->1536@33 d2, 1536->1536@33 d2, 1536->2048@33 d2, 2048->256@33 d6, 2048->256@33 d12, 2048->256@33 d18, "
        "304->256@129, 256->256@129",
    ),
    # The 7 x 7 convolution and the first 1 x 1 of ConvNeXt-T's 18 blocks (Liu et al. 2022), without the norm between.
    "convnext": _layers("convnext", "3 x 96->384@56 k7, 3 x 192->768@28 k7, 9 x 384->1536@14 k7, 3 x 768->3072@7 k7"),
}
XCEPTION = NETWORKS["xception"]
