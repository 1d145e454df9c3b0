"""How long does a call take? Samples on the CPU and on a GPU, and the figures that are kept of them.

A row says in its `mode` how it was sampled:

- "plain": one call after the other. All of the CPU; on a GPU whole networks, whose milliseconds hide what "cold" is
  about.
- "cold": on a GPU, with nothing of the call's tensors in L2 and the launches queued before the GPU is free. What a
  layer of a large network finds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import quantiles
from typing import NamedTuple

from torch.utils import benchmark

from fused_sepconv.planning.choice import cuda_samples

Call = Callable[[], object]

MODES = {"cpu": ("plain",), "cuda": ("cold",)}  # modes of layers, by device

MOST_GPU_SAMPLES = 400


class Timing(NamedTuple):
    median_ms: float
    iqr_ms: float  # interquartile range: half of the samples lie in an interval of this width
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


def sampler(device: str, mode: str, seconds: float, threads: int) -> Callable[[Call], list[float]]:
    """The way to sample calls on a device."""
    if device == "cuda":
        return partial(cuda_samples, seconds=seconds, fewest=10, most=MOST_GPU_SAMPLES, cold=mode == "cold")
    return partial(sample_cpu, seconds=seconds, threads=threads)
