"""What the device at hand can do at best, measured before anything is timed: a copy and matrix products.

Floors and fractions refer to these and to no datasheet: the clocks that a machine holds, the memory that its neighbours
leave it and the power that it may draw are in them. The depthwise taps run where float32 products do, so a float32
product without tensor cores is their ceiling.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from problem import DTYPES, convolution_flags
from roofline import Ceilings
from timing import Call, CudaSampler, sample_cpu

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Of each of the two buffers: several times the caches."""
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices: large enough for a library's best kernel."""
CPU_16_BIT_PRODUCT_SIZE = 768
"""A CPU without instructions for 16-bit products would take seconds at full size."""


def measure(device: str, dtypes: Sequence[str], threads: int, seconds: float = 0.3) -> Ceilings:
    """A copy, a float32 product, and a product in each of the dtypes that has faster ones."""
    sample = _best_cuda if device == "cuda" else partial(_best_cpu, threads=threads)
    copied = COPY_BYTES[device]
    products = {dtype: _product(device, dtype, sample, seconds) for dtype in dict.fromkeys(["float32", *dtypes])}
    return Ceilings(
        device=torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads",
        source="measured before the run: a copy and matrix products",
        bytes_per_second=2 * copied / sample(_copy(device, copied), seconds),
        fma_flops=products["float32"],
        # Where a CPU has no instructions for a dtype, float32 with conversions is what it does at best.
        matrix_flops={
            dtype: max(flops, products["float32"]) for dtype, flops in products.items() if dtype != "float32"
        },
    )


def _copy(device: str, size: int) -> Call:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _product(device: str, dtype: str, sample: Callable[[Call, float], float], seconds: float) -> float:
    """Flop/s of a square product."""
    size = CPU_16_BIT_PRODUCT_SIZE if device == "cpu" and dtype in ("float16", "bfloat16") else PRODUCT_SIZE[device]
    left, right = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    # As a 1 x 1 convolution a product follows the convolutions' precision flags; as a matrix product it has its own.
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        with convolution_flags(dtype):
            return 2 * size**3 / sample(partial(torch.mm, left, right), seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _best_cpu(call: Call, seconds: float, threads: int) -> float:
    return min(sample_cpu(call, seconds, threads).seconds)


def _best_cuda(call: Call, seconds: float) -> float:
    return min(CudaSampler("plain", seconds)(lambda: [call]).seconds)
