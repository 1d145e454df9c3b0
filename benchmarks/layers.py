"""The layers that are timed: Xception's separable convolutions, and the tiny one that shows what a call costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A depthwise k x k convolution, stride 1, "same" padding, followed by a pointwise one; neither has a bias."""

    in_channels: int
    out_channels: int
    size: int
    """Height and width of the square input image, in pixels."""
    count: int = 1
    """How often the network has this layer."""
    kernel_size: int = 3

    @property
    def name(self) -> str:
        return f"{self.in_channels}->{self.out_channels}@{self.size}"

    @property
    def padding(self) -> int:
        return self.kernel_size // 2


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

QUICK_TO_COMPUTE = Layer(8, 8, 3)
"""So little arithmetic that the time of a call is the host's work round it."""
