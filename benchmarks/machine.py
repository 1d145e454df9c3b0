"""The machine that is measured: its versions and settings for the result file, and what it can do at best."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from floors import Ceilings
from problem import DTYPES
from timing import Call, sample_cpu, sampler

import fused_sepconv
from fused_sepconv.native import loader

CHECKOUT = Path(__file__).resolve().parent.parent

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # size of each of the two buffers: several times the caches
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices: large enough for a library's best kernel
CPU_16_BIT_PRODUCT_SIZE = 768  # a CPU without instructions for 16-bit products would take seconds at full size


def environment(threads: int) -> dict[str, Any]:
    """Machine, versions and settings. To be called under the settings that the measurement runs under."""
    names = [line.partition(":")[2].strip() for line in (output_of("lscpu") or "").splitlines() if "Model name" in line]
    return {
        "fused_sepconv": fused_sepconv.__version__,
        "kernels": loader.build_info(),
        # "-dirty" behind it where files differ from it; None outside a checkout
        "commit": output_of(
            "git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
        ),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "cpu_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of the last minute, before the run: above 0 others were at work
        "threads": threads,
        "gpu": gpu() if torch.cuda.is_available() else None,
        "flags": {
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn.deterministic": torch.backends.cudnn.deterministic,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "autotune": os.environ.get("FUSED_SEPCONV_AUTOTUNE"),
        },
    }


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": output_of("nvidia-smi", "--id=0", "--format=csv,noheader", "--query-gpu=driver_version"),
        "clocks": clocks(),  # before the run; `clocks_after` is asked for behind it
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def clocks() -> str | None:
    """The clocks by nvidia-smi, and what holds them back."""
    figures = (
        "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    )
    return output_of("nvidia-smi", "--id=0", "--format=csv,noheader", f"--query-gpu={figures}")


def output_of(*command: str) -> str | None:
    """The output of a command; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_ceilings(path: Path) -> Ceilings:
    """Ceilings that were measured before: the object "ceilings" of a JSON file. ValueError where there is none."""
    try:
        return Ceilings(**json.loads(path.read_text())["ceilings"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: has no ceilings that can be read: {error!r}") from error


def measure_ceilings(device: str, dtypes: Sequence[str], threads: int, seconds: float = 0.3) -> Ceilings:
    """Measures a copy, a float32 product, and a product in each of the dtypes that has faster ones.

    Floors and fractions refer to these and to no datasheet: the clocks that a machine holds, the memory that its
    neighbours leave it and the power that it may draw are in them. The depthwise taps run where float32 products do,
    so a float32 product without tensor cores is their ceiling.
    """
    best = _best_cuda if device == "cuda" else partial(_best_cpu, threads=threads)
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    copy_seconds = best(partial(torch.empty_like(source).copy_, source), seconds)
    products = {dtype: _product(device, dtype, best, seconds) for dtype in dict.fromkeys(["float32", *dtypes])}
    return Ceilings(
        device=torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads",
        source="measured before the run: a copy and matrix products",
        bytes_per_second=2 * source.nbytes / copy_seconds,
        fma_flops=products["float32"],
        # Where a CPU has no instructions for a dtype, float32 with conversions is what it does at best.
        matrix_flops={
            dtype: max(flops, products["float32"]) for dtype, flops in products.items() if dtype != "float32"
        },
    )


def _product(device: str, dtype: str, best: Callable[[Call, float], float], seconds: float) -> float:
    """Flop/s of a square product."""
    size = CPU_16_BIT_PRODUCT_SIZE if device == "cpu" and dtype in ("float16", "bfloat16") else PRODUCT_SIZE[device]
    return 2 * size**3 / best(product(device, dtype, size, size, size), seconds)


def product(device: str, dtype: str, m: int, n: int, k: int, kind: str = "NN") -> Call:
    """(m, k) times (k, n) of random numbers; T is a factor that is stored transposed."""
    left, right = (torch.randn(*shape, device=device, dtype=DTYPES[dtype]) for shape in ((m, k), (k, n)))
    left = left.t().contiguous().t() if kind[0] == "T" else left
    right = right.t().contiguous().t() if kind[1] == "T" else right

    def call() -> None:
        # As a 1 x 1 convolution it would follow the precision flags of convolutions; a matrix product has its own.
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        torch.mm(left, right)
        torch.backends.cuda.matmul.allow_tf32 = allowed

    return call


def _best_cpu(call: Call, seconds: float, threads: int) -> float:
    return min(sample_cpu(call, seconds, threads))


def _best_cuda(call: Call, seconds: float) -> float:
    return min(sampler("cuda", "plain", seconds, 0)(call))
