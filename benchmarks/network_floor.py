"""The least time in which Xception as a whole can run: roofline.py's rules for every kernel of the network.

Three ways to run it are counted:

- "unfused": each operator is a kernel, as eager PyTorch runs it, and each is perfect;
- "fused": each separable convolution is one kernel forward and two backward, and BatchNorm, ReLU and the residual add
  ride along: applied as the next layer reads its input, the statistics gathered as this one writes its output;
- "one pass": as "fused", with a backward that reads x and dy once, which is what none can beat.

For inference BatchNorm is folded into the convolutions. A training step is forward, backward and SGD with momentum.
Layer weights other than the pointwise ones are too small to count; biases, BatchNorm's vectors too.
"""

from dataclasses import dataclass, field

from layers import Layer
from roofline import (
    BYTES_PER_ELEMENT,
    H200,
    Ceilings,
    Floor,
    Kernel,
    backward_unfused,
    floor_of,
    forward_unfused,
    quantities,
)

WAYS = ("unfused", "fused", "one pass")

PARAMETERS = 22.9e6
CLASSES = 1000
FEATURES = 2048
INDEX_BYTES = 8
"""Of a position that PyTorch's max-pooling saves; a fused one saves a byte."""


def xception_floor(batch: int, dtype: str, *, way: str, training: bool, ceilings: Ceilings = H200) -> Floor:
    """Of one inference, or of one training step, on 299 x 299 images with 1000 classes.

    Raises:
        ValueError: a way that is not one of `WAYS`.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {WAYS}, got {way!r}")
    kernels = _Xception(batch, dtype, way, training)
    found = kernels.forward
    if training:
        found = [*found, *kernels.backward, _optimizer(dtype)]
    return floor_of(found, dtype, ceilings)


def _optimizer(dtype: str) -> Kernel:
    """SGD with momentum in float32: parameter, gradient and momentum read, two written; 16-bit copies of weights."""
    copies = 6 if dtype in ("float16", "bfloat16") else 0
    return Kernel("optimizer", PARAMETERS * (4 * 5 + copies))


@dataclass
class _Xception:
    """Lists the kernels of the network, in the order in which the forward runs them."""

    batch: int
    dtype: str
    way: str
    training: bool
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fused = self.way != "unfused"
        self.stem()
        self.pooled_block(64, 128, 147, first_relu=False)
        self.pooled_block(128, 256, 74)
        self.pooled_block(256, 728, 37)
        for number in range(8):
            self.middle_block(is_first=number == 0)
        self.exit_block()
        self.head()

    def image(self, channels: int, size: int) -> float:
        """The bytes of a batch of images."""
        return self.batch * channels * size**2 * BYTES_PER_ELEMENT[self.dtype]

    # Operators

    def moves(self, name: str, forward: float | None, backward: float | None = None) -> None:
        """An operator that is bound by the bytes it moves."""
        if forward is not None:
            self.forward.append(Kernel(name, forward))
        if backward is not None:
            self.backward.append(Kernel(f"{name}, backward", backward))

    def convolution(
        self, in_channels: int, out_channels: int, kernel: int, size: int, out_size: int, *, is_first: bool = False
    ) -> None:
        """A plain convolution. One of 1 x 1 with a stride reads only the pixels that it uses."""
        flops = 2.0 * self.batch * out_size**2 * in_channels * out_channels * kernel**2
        whole, out = self.image(in_channels, size), self.image(out_channels, out_size)
        used = whole if kernel > 1 else self.image(in_channels, out_size)
        self.forward.append(Kernel("convolution", used + out, flops))
        self.backward.append(Kernel("convolution, weight gradient", used + out, flops))
        if not is_first:
            self.backward.append(Kernel("convolution, input gradient", whole + out, flops))

    def batch_norm(self, channels: int, size: int) -> None:
        """A BatchNorm that stands alone: statistics, then the values."""
        image = self.image(channels, size)
        if self.training:
            self.moves("batch norm, statistics", image, 2 * image)
            self.moves("batch norm", 2 * image, 3 * image)

    def relu(self, channels: int, size: int) -> None:
        image = self.image(channels, size)
        self.moves("relu", 2 * image, 3 * image)

    def separable(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        relu: bool = True,
        adds_residual: bool = False,
        keeps_sum: bool = False,
    ) -> None:
        """[ReLU,] separable convolution, BatchNorm.

        Fused, the layer that follows a residual add does it as it reads (`adds_residual`), and writes the sum for the
        next residual connection (`keeps_sum`).
        """
        layer = Layer(in_channels, out_channels, size)
        if not self.fused:
            if relu:
                self.relu(in_channels, size)
            self.forward += forward_unfused(layer, self.batch, self.dtype)
            self.backward += backward_unfused(layer, self.batch, self.dtype)
            self.batch_norm(out_channels, size)
            return
        q = quantities(layer, self.batch, self.dtype)
        extra = q.input * (int(adds_residual) + int(keeps_sum))
        self.forward.append(Kernel("separable", q.input + q.output + q.weights + extra, q.product, q.taps))
        grad = 2 * q.output  # BatchNorm's gradient is formed while it is read: of the norm's result, and of y
        if self.way == "fused":
            self.backward += [
                Kernel("pointwise weight gradient", q.input + grad + q.weights, q.product, q.taps),
                Kernel("input and depthwise weight gradients", grad + 2 * q.input + q.weights, q.product, 2 * q.taps),
            ]
        else:
            self.backward.append(Kernel("backward", grad + 2 * q.input + 2 * q.weights, 2 * q.product, 3 * q.taps))

    # Modules

    def stem(self) -> None:
        self.convolution(3, 32, 3, 299, 149, is_first=True)
        self.batch_norm(32, 149)
        self.relu(32, 149)
        self.convolution(32, 64, 3, 149, 147)
        self.batch_norm(64, 147)
        self.relu(64, 147)

    def pooled_block(self, in_channels: int, out_channels: int, size: int, *, first_relu: bool = True) -> None:
        """Two separable convolutions, a max-pooling / 2, and a strided 1 x 1 convolution round them."""
        self.convolution(in_channels, out_channels, 1, size, (size + 1) // 2)
        self.separable(in_channels, out_channels, size, relu=first_relu)
        self.separable(out_channels, out_channels, size)
        self.join(in_channels, out_channels, size)

    def join(self, in_channels: int, out_channels: int, size: int) -> None:
        """The BatchNorm of the residual connection, the max-pooling, and the sum of the two."""
        pooled = (size + 1) // 2
        large, small, back = (
            self.image(out_channels, size),
            self.image(out_channels, pooled),
            self.image(in_channels, size),
        )
        positions = self.batch * out_channels * pooled**2
        if self.fused:
            # One pass: BatchNorm, pooling, the other BatchNorm, the sum. The gradients meet in the input's.
            self.moves("join", large + 2 * small + positions * self.training, 2 * large + 3 * small + positions)
            self.moves("sum of gradients", None, back)
            return
        self.batch_norm(out_channels, pooled)
        saved = positions * INDEX_BYTES
        self.moves("max-pooling", large + small + saved * self.training, large + small + saved)
        self.moves("sum", 3 * small, 3 * back)

    def middle_block(self, *, is_first: bool) -> None:
        image = self.image(728, 19)
        self.separable(728, 728, 19, adds_residual=not is_first, keeps_sum=not is_first)
        self.separable(728, 728, 19)
        self.separable(728, 728, 19)
        if self.fused:
            self.moves("sum of gradients", None, image)
        else:
            self.moves("sum", 3 * image, 3 * image)

    def exit_block(self) -> None:
        self.convolution(728, 1024, 1, 19, 10)
        self.separable(728, 728, 19, adds_residual=True, keeps_sum=True)
        self.separable(728, 1024, 19)
        self.join(728, 1024, 19)
        for in_channels, out_channels in ((1024, 1536), (1536, FEATURES)):
            self.separable(in_channels, out_channels, 10, relu=False)
            if not self.fused:
                self.relu(out_channels, 10)

    def head(self) -> None:
        image = self.image(FEATURES, 10)
        self.moves("global pooling", image, 2 * image if self.fused else image)
        element = BYTES_PER_ELEMENT[self.dtype]
        weights = FEATURES * CLASSES * element
        flops = 2.0 * self.batch * FEATURES * CLASSES
        self.forward.append(Kernel("classifier", weights + self.batch * (FEATURES + CLASSES) * element, flops))
        self.backward.append(Kernel("classifier, backward", 3 * weights, 2 * flops))
