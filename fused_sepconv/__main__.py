"""`python -m fused_sepconv`: a doctor. What was built, what this machine has, and what a call would run."""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__, _native, explain


def main() -> int:
    print(f"fused_sepconv {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\n".join([*_kernels(), *_pytorch(), *_gpus(), *_calls()]))
    return 0


def _kernels() -> list[str]:
    native = _native.load()
    if native is None:
        return [f"kernels: none: {_native.why_missing()}"]
    info = _native.build_info()
    if info["emulated"]:
        built = "the CPU emulation, for tests"
    else:
        built = f"built by nvcc {info['nvcc']} for architectures {info['architectures']}"
    return [f"kernels: {len(native.instances())} instances, {built}", f"  in {_native.path()}"]


def _pytorch() -> list[str]:
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return [f"torch: {torch.__version__}, {runtime if torch.version.hip or torch.version.cuda else 'CPU only'}"]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPUs: none that torch can use (no driver, no device, or a torch without CUDA)"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _calls() -> list[str]:
    """The plan of Xception's middle-flow layer on every kind of tensor that this machine has, and on an H200."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    lines = []
    for device in devices:
        x = torch.empty(8, 728, 19, 19, device=device)
        weights = torch.empty(728, 1, 3, 3, device=device), torch.empty(728, 728, 1, 1, device=device)
        lines += ["", f"a call on {device} tensors:", str(explain(x, *weights, padding=1))]
    x = torch.empty(8, 728, 19, 19, device="meta")
    weights = torch.empty(728, 1, 3, 3, device="meta"), torch.empty(728, 728, 1, 1, device="meta")
    lines += ["", "the same on an H200 (predicted, not measured):", str(explain(x, *weights, padding=1, device="H200"))]
    return lines


if __name__ == "__main__":
    sys.exit(main())
