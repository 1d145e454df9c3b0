"""What a plan needs to know of a device, and the devices that predictions are made for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

REGISTERS_OF_AN_SM = 65_536
THREADS_OF_AN_SM = 2048
RESERVED_SHARED_BYTES = 1024  # a block, by the system


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
        return min(by_registers, by_shared, THREADS_OF_AN_SM // threads)

    def fma(self, dtype: str) -> float:
        """CUDA-core flop/s; 16-bit types are computed in float32."""
        return self.fma_float64 if dtype == "float64" else self.fma_float32

    def matrix(self, dtype: str, tf32: bool) -> float:
        """Flop/s of a library's matrix product in this dtype."""
        if dtype in ("float16", "bfloat16"):
            return self.matrix_16bit
        if dtype == "float32":
            return self.matrix_tf32 if tf32 else self.fma_float32
        return 2 * self.fma_float64  # float64 tensor cores, since sm_80

    def matrix_sync(self, dtype: str) -> float:
        """Flop/s of mma.sync in a 16-bit dtype, or in TF32 for float32."""
        return self.matrix(dtype, tf32=True) * self.sync_fraction


# Hopper's tensor cores give mma.sync 62 % of what they give wgmma (Luo et al., "Benchmarking and Dissecting the Nvidia
# Hopper GPU Architecture", 2024).
HOPPER_SYNC_FRACTION = 0.62

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
    )
}


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """The CUDA device of that index: the table's of its name, or else its generation's, scaled by its number of SMs.

    A MIG slice, or a smaller card of the same name, is no device of the table: it has fewer SMs.
    """
    properties = torch.cuda.get_device_properties(index)
    sms = properties.multi_processor_count
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    for name, device in DEVICES.items():
        if name in re.split(r"[\s-]", properties.name) and sms == device.sms:  # "NVIDIA A100-SXM4-80GB"
            return replace(device, shared_bytes=shared_bytes)
    capability = (properties.major, properties.minor)
    model = DEVICES["A100" if capability == (8, 0) else "H200"]
    scale = sms / model.sms
    datacenter = capability in ((8, 0), (9, 0), (10, 0))
    return Device(
        name=properties.name,
        sms=sms,
        shared_bytes=shared_bytes,
        bandwidth=model.bandwidth * scale,
        fma_float32=model.fma_float32 * scale,
        fma_float64=model.fma_float64 * scale / (1 if datacenter else 32),  # elsewhere 1/64 of float32
        matrix_16bit=model.matrix_16bit * scale,
        matrix_tf32=model.matrix_tf32 * scale,
        source=f"an {model.name}'s, by the number of SMs",
        sync_fraction=model.sync_fraction if capability == (9, 0) else 1.0,
        fma_lanes=model.fma_lanes,
    )
