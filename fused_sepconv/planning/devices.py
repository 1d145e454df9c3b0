"""The figures of a device that a plan needs, and the devices that predictions are made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fused_sepconv.native import loader

REGISTERS_OF_AN_SM = 65_536
RESERVED_SHARED_BYTES = 1024  # a block, by the system
# Dynamic shared memory of a block, at most, of any supported device: `kLargestSharedBytes` in csrc/common/launch.h.
LARGEST_SHARED_BYTES = 227 << 10


@dataclass(frozen=True)
class Device:
    """Ceilings of a device: bytes and flop a second, two flop a multiply-add.

    `source` says where they come from. They rank a plan's candidates; no result is computed from them.
    """

    name: str
    sms: int
    shared_bytes: int  # most dynamic shared memory of a block
    bandwidth: float  # device memory, bytes read + written
    fma_float32: float
    fma_float64: float
    matrix_16bit: float
    matrix_tf32: float
    source: str
    sync_fraction: float = 1.0  # of the matrix peak that mma.sync reaches
    fma_lanes: int = 128  # float32 multiply-adds that an SM starts in a cycle
    sm_threads: int = 2048

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.fma_float32 / (2 * self.fma_lanes * self.sms)

    def blocks_per_sm(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks that an SM holds at once, if each takes so much.

        Registers are given out in units of 8 a thread, and each quarter of the SM has a quarter of them for its warps.
        """
        warps = 4 * (REGISTERS_OF_AN_SM // 4 // (32 * (-(-registers // 8) * 8)))
        by_registers = warps // (threads // 32)
        by_shared = (self.shared_bytes + RESERVED_SHARED_BYTES) // (shared_bytes + RESERVED_SHARED_BYTES)
        return min(by_registers, by_shared, self.sm_threads // threads)

    def fma(self, dtype: str) -> float:
        """CUDA-core flop/s; 16-bit types are computed in float32."""
        return self.fma_float64 if dtype == "float64" else self.fma_float32

    def matrix(self, dtype: str, tf32: bool) -> float:
        """Flop/s of a library's matrix product in this dtype."""
        if dtype in ("float16", "bfloat16"):
            return self.matrix_16bit
        if dtype == "float32":
            return self.matrix_tf32 if tf32 else self.fma_float32
        # float64 tensor cores, since sm_80; cards with few float64 units have none.
        return self.fma_float64 * (2 if self.fma_float64 > self.fma_float32 / 4 else 1)

    def matrix_sync(self, dtype: str) -> float:
        """Flop/s of mma.sync in a 16-bit dtype, or in TF32 for float32."""
        return self.matrix(dtype, tf32=True) * self.sync_fraction


COPY_FRACTION = 0.9  # of the memory's bandwidth, that a copy reaches
# A library's product in bfloat16 on an H200, measured, of what the tensor cores do at the clock that the driver names.
PRODUCT_FRACTION = 0.74
# Hopper's tensor cores give mma.sync 62 % of what they give wgmma (Luo et al., "Benchmarking and Dissecting the Nvidia
# Hopper GPU Architecture", 2024). Those of 10.0 and 11.0 are fed by another instruction too: mma.sync is taken to be as
# fast there as on Hopper, a cycle and an SM, which nobody here has measured.
HOPPER_SYNC_FRACTION = 0.62
BLACKWELL_SYNC_FRACTION = HOPPER_SYNC_FRACTION / 2


@dataclass(frozen=True)
class _Generation:
    """Work of an SM of a compute capability in a cycle, which no attribute tells (CUDA C++ Programming Guide,
    "Arithmetic Instructions"; NVIDIA's architecture papers)."""

    fma_lanes: int
    float64_fraction: float  # of float32
    matrix_16bit: int  # flop, float32 sums
    sync_fraction: float = 1.0
    block_shared_bytes: int = 99 << 10  # for a build without a native module that asks the device
    sm_threads: int = 1536


_GENERATIONS = {
    (8, 0): _Generation(64, 1 / 2, 2048, block_shared_bytes=163 << 10, sm_threads=2048),
    (8, 6): _Generation(128, 1 / 64, 1024),
    (8, 7): _Generation(128, 1 / 64, 2048, block_shared_bytes=163 << 10),
    (8, 9): _Generation(128, 1 / 64, 1024),
    (9, 0): _Generation(128, 1 / 2, 4096, HOPPER_SYNC_FRACTION, 227 << 10, 2048),
    (10, 0): _Generation(128, 1 / 2, 8192, BLACKWELL_SYNC_FRACTION, 227 << 10, 2048),
    (10, 3): _Generation(128, 1 / 64, 8192, BLACKWELL_SYNC_FRACTION, 227 << 10, 2048),
    (11, 0): _Generation(128, 1 / 64, 8192, BLACKWELL_SYNC_FRACTION, 227 << 10),
    (12, 0): _Generation(128, 1 / 64, 1024),
}


def _generation(capability: tuple[int, int]) -> _Generation:
    """The capability's, or the newest that is not newer: 12.1 is taken for 12.0."""
    return _GENERATIONS[max((known for known in _GENERATIONS if known <= capability), default=(8, 0))]


_DATASHEET = "NVIDIA's datasheet; 90 % of its bandwidth, as a copy reaches"

DEVICES = {
    device.name: device
    for device in (
        Device("A100", 108, 163 << 10, 0.9 * 2.04e12, 19.5e12, 9.7e12, 312e12, 156e12, _DATASHEET, fma_lanes=64),
        Device("H100", 132, 227 << 10, 0.9 * 3.35e12, 67e12, 33.5e12, 790e12, 400e12, _DATASHEET, HOPPER_SYNC_FRACTION),
        Device(
            *("H200", 132, 227 << 10, 4.3e12, 67e12, 33.5e12, 790e12, 400e12, "copy and bf16 GEMM measured"),
            HOPPER_SYNC_FRACTION,
        ),
        Device(
            *("B200", 148, 227 << 10, 0.9 * 8e12, 75e12, 37e12, 0.8 * 2250e12, 0.8 * 1125e12),
            *(f"{_DATASHEET}; 80 % of its matrix rate, as on an H200", BLACKWELL_SYNC_FRACTION),
        ),
        Device(
            *("RTX 4090", 128, 99 << 10, 0.9 * 1.008e12, 82.6e12, 1.29e12, 165e12, 82.6e12, _DATASHEET),
            sm_threads=1536,
        ),
        Device(
            *("RTX 5090", 170, 99 << 10, 0.9 * 1.792e12, 104.8e12, 1.64e12, 209.5e12, 104.8e12, _DATASHEET),
            sm_threads=1536,
        ),
    )
}


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """The CUDA device of that index: the table's of its name, or else by its own clocks, memory and SMs."""
    name = torch.cuda.get_device_properties(index).name
    return device_by(name, attributes_of(index))


def attributes_of(index: int) -> dict[str, int]:
    """A device's attributes by their names in bindings.cpp: asked by the native module, or else PyTorch's properties.

    Every PyTorch names SMs, capability and threads; not every one shared memory, clocks and bus.
    """
    native = loader.load()
    if native is not None and not native.build_info()["emulated"]:
        return dict(native.device_attributes(index))
    properties = torch.cuda.get_device_properties(index)
    names = {
        "major": "major",
        "minor": "minor",
        "sms": "multi_processor_count",
        "clock_khz": "clock_rate",
        "memory_clock_khz": "memory_clock_rate",
        "memory_bus_bits": "memory_bus_width",
        "block_shared_bytes": "shared_memory_per_block_optin",
        "sm_threads": "max_threads_per_multi_processor",
    }
    return {ours: getattr(properties, theirs) for ours, theirs in names.items() if hasattr(properties, theirs)}


def device_by(name: str, attributes: dict[str, int]) -> Device:
    """The device of a name and attributes. A MIG slice, or a smaller card of the same name, has fewer SMs than the
    table's device and is none."""
    sms, capability = attributes["sms"], (attributes["major"], attributes["minor"])
    generation = _generation(capability)
    limits = {
        "shared_bytes": attributes.get("block_shared_bytes") or generation.block_shared_bytes,
        "sm_threads": attributes.get("sm_threads") or generation.sm_threads,
    }
    # "NVIDIA A100-SXM4-80GB" is an A100, "NVIDIA GeForce RTX 4090 D" and "... 4090 Laptop GPU" have fewer SMs.
    words = f" {name.replace('-', ' ')} "
    entry = next((device for key, device in DEVICES.items() if f" {key} " in words), None)
    if entry is not None and entry.sms == sms:
        return replace(entry, **limits)
    clock, source = 1e3 * attributes.get("clock_khz", 0), "its clocks and memory, and its generation's rates"
    if not clock:
        clock, source = 1.7e9, "its number of SMs and its generation's rates; a clock of 1.7 GHz assumed"
    # Two transfers a cycle. A slice of a GPU may name the whole one's bus.
    bus_bytes = attributes.get("memory_bus_bits", 0) / 8
    bandwidth = COPY_FRACTION * 2e3 * attributes.get("memory_clock_khz", 0) * bus_bytes
    if not bandwidth or "MIG" in name:
        large = "A100" if generation.fma_lanes == 64 else "H200"
        model = entry or DEVICES[large if generation.sm_threads == 2048 else "RTX 4090"]
        bandwidth, source = model.bandwidth * sms / model.sms, f"{source}; bandwidth by an {model.name}'s for its SMs"
    fma_float32 = 2 * generation.fma_lanes * sms * clock
    # GeForce sums 16-bit products in float32 at half of its generation's rate.
    matrix = PRODUCT_FRACTION * generation.matrix_16bit * sms * clock / (2 if "GeForce" in name else 1)
    return Device(
        name=name,
        sms=sms,
        bandwidth=bandwidth,
        fma_float32=fma_float32,
        fma_float64=fma_float32 * generation.float64_fraction,
        matrix_16bit=matrix,
        matrix_tf32=matrix / 2,
        source=source,
        sync_fraction=generation.sync_fraction,
        fma_lanes=generation.fma_lanes,
        **limits,
    )
