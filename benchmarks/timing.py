"""How long does a call take? Samples on the CPU and on a GPU, and the two figures that are kept of them."""

from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import quantiles
from typing import NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]

FLUSH_BYTES = 2**30
"""Written between two runs. It empties the L2 cache (50 MB on an H200) and keeps the GPU busy for about 0.25 ms."""

MOST_GPU_SAMPLES = 1000


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
    """Runs a call for about `seconds` on a fixed number of threads and returns each sample's seconds a call.

    A sample is a block of so many calls that reading the clock does not count, found in warm-up runs.
    """
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=seconds).times


def sample_cuda(call: Call, seconds: float) -> list[float]:
    """Runs a call on the current CUDA stream for about `seconds` of GPU time and returns each run's seconds.

    Before each run a large buffer is overwritten, so that no run finds its inputs in L2. Meanwhile the host gets ahead,
    so that what the events enclose is not kept waiting by the launches.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def run(times: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    run(3)  # builds, searches (cudnn.benchmark) and allocates what the first calls do
    expected = min(run(3))
    warm_up, measured = (min(max(int(share * seconds / expected), 5), MOST_GPU_SAMPLES) for share in (0.2, 1.0))
    run(warm_up)
    return run(measured)


def sampler(device: str, seconds: float, threads: int) -> Callable[[Call], list[float]]:
    """The way to sample calls on a device."""
    if device == "cuda":
        return lambda call: sample_cuda(call, seconds)
    return lambda call: sample_cpu(call, seconds, threads)


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that makes these one after the other, so that successive runs work on different data."""
    if len(calls) == 1:
        return calls[0]
    turns = cycle(calls)
    return lambda: next(turns)()
