"""Autotuning: with `FUSED_SEPCONV_AUTOTUNE=1`, "auto" runs what a measurement on the GPU says, not a prediction.

The first call of a problem times the plan's best few candidates on tensors of its own, and remembers what each took, in
the process and in a file under the user's cache directory. The plan decides as before where nothing can be timed: while
a CUDA graph is captured, while a compiler runs an operator to see what it gives, or after memory ran out.

    tuner.recall    a plan with what is known of it, from this process or the file; times nothing
    tuner.decide    the same, measured where it is not known
    CacheFile       what was measured, on disk: data only, of one environment
    cuda_seconds    the timer
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fused_sepconv._version import __version__
from fused_sepconv.native import loader
from fused_sepconv.planning.plan import Plan
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Problem

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VARIABLE = "FUSED_SEPCONV_AUTOTUNE"

MOST_CANDIDATES = 4
"""That are timed of a plan; PyTorch's own convolutions are always among them."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes on the current device and stream."""

Trial = Callable[[Candidate, Any, Any, tuple], object]
"""Runs a candidate: `trial(candidate, problem, arguments, tensors)`."""

Seconds = dict[str, float]
"""What the candidates of a problem took, by `identity`."""


def identity(candidate: Candidate) -> str:
    """Everything of a candidate that decides what runs: a kernel cut otherwise is another candidate."""
    parts = [candidate.family, candidate.name]
    for what in fields(Candidate):
        value = getattr(candidate, what.name)
        if what.name == "steps":
            parts += [f"({identity(step)})" for step in value]
        elif what.name not in _NOT_WHAT_RUNS and value != what.default:
            parts.append(str(value))
    return "; ".join(parts)


_NOT_WHAT_RUNS = frozenset(
    {
        *("family", "name"),  # they lead
        *("bytes", "requested_bytes", "flops", "blocks", "waves", "shared_bytes", "predicted_seconds"),
        *("measured_seconds", "refusal", "note"),
    }
)


def contenders(plan: Plan) -> list[Candidate]:
    """The candidates worth timing: the fastest predicted, and always PyTorch's own convolutions."""
    able = [candidate for candidate in plan.candidates if not candidate.refusal]
    reference = [candidate for candidate in able if candidate.family == "reference"]
    others = [candidate for candidate in able if candidate.family != "reference"]
    return [*others[: MOST_CANDIDATES - len(reference)], *reference]


def as_measured(plan: Plan, seconds: Seconds) -> Plan:
    """The plan with what its candidates took: the measured ones first, the fastest of them in front."""
    # One that another build could run may be refused by this one.
    candidates = [c if c.refusal else replace(c, measured_seconds=seconds.get(identity(c))) for c in plan.candidates]
    # Stable: the others stay in the plan's order, and of two that took the same the plan's first stays first.
    candidates.sort(key=lambda c: math.inf if c.measured_seconds is None else c.measured_seconds)
    return replace(plan, candidates=tuple(candidates))


