"""How long does a call take? Samples on the CPU and on a GPU, and the figures that are kept of them.

A row says in its `mode` how it was sampled:

- "plain": one call after the other. All of the CPU; on a GPU whole networks, whose milliseconds hide what "cold" is
  about.
- "cold": on a GPU, with nothing of the call's tensors in L2 and the launches queued before the GPU is free. What a
  layer of a large network finds.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from statistics import quantiles
from typing import NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]

MODES = {"cpu": ("plain",), "cuda": ("cold",)}
"""Of layers, by device."""

QUEUED_SECONDS = 3e-4
"""At least so much of the GPU's work waits between the host and a cold call."""
MOST_GPU_SAMPLES = 400


class Timing(NamedTuple):
    median_ms: float
    iqr_ms: float
    """Interquartile range: half of the samples lie in an interval of this width."""
    samples: int


def summarize(seconds: Sequence[float]) -> Timing:
    """Needs two samples at least."""
    lower, median, upper = quantiles(seconds, method="inclusive")
    return Timing(median * 1e3, (upper - lower) * 1e3, len(seconds))


def sample_cpu(call: Call, seconds: float, threads: int) -> list[float]:
    """Runs a call for about `seconds` on a fixed number of threads; a sample is the seconds a call.

    A sample is a block of so many calls that reading the clock does not count, found in warm-up runs.
    """
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=seconds).times


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

    def __call__(self, call: Call) -> list[float]:
        self._run(call, 3)  # builds, searches (cudnn.benchmark) and allocates what the first calls do
        started = time.perf_counter()
        call()  # the queue is empty: this is the host's time
        self._queued = max(QUEUED_SECONDS, 1.5 * (time.perf_counter() - started))
        expected = min(self._run(call, 3))
        times = min(max(int(self._seconds / expected), 10), MOST_GPU_SAMPLES)
        self._run(call, max(times // 5, 2))
        return self._run(call, times)

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


def sampler(device: str, mode: str, seconds: float, threads: int) -> Callable[[Call], list[float]]:
    """The way to sample calls on a device."""
    return CudaSampler(mode, seconds) if device == "cuda" else partial(sample_cpu, seconds=seconds, threads=threads)
