"""Clocks, power and heat of a GPU while it is measured, read with NVML (`pip install nvidia-ml-py`)."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class State(NamedTuple):
    """Of a GPU at one moment."""

    sm_mhz: int
    memory_mhz: int
    power_w: float
    temperature_c: int
    throttled: tuple[str, ...]
    """Why the clocks are held back now; empty where they are not."""


THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's reasons for lower clocks (nvml.h, nvmlClocksThrottleReason*), without those that are no fault."""


class Sensor:
    """Reads a GPU's state, or None where NVML can't."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @staticmethod
    @cache
    def of_current_gpu() -> Sensor:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return Sensor.of(uuid)

    @classmethod
    def of(cls, uuid: str) -> Sensor:
        """By UUID: NVML numbers all GPUs, CUDA those that CUDA_VISIBLE_DEVICES leaves."""
        try:
            import pynvml
        except ModuleNotFoundError:
            return cls(None, None)
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}"))
        except pynvml.NVMLError:
            return cls(None, None)

    def read(self) -> State | None:
        nvml = self._nvml
        if nvml is None:
            return None
        try:
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
            return State(
                sm_mhz=nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM),
                memory_mhz=nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_MEM),
                power_w=nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
                temperature_c=nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU),
                throttled=tuple(reason for bit, reason in THROTTLING.items() if reasons & bit),
            )
        except nvml.NVMLError:  # a MIG slice or a virtual GPU answers some questions only
            return None
