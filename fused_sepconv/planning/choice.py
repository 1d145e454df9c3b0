"""The choice of "auto" on a GPU: the plan's at first, then what was measured there and proved right.

From the third call of a problem on, the plan's best candidates and PyTorch's own convolutions run on tensors like the
call's. `proof.py` compares their results; the fastest right one is kept, in the process and in a file under the user's
cache directory. A candidate with a wrong result, or whose launch failed, is excluded: "auto" never runs it again on
such a GPU. The plan decides where nothing can be measured (while a CUDA graph is captured or a compiler looks), where
nothing shall be (the variable is 0, PyTorch's deterministic flags), and where it would cost too much (memory, time,
ever-changing sizes).

    decide            what runs a call
    exclude           after a failed launch: not this one again
    launch_failed     the error to raise then
    recall            a plan with what is known of it, for `explain`; measures nothing
    generation        grows when an earlier decision may have changed
    cuda_seconds      the timer
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sepconv._version import __version__
from fused_sepconv.families.pytorch import convolutions
from fused_sepconv.native import loader
from fused_sepconv.planning import cache_file, proof
from fused_sepconv.planning.cache_file import CacheFile, Seconds
from fused_sepconv.planning.plan import Plan
from fused_sepconv.planning.problem import ELEMENT_BYTES, Candidate, DepthwiseProblem, Problem

VARIABLE = "FUSED_SEPCONV_AUTOTUNE"
BUDGET_VARIABLE = "FUSED_SEPCONV_AUTOTUNE_SECONDS"

MOST_CANDIDATES = 4  # measured candidates of a plan, at most; PyTorch's own convolutions are always among them
FIRST_MEASURED_CALL = 3
"""The call of a problem that is measured: one that comes once or twice would not earn the measurement back."""
MOST_SIZES = 16
"""Measured problems that differ in their sizes alone, at most: where there are more, they change for ever."""
BUDGET_SECONDS = 30.0  # for all measurements of a process, waiting for other processes included
PATIENCE_SECONDS = 5.0  # to wait for another process that measures the same problem
MOST_REMEMBERED = 4096  # problems that are remembered at a time, and whose calls are counted

Timer = Callable[[Callable[[], object]], float]  # seconds that a call takes on the current device and stream

Trial = Callable[[Candidate, Any, Any, tuple], Any]
"""Runs a candidate: `trial(candidate, problem, arguments, tensors)` gives a tensor (forward) or a tuple (backward)."""

AnyProblem = Problem | DepthwiseProblem

generation = 0  # grows whenever a decision that was settled before may have changed


class Decision(NamedTuple):
    candidate: Candidate  # the candidate that runs this call
    settled: bool  # whether it may be remembered, for the same problem, device and `flags`, until `generation` changes


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
        *("measured_seconds", "refusal", "excluded", "note", "recomputes"),
    }
)


def contenders(plan: Plan) -> list[Candidate]:
    """The candidates worth measuring: the fastest predicted, and always PyTorch's own convolutions."""
    able = [candidate for candidate in plan.candidates if not (candidate.refusal or candidate.excluded)]
    reference = [candidate for candidate in able if candidate.family == "pytorch"]
    others = [candidate for candidate in able if candidate.family != "pytorch"]
    return [*others[: MOST_CANDIDATES - len(reference)], *reference]


def as_known(plan: Plan, seconds: Seconds, excluded: Mapping[str, str]) -> Plan:
    """The plan with what is known of its candidates: the measured ones first, the fastest in front, then the others
    in the plan's order, then the excluded ones and those that can't run."""

    def known(candidate: Candidate) -> Candidate:
        if candidate.refusal or candidate.family == "pytorch":
            reason = ""
        else:
            reason = excluded.get(candidate.name) or excluded.get(_failure(plan.problem, candidate), "")
        # One that another build could run may be refused by this one.
        took = None if candidate.refusal or reason else seconds.get(identity(candidate))
        return replace(candidate, measured_seconds=took, excluded=reason)

    def rank(candidate: Candidate) -> tuple:
        took = candidate.measured_seconds
        return bool(candidate.refusal), bool(candidate.excluded), math.inf if took is None else took

    # Stable: of two that took the same the plan's first stays first.
    return replace(plan, candidates=tuple(sorted(map(known, plan.candidates), key=rank)))


