"""How long does a call take? Samples on the CPU and on a GPU, and the figures that are kept of them.

A row says in its `mode` how it was sampled:

- "plain": one call after the other. All of the CPU; on a GPU whole networks, whose milliseconds hide what "cold" is
  about.
- "cold": on a GPU, with nothing of the call's tensors in L2 and the launches queued before the GPU is free. What a
  layer of a large network finds.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from math import ceil
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]

MODES = {"cpu": ("plain",), "cuda": ("cold",)}
"""Of layers, by device."""

QUEUED_SECONDS = 3e-4
"""At least so much of the GPU's work waits between the host and a cold call."""
MOST_GPU_SAMPLES = 400
CHUNKS = 4
"""In so many parts a GPU's samples are taken. After each the clocks are asked whether they were held back."""

THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's reasons for lower clocks (nvml.h, nvmlClocksThrottleReason*), without those that are no fault."""


class State(NamedTuple):
    """Clocks, power and heat of a GPU at one moment."""

    sm_mhz: int
    memory_mhz: int
    power_w: float
    temperature_c: int
    throttled: tuple[str, ...]
    """Why the clocks are held back now; empty where they are not."""


def gpu_state(nvml: Any, handle: Any) -> State | None:
    """Asks NVML; None where there is none, and on a MIG slice or a virtual GPU, which answer some questions only."""
    if nvml is None:
        return None
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return State(
            sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(reason for bit, reason in THROTTLING.items() if reasons & bit),
        )
    except nvml.NVMLError:
        return None


@cache
def current_gpu() -> tuple[Any, Any]:
    """NVML and its handle of the current GPU, by UUID: NVML numbers all GPUs, CUDA those that it may see."""
    with suppress(ModuleNotFoundError):
        import pynvml

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    return None, None


@dataclass
class Samples:
    """Seconds of one call, again and again."""

    seconds: list[float]
    throttled: int = 0
    """So many of them were taken while the GPU held its clocks back for heat or power."""
    before: State | None = None
    after: State | None = None

    def __add__(self, later: "Samples") -> "Samples":
        return Samples(self.seconds + later.seconds, self.throttled + later.throttled, self.before, later.after)


class Timing(NamedTuple):
    median_ms: float
    iqr_ms: float
    """Interquartile range: half of the samples lie in an interval of this width."""
    samples: int
    throttled: int = 0
    before: State | None = None
    after: State | None = None


def summarize(samples: Samples) -> Timing:
    """Needs two samples at least."""
    lower, median, upper = quantiles(samples.seconds, method="inclusive")
    spread = (upper - lower) * 1e3
    return Timing(median * 1e3, spread, len(samples.seconds), samples.throttled, samples.before, samples.after)


def sample_cpu(call: Call, seconds: float, threads: int) -> Samples:
    """Runs a call for about `seconds` on a fixed number of threads; a sample is the seconds a call.

    A sample is a block of so many calls that reading the clock does not count, found in warm-up runs.
    """
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=threads)
    return Samples(timer.blocked_autorange(min_run_time=seconds).times)


class Flush:
    """Empties a GPU's L2 between two calls, and keeps the GPU busy while the host gets ahead.

    It writes twice what L2 holds and then reads it: dirty lines go to memory now, and not inside the next measurement.
    """

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.empty(2 * l2_bytes // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.empty((), device="cuda")
        self._sweep()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            self._sweep()
        end.record()
        torch.cuda.synchronize()
        self.sweep_seconds = start.elapsed_time(end) / 1e3 / 10

    def _sweep(self) -> None:
        self._buffer.zero_()
        torch.sum(self._buffer, dim=0, out=self._sum)

    def __call__(self, seconds: float) -> None:
        """Queues work for at least so long."""
        for _ in range(ceil(seconds / self.sweep_seconds)):
            self._sweep()


class CudaSampler:
    """Samples calls on the current GPU with CUDA events, in one of the modes."""

    def __init__(self, mode: str, seconds: float) -> None:
        self._seconds = seconds
        self._flush = Flush() if mode == "cold" else None
        self._queued = QUEUED_SECONDS

    def __call__(self, call: Call) -> Samples:
        self._run(call, 3)  # builds, searches (cudnn.benchmark) and allocates what the first calls do
        started = time.perf_counter()
        call()  # the queue is empty: this is the host's time
        self._queued = max(QUEUED_SECONDS, 1.5 * (time.perf_counter() - started))
        expected = min(self._run(call, 3))
        times = min(max(int(self._seconds / expected), 10), MOST_GPU_SAMPLES)
        self._run(call, max(times // 5, 2))
        samples = Samples([], before=gpu_state(*current_gpu()))
        for _ in range(CHUNKS):
            chunk = self._run(call, -(-times // CHUNKS))
            state = gpu_state(*current_gpu())
            samples += Samples(chunk, len(chunk) if state and state.throttled else 0, after=state)
        return samples

    def _run(self, call: Call, times: int) -> list[float]:
        """The seconds of each of so many calls.

        While the flush keeps the GPU busy, the host gets ahead: what the events enclose does not wait for launches.
        """
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in events:
            if self._flush is not None:
                self._flush(self._queued)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def sampler(device: str, mode: str, seconds: float, threads: int) -> Callable[[Call], Samples]:
    """The way to sample calls on a device."""
    return CudaSampler(mode, seconds) if device == "cuda" else partial(sample_cpu, seconds=seconds, threads=threads)
