"""On what was it measured: machine, versions and settings, for the result file."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_sepconv
from fused_sepconv.native import loader
from fused_sepconv.planning import choice

CHECKOUT = Path(__file__).resolve().parent.parent


def environment(threads: int) -> dict[str, Any]:
    """Asked for under the settings that the measurement runs under."""
    return {
        "fused_sepconv": fused_sepconv.__version__,
        "kernels": loader.build_info(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of the last minute, before the run: above 0 others were at work
        "threads": threads,
        "gpu": gpu() if torch.cuda.is_available() else None,
        "flags": {
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn.deterministic": torch.backends.cudnn.deterministic,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "autotune": choice.chooser.measures,
        },
    }


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The checkout's commit, "-dirty" behind it where files differ from it; None outside a checkout."""
    return output_of("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--id=0", "--format=csv,noheader")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": output_of(*query, "--query-gpu=driver_version"),
        "clocks": output_of(*query, "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
