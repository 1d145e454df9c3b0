"""`python -m fused_sepconv`: a doctor. What was built, what this machine has, and what a call would run."""

from __future__ import annotations

import platform
import sys

import torch

from fused_sepconv import __version__, explain
from fused_sepconv.native import loader
from fused_sepconv.planning import choice
from fused_sepconv.planning.devices import cuda_device


def main() -> int:
    print(f"fused_sepconv {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\n".join([*_kernels(), *_pytorch(), *_gpus(), *_autotuning(), *_calls()]))
    return 0


def _kernels() -> list[str]:
    native = loader.load()
    if native is None:
        return [f"kernels: none: {loader.why_missing()}"]
    info = loader.build_info()
    if info["emulated"]:
        built = "the CPU emulation, for tests"
    else:
        built = f"built by nvcc {info['nvcc']} for architectures {info['architectures']}"
    instances = loader.instances()
    lines = [f"kernels: {len(instances)} instances, {built}", f"  in {loader.path()}"]
    known = [instance for instance in instances.values() if instance.registers is not None]
    if known:
        largest, local = max(known, key=lambda i: i.registers), sum(bool(i.local_bytes) for i in known)
        lines.append(
            f"  registers a thread: {min(i.registers for i in known)} to {largest.registers} ({largest.name}), "
            f"shared memory a block: up to {max(i.shared_bytes for i in known)} bytes, "
            f"{local or 'none'} of {len(known)} with local memory"
        )
    return lines


def _pytorch() -> list[str]:
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return [f"torch: {torch.__version__}, {runtime if torch.version.hip or torch.version.cuda else 'CPU only'}"]


def _gpus() -> list[str]:
    native = loader.load()
    version = 0 if native is None else native.driver_version()
    driver = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none that the kernels could ask"
    lines = [f"driver: {driver}"]
    if not torch.cuda.is_available():
        return [*lines, "GPUs: none that torch can use (no driver, no device, or a torch without CUDA)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
        device = cuda_device(index)
        lines.append(
            f"  planned for with {device.bandwidth / 1e12:.2f} TB/s, {device.matrix_16bit / 1e12:.0f} TFLOP/s in "
            f"16 bits, {device.shared_bytes >> 10} KiB a block ({device.source})"
        )
        if native is not None and not native.build_info()["emulated"]:
            with torch.cuda.device(index):
                lines.append(f"  kernels: {loader.why_not_on(index) or 'run there'}")
    return lines


def _autotuning() -> list[str]:
    """Whether choices are measured, where what was measured is kept, and what must not run."""
    chooser = choice.chooser
    if chooser.measures:
        lines = [f'autotuning: on, "auto" on a GPU runs what was measured there ({choice.VARIABLE}=0 predicts instead)']
    else:
        lines = [f"autotuning: off, the plan's predictions decide, as {choice.VARIABLE} is 0"]
    for index in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        with torch.cuda.device(index):
            file = chooser.file(torch.device("cuda", index))
        if file is None:
            lines.append(f"  GPU {index}: kept in each process alone, as there is no home directory")
            continue
        content = file.read()
        lines.append(f"  GPU {index}: {len(content.measurements)} problems measured, in {file.path}")
        lines += [f"    excluded: {what}: {reason}" for what, reason in content.excluded.items()]
    return lines


def _calls() -> list[str]:
    """The plan of Xception's middle-flow layer on every kind of tensor that this machine has, and on an H200."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    lines = []
    for device in ("cpu", *(f"cuda:{index}" for index in gpus)):
        lines += ["", f"a call on {device} tensors:"]
        try:
            lines.append(str(_middle_flow(torch.device(device))))
        except RuntimeError as error:  # a doctor does not fall ill with the patient
            lines.append(f"  can't be planned: {error}")
    lines += ["", "the same on an H200 (predicted, not measured):", str(_middle_flow(torch.device("meta"), "H200"))]
    return lines


def _middle_flow(device: torch.device, predict_for: str | None = None) -> object:
    x = torch.empty(8, 728, 19, 19, device=device)
    weights = torch.empty(728, 1, 3, 3, device=device), torch.empty(728, 728, 1, 1, device=device)
    return explain(x, *weights, padding=1, device=predict_for)


if __name__ == "__main__":
    sys.exit(main())
