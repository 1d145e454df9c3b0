"""How long does a call take? Samples on the CPU and on a GPU, and the figures that are kept of them.

A row says in its `mode` how it was sampled:

- "plain": one call after the other. All of the CPU; on a GPU whole networks, whose milliseconds hide what the other
  modes are about.
- "cold": on a GPU, the L2 cache overwritten before each call. What a layer of a large network finds.
- "graph": on a GPU, many calls captured into one CUDA graph and replayed: no launch is waited for, and nothing is
  flushed. What a network that is captured finds; the input sets take turns, so a large problem is not found in L2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import quantiles
from typing import NamedTuple

import torch
from gpu_state import Sensor, State
from torch.utils import benchmark

Call = Callable[[], object]

Prepare = Callable[[], Sequence[Call]]
"""Makes the calls that take turns. A sampler decides under which stream: a backward runs on its forward's."""

MODES = {"cpu": ("plain",), "cuda": ("cold", "graph")}
"""Of layers, by device."""

FLUSH_BYTES = 2**30
"""Written between two runs. It empties the L2 cache (50 MB on an H200) and keeps the GPU busy for about 0.25 ms."""

MOST_GPU_SAMPLES = 400
CHUNKS = 4
"""In so many parts a GPU's samples are taken. After each the clocks are asked whether they were held back."""
GRAPH_CALLS = 20
"""In one replay, at least one of each input set."""


@dataclass
class Samples:
    """Of one call."""

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
    return Timing(
        median * 1e3,
        (upper - lower) * 1e3,
        len(samples.seconds),
        samples.throttled,
        samples.before,
        samples.after,
    )


def sample_cpu(call: Call, seconds: float, threads: int) -> Samples:
    """Runs a call for about `seconds` on a fixed number of threads; a sample is the seconds a call.

    A sample is a block of so many calls that reading the clock does not count, found in warm-up runs.
    """
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=threads)
    return Samples(timer.blocked_autorange(min_run_time=seconds).times)


class CudaSampler:
    """Samples calls on the current GPU with CUDA events, in one of the modes."""

    def __init__(self, mode: str, seconds: float) -> None:
        self._mode = mode
        self._seconds = seconds
        self._sensor = Sensor.of_current_gpu()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if mode == "cold" else None

    def __call__(self, prepare: Prepare) -> Samples:
        if self._mode == "graph":
            replay, calls = captured(prepare)
            return self._sample(replay, calls)
        return self._sample(in_turn(prepare()), 1)

    def _sample(self, call: Call, calls: int) -> Samples:
        self._run(call, 3)  # builds, searches (cudnn.benchmark) and allocates what the first calls do
        expected = min(self._run(call, 3))
        times = min(max(int(self._seconds / expected), 10), MOST_GPU_SAMPLES)
        self._run(call, max(times // 5, 2))
        samples = Samples([], before=self._sensor.read())
        for _ in range(CHUNKS):
            chunk = [seconds / calls for seconds in self._run(call, -(-times // CHUNKS))]
            state = self._sensor.read()
            samples += Samples(chunk, len(chunk) if state and state.throttled else 0, after=state)
        return samples

    def _run(self, call: Call, times: int) -> list[float]:
        """The seconds of each of so many calls.

        While the flush keeps the GPU busy, the host gets ahead: what the events enclose does not wait for launches.
        """
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in events:
            if self._flush is not None:
                self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def captured(prepare: Prepare) -> tuple[Call, int]:
    """A replay of a CUDA graph, and how many calls are in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = list(prepare())
        for call in calls * 2:  # what must not happen during a capture happens now: builds, searches, first allocations
            call()
    torch.cuda.synchronize()
    rounds = -(-GRAPH_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * rounds:
            call()

    def replay(graph: torch.cuda.CUDAGraph = graph, kept: list[Call] = calls) -> None:
        graph.replay()  # reads the tensors of `kept`, which must live as long

    return replay, rounds * len(calls)


def sampler(device: str, mode: str, seconds: float, threads: int) -> Callable[[Prepare], Samples]:
    """The way to sample calls on a device."""
    if device == "cuda":
        return CudaSampler(mode, seconds)
    return lambda prepare: sample_cpu(in_turn(prepare()), seconds, threads)


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that makes these one after the other, so that successive runs work on different data."""
    if len(calls) == 1:
        return calls[0]
    turns = cycle(calls)
    return lambda: next(turns)()