def describe_environment() -> dict[str, Any]:
    """What a measurement holds for: this package and its kernels, PyTorch, and the current GPU with its driver."""
    info = loader.build_info() or {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "fused_sepconv": __version__,
        "kernels": info.get("sources"),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    """The kernel driver's version, and the CUDA version that the user-space driver speaks."""
    native = loader.load()
    cuda = str(native.driver_version()) if native else ""
    try:
        return f"{Path('/sys/module/nvidia/version').read_text().strip()}, CUDA {cuda}"
    except OSError:  # a sandbox without it
        return f"CUDA {cuda}"


def cache_folder() -> Path | None:
    """`fused_sepconv/` in the user's cache directory, as the XDG base directories have it; None without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "fused_sepconv"
    try:
        return Path.home() / ".cache" / "fused_sepconv"
    except RuntimeError:
        return None


# The file -------------------------------------------------------------------------------------------------------------


class CacheFile:
    """What was measured in one environment: {"environment": {...}, "measurements": {problem: {candidate: seconds}}}.

    Its name carries the environment, so that versions and GPUs do not touch one another's. Whatever it can't use of a
    file it takes for not measured.
    """

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        self._environment = dict(environment)
        text = json.dumps(self._environment, sort_keys=True)
        gpu = re.sub(r"\W+", "-", str(self._environment.get("gpu")))
        self.path = folder / f"autotune-{gpu}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"

    def read(self) -> dict[str, Seconds]:
        """What it holds; nothing where there is no file, or where it is damaged or of another environment."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("environment") != self._environment:
            return {}
        measurements = content.get("measurements")
        if not isinstance(measurements, dict):
            return {}
        return {problem: seconds for problem, seconds in measurements.items() if _are_seconds(seconds)}

    def add(self, measurements: Mapping[str, Seconds]) -> None:
        """Writes these too. Readers see the old file or the new one; an OSError says why it can't be written."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone_in(self.path.parent):
            content = {"environment": self._environment, "measurements": {**self.read(), **measurements}}
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise


def _are_seconds(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(type(seconds) is float and 0 < seconds < math.inf for seconds in value.values())
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing in a folder meanwhile, so that none loses what another adds.

    Where the file system has no locks, or a writer was stopped while it held this one, it goes on without after a
    second: a lost measurement is made again.
    """
    handle = None
    try:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            for _ in range(100 if fcntl else 0):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
        yield
    finally:
        if handle is not None:
            os.close(handle)


# The clock ------------------------------------------------------------------------------------------------------------

WARM_UP = 2  # the first run loads, searches (cudnn.benchmark) and allocates
FEWEST, MOST = 5, 20
SPENT_SECONDS = 0.05  # of GPU time, on the runs of one candidate
QUEUED_SECONDS = 3e-4  # of GPU work that waits before each run


def cuda_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the current CUDA stream.

    Before each run a buffer twice the size of L2 is written and then read, until that takes QUEUED_SECONDS and as long
    again as the host may take to ask for it. So no run finds its inputs in L2, no dirty line is written back at its
    expense, and the host is ahead of the GPU: what the events enclose does not wait for launches.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(2 * properties.L2_cache_size // 8, dtype=torch.int64, device="cuda")

    def empty_l2() -> None:
        flush.zero_()
        flush.sum()

    def timed(call: Callable[[], object], rounds: int, times: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in events:
            for _ in range(rounds):
                empty_l2()
            start.record()
            call()
            end.record()
        events[-1][1].synchronize()
        return [max(start.elapsed_time(end) / 1e3, 1e-9) for start, end in events]

    rounds = math.ceil(2 * QUEUED_SECONDS / min(timed(empty_l2, 1, WARM_UP)))
    expected = timed(call, rounds, WARM_UP)[-1]
    return median(timed(call, rounds, min(max(int(SPENT_SECONDS / expected), FEWEST), MOST)))


# The tuner ------------------------------------------------------------------------------------------------------------


@dataclass
class Tuner:
    """Remembers measurements and, where there is none yet, makes it. One for all threads of a process."""

    timer: Timer = cuda_seconds
    folder: Path | None = field(default_factory=cache_folder)
    """Of the cache file; None keeps measurements in the process alone."""
    environment: Callable[[], Mapping[str, Any]] = describe_environment
    """Of the current device."""

    _plans: dict[tuple, Plan] = field(default_factory=dict, init=False)
    _files: dict[torch.device, CacheFile] = field(default_factory=dict, init=False)
    _warned: set[str] = field(default_factory=set, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def known(self, problem: Problem | DepthwiseProblem, device: torch.device) -> Plan | None:
        """The plan that is settled for a problem; None before it was asked for."""
        return self._plans.get((problem, device, _library_settings()))

    def recall(self, plan: Plan, device: torch.device) -> Plan:
        """The plan, with what is known of it; `device` is the current one."""
        found = self.known(plan.problem, device)
        if found is not None:
            return found
        candidates = contenders(plan)
        if len(candidates) < 2 or not plan.problem.N:
            return self._settle(plan, device)  # there is nothing to find out
        file = self.file(device)
        seconds = file.read().get(_key(plan.problem), {}) if file else {}
        # Another build of the package may plan other candidates than those that were timed.
        if not {identity(candidate) for candidate in candidates} <= seconds.keys():
            return plan
        return self._settle(as_measured(plan, seconds), device)

    def decide(self, plan: Plan, device: torch.device, trial: Trial, arguments: Any, tensors: tuple) -> Plan:
        """`recall`, after timing the plan's contenders on tensors like these where that is still to be done."""
        with self._lock:  # threads that meet the same problem wait for its measurement
            found = self.recall(plan, device)
            if self.known(plan.problem, device) is not None or not _may_time():
                return found
            try:
                seconds = self._measure(plan, device, trial, arguments, tensors)
            except RuntimeError as error:  # out of memory is one; a kernel that failed comes back with the next call
                self._warn(
                    "time", f"{plan.problem} and perhaps others run by prediction, as timing them failed: {error}"
                )
                return self._settle(plan, device)
            self._keep(_key(plan.problem), seconds, device)
            return self._settle(as_measured(plan, seconds), device)

    def _settle(self, plan: Plan, device: torch.device) -> Plan:
        self._plans[plan.problem, device, _library_settings()] = plan
        return plan

    def file(self, device: torch.device) -> CacheFile | None:
        """Where the measurements of a device, the current one, are kept."""
        if self.folder is None:
            return None
        if device not in self._files:
            self._files[device] = CacheFile(self.folder, self.environment())
        return self._files[device]

    def _measure(self, plan: Plan, device: torch.device, trial: Trial, arguments: Any, tensors: tuple) -> Seconds:
        # Nothing of the call's own is touched: no tensor, no random state, no graph.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            generator = torch.Generator(device).manual_seed(0)
            own = tuple(None if tensor is None else random_like(tensor, generator) for tensor in tensors)
            calls = {identity(c): partial(trial, c, plan.problem, arguments, own) for c in contenders(plan)}
            return {name: self.timer(call) for name, call in calls.items()}

    def _keep(self, key: str, seconds: Seconds, device: torch.device) -> None:
        file = self.file(device)
        if file is None:
            return
        try:
            file.add({key: seconds})
        except OSError as error:
            self._warn("keep", f"measurements last for this process only, as {file.path} can't be written: {error}")

    def _warn(self, about: str, message: str) -> None:
        """Once a process, not once a layer."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"{VARIABLE}: {message}", stacklevel=2)


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of normal random numbers with memory of its own, and the shape, strides and alignment of another."""
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = offset + extent + 1 if tensor.numel() else offset
    values = torch.empty(length, dtype=tensor.dtype, device=tensor.device).normal_(generator=generator)
    return values.as_strided(tensor.shape, tensor.stride(), offset)


def _key(problem: Problem | DepthwiseProblem) -> str:
    return f"{problem!r}{_library_settings()}"


def _library_settings() -> str:
    """The flags that PyTorch's own convolutions go by, beside what the problem knows."""
    cudnn = torch.backends.cudnn
    return (" cudnn.benchmark" if cudnn.benchmark else "") + (" cudnn.deterministic" if cudnn.deterministic else "")


def _may_time() -> bool:
    """Whether what runs now is the caller's work, and not recorded by a CUDA graph or run by a compiler to see it.

    Tracers and dispatch modes (`FlopCounterMode`) are through with a call before its operator's implementation runs.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not capturing and not torch.compiler.is_compiling()


def _from_environment() -> Tuner | None:
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
    return Tuner() if value == "1" else None


generation = 0
"""Grows when an earlier choice may have changed."""

tuner = _from_environment()
"""The process's tuner, None where the variable is not set."""