def _failure(problem: AnyProblem, candidate: Candidate) -> str:
    """The key of an exclusion for one problem alone."""
    return f"{problem!r}: {identity(candidate)}"


def describe_environment() -> dict[str, Any]:
    """A measurement holds for this: the package and its kernels, PyTorch, and the current GPU with its driver."""
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


# The clock ------------------------------------------------------------------------------------------------------------

WARM_UP = 2  # the first run loads, searches (cudnn.benchmark) and allocates
FEWEST, MOST = 5, 20
SPENT_SECONDS = 0.05  # of GPU time, on the runs of one candidate
QUEUED_SECONDS = 3e-4  # of GPU work that waits before each run


def cuda_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the current CUDA stream."""
    return median(cuda_samples(call))


def cuda_samples(
    call: Callable[[], object],
    seconds: float = SPENT_SECONDS,
    fewest: int = FEWEST,
    most: int = MOST,
    *,
    cold: bool = True,
) -> list[float]:
    """Seconds of each of some calls on the current CUDA stream, `seconds` in all.

    Before each cold call a buffer twice the size of L2 is written and then read, until that takes QUEUED_SECONDS and as
    long again as the host may take to ask for it, and longer than the host takes for a call. So no call finds its
    inputs in L2, no dirty line is written back at its expense, and the host is ahead of the GPU: what the events
    enclose does not wait for launches.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    flush = torch.empty(2 * properties.L2_cache_size // 8, dtype=torch.int64, device="cuda") if cold else None
    host = [0.0]

    def empty_l2() -> None:
        flush.zero_()
        flush.sum()

    def timed(call: Callable[[], object], rounds: int, times: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in events:
            for _ in range(rounds):
                empty_l2()
            start.record()
            began = time.perf_counter()
            call()
            host[0] = time.perf_counter() - began
            end.record()
        events[-1][1].synchronize()
        return [max(start.elapsed_time(end) / 1e3, 1e-9) for start, end in events]

    def rounds() -> int:
        return math.ceil(max(2 * QUEUED_SECONDS, 1.5 * host[0]) / sweep) if cold else 0

    sweep = min(timed(empty_l2, 1, WARM_UP)) if cold else 0.0
    expected = timed(call, rounds(), WARM_UP)[-1]
    return timed(call, rounds(), min(max(int(seconds / expected), fewest), most))


# The choice -----------------------------------------------------------------------------------------------------------


@dataclass
class Chooser:
    """Remembers what was measured and excluded, and measures what recurs. One for all threads of a process."""

    measures: bool = True
    timer: Timer = cuda_seconds
    folder: Path | None = field(default_factory=cache_file.folder)
    """The cache file's; None keeps everything in the process alone."""
    environment: Callable[[], Mapping[str, Any]] = describe_environment  # describes the current device
    budget: float = BUDGET_SECONDS

    spent: float = field(default=0.0, init=False)
    _settled: dict[tuple, Candidate] = field(default_factory=dict, init=False)
    _seconds: dict[tuple, Seconds] = field(default_factory=dict, init=False)
    _excluded: dict[torch.device, dict[str, str]] = field(default_factory=dict, init=False)
    _calls: dict[tuple, int] = field(default_factory=dict, init=False)
    _sizes: dict[tuple, int] = field(default_factory=dict, init=False)
    _files: dict[torch.device, CacheFile] = field(default_factory=dict, init=False)
    _told: set[str] = field(default_factory=set, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def decide(self, plan: Plan, device: torch.device, trial: Trial, arguments: Any, tensors: tuple) -> Decision:
        key = (plan.problem, device, flags())
        found = self._settled.get(key)
        if found is not None:
            return Decision(found, True)
        with self._lock:  # threads that meet the same problem wait for its measurement
            found = self._settled.get(key)
            if found is not None:
                return Decision(found, True)
            known = self.recall(plan, device)
            if self._nothing_to_find(known):
                return self._settle(key, known)
            if not _may_measure():
                return Decision(known.chosen, False)
            count = self._calls.pop(key, 0) + 1
            if count < FIRST_MEASURED_CALL:
                self._calls[key] = count
                if len(self._calls) > MOST_REMEMBERED:
                    del self._calls[next(iter(self._calls))]  # the one that was not called for longest
                return Decision(known.chosen, False)
            if self._affordable(plan.problem, device, tensors):
                began = time.perf_counter()
                try:
                    known = self._measured(plan, device, trial, arguments, tensors)
                finally:
                    self.spent += time.perf_counter() - began
            return self._settle(key, known)

    def recall(self, plan: Plan, device: torch.device) -> Plan:
        """The plan with what is known of it, from this process or the file; `device` is the current one."""
        file = self.file(device)
        kept = file.read() if file else cache_file.Content({}, {})
        seconds: Seconds = {}
        if self.measures and not _deterministic():
            key = (plan.problem, device, flags())
            seconds = {**kept.measurements.get(_key(plan.problem), {}), **self._seconds.get(key, {})}
        return as_known(plan, seconds, {**kept.excluded, **self._excluded.get(device, {})})

    def exclude(
        self, problem: AnyProblem, device: torch.device, candidate: Candidate, reason: str, *, keep: bool, wrong: bool
    ) -> None:
        """Keeps "auto" from a candidate on a device: the kernel where its result was wrong, else for this problem."""
        global generation
        if candidate.family == "pytorch":
            return  # there must be something that runs
        what = candidate.name if wrong else _failure(problem, candidate)
        with self._lock:
            self._excluded.setdefault(device, {})[what] = f"{problem}: {reason}"
            self._settled.clear()
            generation += 1
            if keep:
                self._keep(device, excluded={what: f"{problem}: {reason}"})

    def file(self, device: torch.device) -> CacheFile | None:
        """Where the measurements of a device, the current one, are kept."""
        if self.folder is None:
            return None
        if device not in self._files:
            self._files[device] = CacheFile(self.folder, self.environment())
        return self._files[device]

    def _settle(self, key: tuple, plan: Plan) -> Decision:
        if len(self._settled) >= MOST_REMEMBERED:
            self._settled.clear()  # what was measured stays in `_seconds`
        self._settled[key] = plan.chosen
        return Decision(plan.chosen, True)

    def _nothing_to_find(self, plan: Plan) -> bool:
        candidates = contenders(plan)
        return (
            not self.measures
            or _deterministic()
            or len(candidates) < 2
            or not plan.problem.N
            # Another build of the package may plan other candidates than those that were measured.
            or all(candidate.measured_seconds is not None for candidate in candidates)
        )

    def _affordable(self, problem: AnyProblem, device: torch.device, tensors: tuple) -> bool:
        if self.spent >= self.budget:
            self._tell(
                "time",
                f"{BUDGET_VARIABLE}: the {self.budget:g} s of this process are spent; the plan chooses from now on",
            )
            return False
        layer = replace(problem, N=0, H=0, W=0, out_h=0, out_w=0, padding=(0, 0, 0, 0)), device
        if self._sizes.get(layer, 0) >= MOST_SIZES:
            self._tell(
                "sizes",
                f"{problem} is measured for {MOST_SIZES} sizes; the plan chooses for more of them, "
                "as for any layer whose sizes keep changing",
            )
            return False
        if _needed_bytes(problem, tensors) > _free_bytes(device):
            return False
        self._sizes[layer] = self._sizes.get(layer, 0) + 1
        return True

    def _measured(self, plan: Plan, device: torch.device, trial: Trial, arguments: Any, tensors: tuple) -> Plan:
        """The plan as it is known after measuring it, here or in another process meanwhile."""
        key, file = _key(plan.problem), self.file(device)
        with file.measuring(key, PATIENCE_SECONDS) if file else nullcontext():
            known = self.recall(plan, device)
            if self._nothing_to_find(known):
                return known
            try:
                seconds = self._measure(known, device, trial, arguments, tensors)
            except torch.OutOfMemoryError:
                return self.recall(plan, device)
            except RuntimeError as error:
                if not _answers(device):
                    raise
                self._tell("fail", f"{plan.problem} and perhaps others run by prediction, as measuring failed: {error}")
                return self.recall(plan, device)
            self._seconds[plan.problem, device, flags()] = seconds
            self._keep(device, measurements={key: seconds})
        return self.recall(plan, device)

    def _measure(self, plan: Plan, device: torch.device, trial: Trial, arguments: Any, tensors: tuple) -> Seconds:
        """Seconds of each candidate whose result is right; the others are excluded."""
        problem = plan.problem
        # Nothing of the call's own is touched: no tensor, no random state, no graph.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            own = tensors_like(problem, arguments, tensors)
            candidates = {identity(candidate): candidate for candidate in contenders(plan)}
            (reference,) = (name for name, candidate in candidates.items() if candidate.family == "pytorch")
            eager = proof.as_results(trial(candidates[reference], problem, arguments, own))
            results: dict[str, proof.Results] = {}
            for name, candidate in candidates.items():
                if name == reference:
                    continue
                _synchronize(device)  # what fails after this is this candidate's own
                try:
                    results[name] = proof.as_results(trial(candidate, problem, arguments, own))
                    _synchronize(device)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    failure = self._failed(problem, device, candidate, error.__cause__ or error)
                    if not _answers(device):
                        raise failure from error
            wrong = proof.faults(problem, arguments, own, eager, results)
            right = [name for name in candidates if name == reference or (name in results and name not in wrong)]
            for name, reason in wrong.items():
                self._wrong(problem, device, candidates[name], reason)
            del results, eager
            return {name: self.timer(partial(trial, candidates[name], problem, arguments, own)) for name in right}

    def _failed(
        self, problem: AnyProblem, device: torch.device, candidate: Candidate, error: BaseException
    ) -> RuntimeError:
        """Excludes a candidate that failed when nothing else was running."""
        self.exclude(problem, device, candidate, f"its launch failed: {error}", keep=True, wrong=False)
        self._tell(f"failed {candidate.name}", f"{candidate.name} failed for {problem} and is left out there: {error}")
        return _launch_error(problem, candidate, error)

    def _wrong(self, problem: AnyProblem, device: torch.device, candidate: Candidate, reason: str) -> None:
        self.exclude(problem, device, candidate, f"wrong result: {reason}", keep=True, wrong=True)
        self._tell(
            f"wrong {candidate.name}",
            f'the kernel {candidate.name} gave a wrong result for {problem}: {reason}. "auto" does not run it '
            "on this GPU again; calls before this one may have. Please report this message, with the output of "
            "`python -m fused_sepconv`, as an issue of the project",
        )

    def _keep(self, device: torch.device, **content: Mapping) -> None:
        file = self.file(device)
        if file is None:
            return
        try:
            file.add(**content)
        except OSError as error:
            self._tell("keep", f"measurements last for this process only, as {file.path} can't be written: {error}")

    def _tell(self, about: str, message: str) -> None:
        """Once a process, not once a layer."""
        if about not in self._told:
            self._told.add(about)
            warnings.warn(f"{VARIABLE}: {message}", stacklevel=2)


def tensors_like(problem: AnyProblem, arguments: Any, tensors: tuple) -> tuple[Tensor | None, ...]:
    """Random tensors laid out like a call's. The weights are scaled so that all results are about 1 in size, and a
    backward's output is that of its inputs."""
    device = tensors[0].device
    generator, images = torch.Generator(device).manual_seed(0), proof.images(problem, tensors)
    own = [None if tensor is None else random_like(tensor, generator) for tensor in tensors]
    for position, tensor in enumerate(own):
        if tensor is not None and position not in images and tensor.dim() == 4:
            tensor.div_(math.sqrt(max(tensor[0].numel(), 1)))
    if problem.direction == "backward" and own[-1] is not None:
        depthwise = isinstance(problem, DepthwiseProblem)
        forward = convolutions.depthwise_forward if depthwise else convolutions.forward
        own[-1].copy_(forward(*own[1:-1], *arguments))
    return tuple(own)


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of normal random numbers with memory of its own, and the shape, strides and alignment of another."""
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = offset + extent + 1 if tensor.numel() else offset
    values = torch.empty(length, dtype=tensor.dtype, device=tensor.device).normal_(generator=generator)
    return values.as_strided(tensor.shape, tensor.stride(), offset)


def flags() -> tuple[bool, ...]:
    """The flags that a decision depends on, beside what the problem knows: part of every key that remembers one."""
    cudnn = torch.backends.cudnn
    return _deterministic(), cudnn.enabled, cudnn.benchmark


def _deterministic() -> bool:
    """Whether PyTorch is asked for the same bits in every run: a measurement might choose otherwise in the next."""
    return torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic


def _key(problem: AnyProblem) -> str:
    cudnn = torch.backends.cudnn
    return f"{problem!r}" + (" cudnn.benchmark" if cudnn.benchmark else "") + ("" if cudnn.enabled else " no cudnn")


def _may_measure() -> bool:
    """Whether what runs now is the caller's work, and not recorded by a CUDA graph or run by a compiler to see it.

    Tracers and dispatch modes (`FlopCounterMode`) are through with a call before its operator's implementation runs.
    """
    return not _capturing() and not torch.compiler.is_compiling()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _needed_bytes(problem: AnyProblem, tensors: tuple) -> int:
    """Device memory, at most: tensors like the call's, every candidate's result, intermediates, the proof's."""
    given = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    intermediate = problem.pixels * problem.K * ELEMENT_BYTES[problem.dtype]
    result = problem.y_bytes if problem.direction == "forward" else problem.x_bytes
    return given + MOST_CANDIDATES * (result + intermediate) + 2 * max(proof.CHUNK_BYTES, proof.image_bytes(problem))


def _free_bytes(device: torch.device) -> float:
    """Free device memory, with that which PyTorch's allocator keeps for later."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _answers(device: torch.device) -> bool:
    """Whether the device still works, once all that runs on it is done: some errors end the process's use of it."""
    try:
        _synchronize(device)
    except RuntimeError:
        return False
    return True


def _launch_error(problem: AnyProblem, candidate: Candidate, error: BaseException) -> RuntimeError:
    return RuntimeError(f"{candidate.name} failed for {problem}: {error}")


# The process's --------------------------------------------------------------------------------------------------------


def _from_environment() -> Chooser:
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
    given = os.environ.get(BUDGET_VARIABLE) or str(BUDGET_SECONDS)
    try:
        budget = float(given)
    except ValueError:
        budget = math.nan
    if not budget >= 0:
        raise ValueError(f"{BUDGET_VARIABLE}: expected seconds, got {given!r}")
    return Chooser(value == "1", budget=budget)


chooser = _from_environment()  # the process's


def decide(plan: Plan, device: torch.device, trial: Trial, arguments: Any, tensors: tuple) -> Decision:
    """Decides what "auto" runs for a call on a GPU, the current device; may measure first, on tensors of its own."""
    return chooser.decide(plan, device, trial, arguments, tensors)


def recall(plan: Plan, device: torch.device) -> Plan:
    """The plan with what is known of it; measures nothing. `device` is the current one."""
    return chooser.recall(plan, device)


def exclude(plan_problem: AnyProblem, device: torch.device, candidate: Candidate, reason: str) -> None:
    """Keeps "auto" from running a candidate for a problem on a device again.

    In the file too, unless the device answers no more: then the fault may be that of any kernel before this one.
    """
    # A capture must not be synchronised.
    keep = not _capturing() and _answers(device)
    chooser.exclude(plan_problem, device, candidate, reason, keep=keep, wrong=False)


def launch_failed(problem: AnyProblem, device: torch.device, candidate: Candidate, error: RuntimeError) -> RuntimeError:
    """The error to raise where running a candidate failed: it names kernel and problem.

    Excludes the candidate where the native module refused the launch, but for want of memory, which may pass. An error
    of PyTorch's own comes back as it is.
    """
    text = str(error)
    if not text.startswith("fused_sepconv: "):
        return error
    if "cudaErrorMemoryAllocation" not in text:
        exclude(problem, device, candidate, f"its launch failed: {text}")
    return _launch_error(problem, candidate, error)
