"""Which device a plan takes a CUDA device for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fused_sepconv.planning import devices
from fused_sepconv.planning.devices import DEVICES, HOPPER_SYNC_FRACTION, Device

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    devices.cuda_device.cache_clear()
    yield
    devices.cuda_device.cache_clear()


def device_of(monkeypatch: pytest.MonkeyPatch, name: str, sms: int, capability: tuple[int, int]) -> Device:
    major, minor = capability
    properties = SimpleNamespace(
        name=name, multi_processor_count=sms, major=major, minor=minor, shared_memory_per_block_optin=163 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return devices.cuda_device(0)


@pytest.mark.parametrize(
    "name, sms, capability, entry",
    [
        ("NVIDIA A100-SXM4-80GB", 108, (8, 0), "A100"),
        ("NVIDIA A100 80GB PCIe", 108, (8, 0), "A100"),
        ("NVIDIA H100 80GB HBM3", 132, (9, 0), "H100"),
        ("NVIDIA H200", 132, (9, 0), "H200"),
    ],
)
def test_a_device_of_the_table_is_known_by_its_name(monkeypatch, name, sms, capability, entry):
    device = device_of(monkeypatch, name, sms, capability)
    assert (device.name, device.bandwidth) == (entry, DEVICES[entry].bandwidth)
    assert device.shared_bytes == 163 << 10


@pytest.mark.parametrize(
    "name, sms, capability, model, sync_fraction",
    [
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 42, (8, 0), "A100", 1.0),
        ("NVIDIA H100 PCIe", 114, (9, 0), "H200", HOPPER_SYNC_FRACTION),
        ("NVIDIA B200", 148, (10, 0), "H200", 1.0),
    ],
)
def test_another_is_its_generations_by_the_number_of_sms(monkeypatch, name, sms, capability, model, sync_fraction):
    device = device_of(monkeypatch, name, sms, capability)
    assert device.name == name and model in device.source
    assert device.bandwidth == pytest.approx(DEVICES[model].bandwidth * sms / DEVICES[model].sms)
    assert device.clock == pytest.approx(DEVICES[model].clock)
    assert device.sync_fraction == sync_fraction
