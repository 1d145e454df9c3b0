"""The benchmark of whole networks and of memory: what is counted, checked and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import memory
import memory_suite
import model_check
import model_suite
import models
import operator_floor
import pytest
import torch
from gpu_state import Sensor
from models import Network, networks
from network_floor import WAYS, xception_floor
from roofline import H200
from torch import Tensor, nn

from fused_sepconv import SeparableConv2d
from fused_sepconv.ops.backend import default_backend
from tests.benchmarks.test_bench import SETTINGS

WHOLE_NETWORK = {  # ms: inference with BatchNorm folded, training step; on an H200
    ("bfloat16", 64): {"unfused": (3.98, 16.59), "fused": (2.04, 7.61), "one pass": (2.04, 6.85)},
    ("bfloat16", 128): {"unfused": (7.95, 33.04), "fused": (4.07, 15.07), "one pass": (4.07, 13.55)},
    ("tf32", 64): {"unfused": (7.93, 32.59), "fused": (4.05, 14.95), "one pass": (4.05, 13.40)},
}


class Small(nn.Module):
    """A network with one separable convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.separable = SeparableConv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.separable(x)).mean((2, 3)))


class WrongInTraining(Small):
    """Its gradients are doubled, where they are not the reference's."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y - y.detach() if default_backend() == "auto" else y


def broken() -> nn.Module:
    raise ModuleNotFoundError("No module named 'timm'")


def small_networks(*builds: Callable[[], nn.Module]) -> Callable[..., list[Network]]:
    return lambda *_: [Network("xception", "Small", "fused_sepconv", build, "nhwc") for build in builds]


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (model_suite, memory_suite):
        monkeypatch.setattr(module, "IMAGE_SIZE", 9)
    monkeypatch.setattr(model_check, "CHECKED_SIZE", 9)


# Floors


@pytest.mark.parametrize(("dtype", "batch"), WHOLE_NETWORK)
@pytest.mark.parametrize("way", WAYS)
def test_floor_of_xception(dtype: str, batch: int, way: str) -> None:
    floors = [xception_floor(batch, dtype, way=way, training=training).milliseconds for training in (False, True)]
    assert floors == pytest.approx(WHOLE_NETWORK[dtype, batch][way], abs=0.005)


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ValueError, match=r"way: .*'magic'"):
        xception_floor(1, "float32", way="magic", training=False)


def test_the_floor_of_any_network_counts_its_operators() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 7 * 7, 10, bias=False))

    floor = operator_floor.operator_floor(build, 2, "float32", training=False, ceilings=H200, image_size=9)
    x, hidden, out, weights = 2 * 3 * 81, 2 * 4 * 49, 2 * 10, 4 * 27 + 196 * 10
    assert floor.flops == 2 * (hidden * 27 + out * 196)
    assert floor.bytes == 4 * (x + 2 * hidden + out + weights)  # the transposed weight and the flattened view are free


def test_the_operators_of_our_xception_are_between_its_floors_and_twice_them() -> None:
    """An independent count of the same network: BatchNorm is not folded here, and the operator is not split in two."""
    counted = operator_floor.operator_floor(models.xception, 8, "bfloat16", training=False, ceilings=H200)
    analytic = xception_floor(8, "bfloat16", way="unfused", training=False)
    assert counted.matrix_flops == pytest.approx(analytic.flops, rel=0.01)
    assert analytic.bytes / 2 < counted.bytes < 2 * analytic.bytes


# Checking and timing


@pytest.mark.usefixtures("small_images")
def test_a_network_is_timed_in_inference_and_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_suite, "networks", small_networks(Small))
    (step,) = model_suite.model_suite(SETTINGS)
    rows = list(step.run())
    assert len(rows) == step.rows
    assert [(row["pass"], row["error"]) for row in rows] == [("fwd", None), ("both", None)]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1e3 / row["median_ms"])


@pytest.mark.usefixtures("small_images")
def test_a_wrong_network_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(model_suite, "networks", small_networks(WrongInTraining))
    monkeypatch.setattr(model_suite, "timed", lambda network, direction, *_: timed.append(direction) or "not timed")
    (step,) = model_suite.model_suite(SETTINGS)
    errors = {row["pass"]: row["error"] for row in step.run()}
    assert timed == ["fwd"]
    assert errors["both"].startswith("wrong answer: the gradient is off by")


@pytest.mark.usefixtures("small_images")
def test_an_absent_peer_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Network("inception_v3", "Inception V3", "timm-nhwc", broken, "nhwc")
    monkeypatch.setattr(models, "timm_model", lambda name: broken())
    for suite in (model_suite, memory_suite):
        monkeypatch.setattr(suite, "networks", lambda *_: [peer])
    monkeypatch.setattr(memory_suite, "XCEPTION", ())
    steps = [*model_suite.model_suite(SETTINGS), *memory_suite.memory_suite(SETTINGS)]
    rows = [row for step in steps for row in step.run()]
    assert len(rows) == 3
    assert {row["error"] for row in rows} == {"ModuleNotFoundError: No module named 'timm'"}


def test_timm_and_both_networks_are_compared() -> None:
    found = [(network.key, network.impl) for network in networks(["nhwc"], ("eager", "compile"))]
    plain = [
        ("inception_v3", "timm-nhwc"),
        ("xception", "timm-nhwc"),
        ("xception", "eager-nhwc"),
        ("xception", "fused_sepconv"),
    ]
    compiled = [(key, f"{impl.removesuffix('-nhwc')}-compile-nhwc") for key, impl in plain]
    assert found == [*plain, *compiled]


# Memory


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        kept = [torch.empty(300_000, dtype=torch.uint8) for _ in range(4)]
        del kept

    assert memory.peak_bytes(call, "cpu") == 1_200_000


def test_saved_memory_counts_each_storage_once_and_no_parameter() -> None:
    x, weight = torch.randn(100, 50, requires_grad=True), torch.randn(50, 50, requires_grad=True)

    def forward() -> Tensor:
        y = x @ weight  # keeps x and weight
        return (y * y).sum() + y.exp().sum()  # keeps y, twice, and exp's result

    assert memory.saved_bytes(forward, [weight]) == 4 * (x.numel() + 2 * 100 * 50)


@pytest.mark.usefixtures("small_images")
def test_ours_keeps_the_input_alone_where_eager_keeps_the_depthwise_result_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_suite, "networks", lambda *_: [])
    monkeypatch.setattr(memory_suite, "XCEPTION", memory_suite.XCEPTION[-1:])
    (step,) = memory_suite.memory_suite(replace(SETTINGS, layouts=("nhwc",)))
    saved = {row["impl"]: row["saved_bytes"] for row in step.run()}
    image = 1536 * 10 * 10 * 4
    assert saved == {"eager-nhwc": 2 * image, "fused_sepconv": image}


# A GPU's state


class FakeNvml:
    """As much of pynvml as is used."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, reasons: int) -> None:
        self.reasons = reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:
        if self.reasons < 0:
            raise self.NVMLError("not supported")
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return 654_321

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        return 61


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [(0x0, ()), (0x1 | 0x2, ()), (0x4, ("power cap",)), (0x20 | 0x4, ("power cap", "thermal slowdown"))],
)
def test_throttling_is_told_from_idle_clocks(reasons: int, throttled: tuple[str, ...]) -> None:
    state = Sensor(FakeNvml(reasons), None).read()
    assert state == (1980, 3201, 654.321, 61, throttled)


def test_a_gpu_that_does_not_answer_has_no_state() -> None:
    assert Sensor(FakeNvml(-1), None).read() is None
    assert Sensor(None, None).read() is None
