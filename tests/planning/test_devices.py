"""Which device a plan takes a CUDA device for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fused_sepconv.native import loader
from fused_sepconv.planning import devices
from fused_sepconv.planning.devices import DEVICES, device_by

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    devices.cuda_device.cache_clear()
    yield
    devices.cuda_device.cache_clear()


def attributes(**changed: int) -> dict[str, int]:
    """An H200's, as its driver gives them, with changes."""
    h200 = {
        **{"major": 9, "minor": 0, "sms": 132, "clock_khz": 1_980_000, "memory_clock_khz": 3_201_000},
        **{"memory_bus_bits": 6144, "block_shared_bytes": 227 << 10, "sm_threads": 2048},
    }
    return {**h200, **changed}


A100 = attributes(
    **{"major": 8, "sms": 108, "clock_khz": 1_410_000, "memory_clock_khz": 1_593_000, "memory_bus_bits": 5120},
    block_shared_bytes=163 << 10,
)
H100 = attributes(memory_clock_khz=2_619_000, memory_bus_bits=5120)
B200 = attributes(major=10, sms=148, clock_khz=1_965_000, memory_clock_khz=3_996_000, memory_bus_bits=8192)
SMALL = {"block_shared_bytes": 99 << 10, "sm_threads": 1536}
RTX_4090 = attributes(
    major=8, minor=9, sms=128, clock_khz=2_520_000, memory_clock_khz=10_501_000, memory_bus_bits=384, **SMALL
)
RTX_5090 = attributes(major=12, sms=170, clock_khz=2_407_000, memory_clock_khz=14_001_000, memory_bus_bits=512, **SMALL)

NAMED = {
    "NVIDIA A100-SXM4-80GB": ("A100", A100),
    "NVIDIA A100 80GB PCIe": ("A100", A100),
    "NVIDIA H100 80GB HBM3": ("H100", H100),
    "NVIDIA H200": ("H200", attributes()),
    "NVIDIA B200": ("B200", B200),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", RTX_4090),
    "NVIDIA GeForce RTX 5090": ("RTX 5090", RTX_5090),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_device_of_the_table_is_known_by_its_name(name):
    entry, told = NAMED[name]
    device = device_by(name, {**told, "block_shared_bytes": 77 << 10})
    assert (device.name, device.bandwidth) == (entry, DEVICES[entry].bandwidth)
    assert device.shared_bytes == 77 << 10


@pytest.mark.parametrize("name", NAMED)
def test_the_attributes_alone_give_about_the_tables_figures(name):
    entry, told = NAMED[name]
    known, device = DEVICES[entry], device_by(name.replace(entry, "unknown"), told)
    assert "clocks and memory" in device.source
    for figure in ("bandwidth", "fma_float32", "fma_float64", "clock"):
        assert getattr(device, figure) == pytest.approx(getattr(known, figure), rel=0.06), figure
    for figure in ("matrix_16bit", "matrix_tf32"):  # the table has the peaks of those that nobody here has measured
        assert getattr(device, figure) == pytest.approx(getattr(known, figure), rel=0.27), figure
    for figure in ("sync_fraction", "fma_lanes", "shared_bytes", "sm_threads"):
        assert getattr(device, figure) == getattr(known, figure), figure


def test_a_card_is_not_taken_for_a_datacenter_gpu_by_its_number_of_sms():
    unknown = device_by("NVIDIA RTX 4090 of tomorrow", {**RTX_4090, "sms": 131})
    assert unknown.bandwidth == pytest.approx(0.9 * 1.008e12, rel=0.01)
    assert unknown.fma_float64 == unknown.fma_float32 / 64


@pytest.mark.parametrize(
    "name, told",
    [
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", {**A100, "sms": 42}),
        ("NVIDIA A100 80GB PCIe", {key: A100[key] for key in ("major", "minor")} | {"sms": 42}),
    ],
)
def test_a_slice_or_a_silent_driver_has_its_share_of_the_bandwidth(name, told):
    device = device_by(name, told)
    assert device.name == name
    assert device.bandwidth == pytest.approx(DEVICES["A100"].bandwidth * 42 / 108)
    assert device.shared_bytes == 163 << 10 and device.sm_threads == 2048


@pytest.mark.parametrize("name, told", [("Some NVIDIA A", {"major": 8, "minor": 6}), ("C", {"major": 12, "minor": 1})])
def test_what_nothing_tells_is_the_generations(name, told):
    device = device_by(name, {**told, "sms": 64})
    assert (device.shared_bytes, device.sm_threads, device.fma_lanes) == (99 << 10, 1536, 128)
    assert device.bandwidth == DEVICES["RTX 4090"].bandwidth / 2
    assert "assumed" in device.source


def test_geforce_sums_in_float32_at_half_the_rate():
    professional = device_by("NVIDIA L40S", RTX_4090)
    assert professional.matrix_16bit == 2 * device_by("NVIDIA GeForce RTX 4099", RTX_4090).matrix_16bit


def test_the_native_module_is_asked_and_otherwise_pytorch(monkeypatch):
    """A PyTorch that tells neither clocks nor shared memory."""
    properties = SimpleNamespace(
        name="NVIDIA H100 PCIe", multi_processor_count=114, major=9, minor=0, max_threads_per_multi_processor=2048
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(loader, "load", lambda: None)
    device = devices.cuda_device(0)
    assert (device.name, device.shared_bytes, device.sm_threads) == ("NVIDIA H100 PCIe", 227 << 10, 2048)
    assert device.bandwidth == pytest.approx(DEVICES["H100"].bandwidth * 114 / 132)

    devices.cuda_device.cache_clear()
    native = SimpleNamespace(
        build_info=lambda: {"emulated": False},
        device_attributes=lambda index: attributes(sms=114, clock_khz=1_755_000, memory_clock_khz=1_593_000 + index),
    )
    monkeypatch.setattr(loader, "load", lambda: native)
    device = devices.cuda_device(0)
    assert device.bandwidth == pytest.approx(0.9 * 2 * 1.593e9 * 6144 / 8)
    assert device.clock == pytest.approx(1.755e9)


@pytest.mark.parametrize("name", ["A100", "H200", "RTX 4090", "RTX 5090"])
def test_blocks_an_sm(name):
    device = DEVICES[name]
    assert device.blocks_per_sm(256, 32, 0) == device.sm_threads // 256
    assert device.blocks_per_sm(128, 32, device.shared_bytes // 2 - 1024) == 2
