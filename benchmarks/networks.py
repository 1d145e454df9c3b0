"""The whole networks that are compared: Xception, ours and timm's, and Inception V3, which the paper set beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from floors import Ceilings, Floor, network_floor
from layers import XCEPTION
from peers import OURS, is_ours
from problem import DTYPES, LAYOUTS
from torch import Tensor, nn

import fused_sepconv
from fused_sepconv.models import xception

IMAGE_SIZE, CLASSES = 299, 1000
LEARNING_RATE = 0.045  # the paper's, on ImageNet


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES)


@dataclass(frozen=True)
class Network:
    """One implementation of a network."""

    key: str  # "xception" or "inception_v3"
    name: str  # as people write it
    impl: str
    build: Callable[[], nn.Module]  # with random weights, on the CPU, in float32
    layout: str
    backend: str = "auto"
    """For the separable convolutions, where they are ours: "reference" makes them PyTorch's two convolutions."""
    is_compiled: bool = False  # by `torch.compile`

    @property
    def case(self) -> str:
        return f"{self.name}@{IMAGE_SIZE}"

    @property
    def is_ours(self) -> bool:
        return is_ours(self.impl)

    def on(self, device: str) -> nn.Module:
        """The network on a device; the same weights each time."""
        torch.manual_seed(0)
        model = self.build().to(device, memory_format=LAYOUTS[self.layout])
        return torch.compile(model) if self.is_compiled else model

    def floors(self, batch: int, dtype: str, direction: str, ceilings: Ceilings) -> tuple[Floor, Floor]:
        """Floors of Xception's separable convolutions, fused and by separate kernels; those of Inception V3 are 0."""
        layers = XCEPTION if self.key == "xception" else ()
        fused, unfused = (
            network_floor(layers, batch, dtype, direction, fused=fused, ceilings=ceilings) for fused in (True, False)
        )
        return fused, unfused


def networks(layouts: Sequence[str], peers: Iterable[str]) -> list[Network]:
    """Everything that is compared when `layouts` and kinds of peers are asked for, peers first."""
    build = partial(xception, num_classes=CLASSES)
    found = []
    for layout in layouts:
        of_layout = [
            Network("inception_v3", "Inception V3", f"timm-{layout}", partial(timm_model, "inception_v3"), layout),
            Network("xception", "Xception", f"timm-{layout}", partial(timm_model, "legacy_xception"), layout),
            Network("xception", "Xception", f"eager-{layout}", build, layout, backend="reference"),
            Network("xception", "Xception", OURS, build, layout),
        ]
        if "compile" in peers:
            of_layout += [
                replace(network, impl=f"{network.impl.removesuffix(f'-{layout}')}-compile-{layout}", is_compiled=True)
                for network in of_layout
            ]
        found += of_layout
    return found


def recomputing(network: Network) -> Network:
    """The network with `save_intermediate=False`."""

    def build() -> nn.Module:
        model = network.build()
        for module in model.modules():
            if isinstance(module, fused_sepconv.SeparableConv2d):
                module.save_intermediate = False
        return model

    return replace(network, impl=f"{network.impl}-recompute", build=build)


def fusing_norm(network: Network) -> Network:
    """The network after `fuse_batch_norm`."""

    def build() -> nn.Module:
        model = network.build()
        fused_sepconv.fuse_batch_norm(model)
        return model

    return replace(network, impl=f"{network.impl}-fuse-norm", build=build)


@dataclass(frozen=True)
class Run:
    """A network on a device, and one call of it: an inference, or a training step with mixed precision."""

    device: str
    dtype: str
    backend: str

    def precision(self) -> AbstractContextManager[object]:
        """float16 and bfloat16 are PyTorch's automatic mixed precision, as users train."""
        if self.dtype in ("float32", "tf32"):
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])

    def inference(self, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        model.eval()

        def call() -> Tensor:
            with torch.no_grad(), self.precision(), fused_sepconv.use_backend(self.backend):
                return model(x)

        return call

    def forward(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """The training loss."""
        with self.precision(), fused_sepconv.use_backend(self.backend):
            return F.cross_entropy(model(x), target)

    def step(self, model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
        """Forward, backward and SGD with momentum."""
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
        scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == "float16")

        def call() -> None:
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(self.forward(model, x, target)).backward()
            scaler.step(optimizer)
            scaler.update()

        return call


def random_batch(batch: int, size: int, layout: str, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator, device=device)
    target = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    return x.contiguous(memory_format=LAYOUTS[layout]), target
