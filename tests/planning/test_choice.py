"""The choice on a GPU: what recurs is measured once, proved and kept, and nothing of the caller's is touched.

The kernels run emulated, on CPU tensors that are planned for as on a GPU, under a clock that the tests set.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_sepconv
from fused_sepconv import __main__ as doctor
from fused_sepconv.families import registry
from fused_sepconv.native import loader
from fused_sepconv.ops import calls, eager, launching, operators
from fused_sepconv.ops.problems import ALL_KERNELS
from fused_sepconv.planning import choice
from fused_sepconv.planning.choice import Chooser, Decision, contenders, identity
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import plan
from fused_sepconv.planning.problem import Candidate, Kernels
from tests.planning.test_plan import MIDDLE
from tests.support.emulation import emulated_kernels

H200 = DEVICES["H200"]
CPU = torch.device("cpu")
ENVIRONMENT = {"gpu": "a GPU, emulated", "driver": "1"}
FAMILIES = ("pytorch", "simt", "split", "mma")


class Clock:
    """A timer that runs what it times, and says what the test has set: seconds by family and direction."""

    def __init__(self, fastest: str = "simt", backward: str = "split") -> None:
        self.fastest = {"forward": fastest, "backward": backward}
        self.timed: list[tuple[str, str]] = []

    def __call__(self, call: Any) -> float:
        candidate, problem = call.args[:2]
        self.timed.append((problem.direction, candidate.family))
        call()
        return 1e-6 if candidate.family == self.fastest[problem.direction] else 5e-6


def no_clock(call: Callable[[], object]) -> float:
    raise AssertionError("something was measured")


@contextmanager
def gpu_in_the_making(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the context "auto" asks the plan about CPU tensors too, and plans for them as for an H200."""
    here = launching._here
    with emulated_kernels(checked=False), fused_sepconv.use_backend("auto"):
        patch.setattr(launching, "_here", lambda *device: (H200, here(*device)[1]))
        patch.setattr(operators, "asks_the_plan", lambda x, backend: backend != "reference")
        patch.setattr(calls, "MEASURES_CPU", True)
        eager.clear()
        yield
    eager.clear()


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with gpu_in_the_making(monkeypatch):
        yield


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Chooser]:
    """Begins as a new process would: with nothing but the file to remember by."""

    def start(timer: Callable, folder: Path | None = tmp_path, environment: dict = ENVIRONMENT, **rest: Any) -> Chooser:
        chooser = Chooser(timer=timer, folder=folder, environment=lambda: environment, **rest)
        monkeypatch.setattr(choice, "chooser", chooser)
        eager.clear()
        return chooser

    return start


def inputs(features: int = 8, dtype: torch.dtype = torch.bfloat16, n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, 8, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    return x, torch.randn(8, 1, 3, 3, dtype=dtype), torch.randn(features, 8, 1, 1, dtype=dtype)


def call(*tensors: Tensor, times: int = 1, **options: Any) -> Tensor:
    tensors = tensors or inputs()
    return [fused_sepconv.separable_conv2d(*tensors, padding=1, **options) for _ in range(times)][-1]


def chosen(*tensors: Tensor, direction: str = "forward") -> Candidate:
    """What "auto" runs, as `explain` says."""
    return getattr(fused_sepconv.explain(*(tensors or inputs()), padding=1), direction).chosen


@contextmanager
def deciding() -> Iterator[list[tuple[str, bool]]]:
    """Notes the decision of each call: (family, settled). No prepared call remembers one, so that each call asks."""
    found: list[tuple[str, bool]] = []

    def noting(*args: Any) -> Decision:
        found.append((decision := decide(*args)) and (decision.candidate.family, decision.settled))
        return decision._replace(settled=False)

    decide = choice.decide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "decide", noting)
        eager.clear()
        yield found
    eager.clear()


def test_a_settled_decision_is_remembered_by_the_prepared_call_until_the_generation_changes(start, monkeypatch):
    asked = []
    decide = choice.decide
    monkeypatch.setattr(choice, "decide", lambda *args: asked.append(args) or decide(*args))
    start(Clock("mma"))
    tensors = inputs()
    call(*tensors, times=5)
    assert len(asked) == 3
    monkeypatch.setattr(choice, "generation", choice.generation + 1)
    call(*tensors)
    assert len(asked) == 4


# Choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_third_call_on_what_took_least_runs(family, start):
    clock = Clock(family)
    start(clock)
    tensors = inputs()
    with deciding() as found:
        call(*tensors, times=2)
        assert found == [("simt", False)] * 2 and clock.timed == []  # the plan's
        y = call(*tensors, times=2)
    assert found[2:] == [(family, True)] * 2
    assert sorted(clock.timed) == sorted(("forward", family) for family in FAMILIES)
    assert chosen(*tensors).family == family
    with fused_sepconv.use_backend("reference"):
        torch.testing.assert_close(y, call(*tensors), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("activations", [{}, {"activation": "relu"}, {"mid_activation": "relu6", "activation": "silu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_backward_is_measured_too_and_its_right_kernels_are_found_right(dtype, activations, start):
    clock = Clock("pytorch", backward="split")
    start(clock)
    tensors = [tensor.requires_grad_() for tensor in inputs(16, dtype, n=3)]
    for _ in range(3):
        ours = torch.autograd.grad(call(*tensors, **activations).float().square().sum(), tensors)
    explained = fused_sepconv.explain(*tensors, padding=1, **activations)
    for made in (explained.saving or explained.forward, explained.backward):
        able = {candidate.family for candidate in contenders(made)}
        assert {family for direction, family in clock.timed if direction == made.problem.direction} == able
        assert not any(candidate.excluded for candidate in made.candidates)
    if dtype == torch.float32:
        with fused_sepconv.use_backend("reference"):
            theirs = torch.autograd.grad(call(*tensors, **activations).square().sum(), tensors)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)  # sums that cancel, in another order


@pytest.mark.parametrize("fastest", ["pytorch", "simt", "depthwise"])
def test_a_depthwise_convolution_by_itself_is_measured_too(fastest, start):
    clock = Clock(fastest, backward=fastest)
    start(clock)
    x, weight, _ = (tensor.requires_grad_() for tensor in inputs())
    with deciding() as found:
        for _ in range(3):
            y = fused_sepconv.depthwise_conv2d(x, weight, padding=1, activation="silu")
            torch.autograd.grad(y.sum(), (x, weight))
    assert found[-2:] == [(fastest, True)] * 2
    assert {direction for direction, _ in clock.timed} == {"forward", "backward"}


def test_at_most_four_are_measured_and_pytorch_is_one_of_them():
    made = plan(MIDDLE, H200, ALL_KERNELS)
    first = dataclasses.replace(made.chosen, predicted_seconds=1e-9)
    crowd = tuple(dataclasses.replace(first, name=f"number {i}") for i in range(9))
    refused = dataclasses.replace(first, name="refused", refusal="no")
    wrong = dataclasses.replace(first, name="wrong", excluded="wrong")
    found = contenders(dataclasses.replace(made, candidates=(refused, wrong, *crowd, *made.candidates)))
    assert [candidate.name for candidate in found] == ["number 0", "number 1", "number 2", "pytorch"]


def test_of_equal_times_the_plans_first_wins_and_what_can_not_run_does_not():
    made = plan(MIDDLE, H200, ALL_KERNELS)
    seconds = {identity(candidate): 1e-6 for candidate in made.candidates}
    assert choice.as_known(made, seconds, {}).chosen.name == made.chosen.name
    without = plan(MIDDLE, H200, Kernels(frozenset(), "none were built"))
    assert choice.as_known(without, seconds, {}).chosen.family == "pytorch"


@pytest.mark.parametrize("flag", ["benchmark", "deterministic"])
def test_flags_that_change_between_calls_are_other_decisions(flag, start, monkeypatch):
    clock = Clock("mma")
    start(clock)
    call(times=3)
    assert len(clock.timed) == len(FAMILIES)
    monkeypatch.setattr(torch.backends.cudnn, flag, True)
    with deciding() as found:
        call(times=3)
    if flag == "benchmark":
        assert found == [("simt", False)] * 2 + [("mma", True)] and len(clock.timed) == 2 * len(FAMILIES)
    else:
        assert found == [("simt", True)] * 3 and len(clock.timed) == len(FAMILIES)  # the plan's
    monkeypatch.setattr(torch.backends.cudnn, flag, False)
    with deciding() as found:
        call()
    assert found == [("mma", True)]


# Proving --------------------------------------------------------------------------------------------------------------


@contextmanager
def spoiled(family: str, how: Callable[[Any], Any], direction: str = "forward") -> Iterator[None]:
    """Within the context a family's results pass through `how`."""
    prepare = getattr(registry.SEPARABLE_CONV2D[family], direction)

    def wrong(*example: Any) -> Callable[..., Any]:
        run = prepare(*example)
        return lambda *args: how(run(*args))

    spoiled_family = dataclasses.replace(registry.SEPARABLE_CONV2D[family], **{direction: wrong})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.SEPARABLE_CONV2D, family, spoiled_family)
        eager.clear()
        yield
    eager.clear()


WRONG = {
    "one element": lambda y: y.index_put((torch.tensor(0),) * 4, y[0, 0, 0, 0] + 3),
    "a NaN": lambda y: y.index_put((torch.tensor(0),) * 4, torch.tensor(math.nan, dtype=y.dtype)),
    "another shape": lambda y: y[:, :-1],
}


@pytest.mark.parametrize("how", WRONG.values(), ids=list(WRONG))
def test_a_wrong_kernel_is_told_of_once_and_never_chosen_again(how, start):
    start(Clock("simt"))
    before = choice.generation
    with spoiled("simt", how), pytest.warns(UserWarning) as said:
        call(times=4)
        for features in (16, 24):  # known to be wrong: not even in the first calls of another problem
            with deciding() as found:
                call(*inputs(features), times=4)
            assert "simt" not in {family for family, _ in found}
    (message,) = (str(warning.message) for warning in said)
    for part in ("simt_forward_bfloat16_nhwc", "8->8@5 3x3 forward", "the output: ", "report", "python -m fused"):
        assert part in message
    assert choice.generation == before + 1
    start(no_clock)  # another process
    with deciding() as found:
        y = call()
    assert found[0][0] != "simt" and y.isfinite().all()
    explained = str(fused_sepconv.explain(*inputs(), padding=1))
    assert "simt_forward_bfloat16_nhwc: excluded on this device: 8->8@5" in explained


@pytest.mark.parametrize("position, name", [(0, "x"), (1, "depthwise weight"), (2, "pointwise weight")])
def test_a_wrong_gradient_is_named(position, name, start):
    def shifted(grads: tuple) -> tuple:
        return *grads[:position], grads[position] + 0.3 * grads[position].abs().max(), *grads[position + 1 :]

    start(Clock(backward="split"))
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    with spoiled("split", shifted, "backward"), pytest.warns(UserWarning, match=f"the gradient of {name}: "):
        for _ in range(3):
            call(*tensors).sum().backward()
    assert chosen(*tensors, direction="backward").family != "split"


def test_a_wrong_result_of_pytorchs_own_excuses_no_other(start):
    start(Clock("simt"))
    with ExitStack() as stack:
        for family in ("pytorch", "simt", "mma"):
            stack.enter_context(spoiled(family, lambda y: -y))
        said = stack.enter_context(pytest.warns(UserWarning))
        call(times=3)
    assert [str(warning.message).count("wrong result") for warning in said] == [1, 1]
    candidates = fused_sepconv.explain(*inputs(), padding=1).forward.candidates
    assert {candidate.family for candidate in candidates if not candidate.excluded} == {"pytorch", "split"}


# Failing --------------------------------------------------------------------------------------------------------------


@contextmanager
def failing(start_of_name: str, error: str = "cudaErrorInvalidConfiguration: invalid configuration") -> Iterator[None]:
    """Within the context launches of some kernels fail, as csrc/common/device.h has it."""
    native = loader.load()

    def launcher(make: Callable) -> Callable:
        def prepare(name: str, *args: Any) -> Callable:
            def fail(*addresses: int) -> None:
                raise RuntimeError(f"fused_sepconv: {name}: launch: {error}")

            return fail if name.startswith(start_of_name) else make(name, *args)

        return prepare

    launchers = {name: launcher(make) for name, make in vars(native).items() if name.endswith("ForwardLaunch")}
    broken = SimpleNamespace(**{**vars(native), **launchers})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "load", lambda: broken)
        eager.clear()
        yield
    eager.clear()


def test_a_failing_launch_names_kernel_and_problem_and_is_not_tried_again(start):
    start(no_clock)
    with failing("simt"):
        with pytest.raises(RuntimeError, match=r"simt_forward_bfloat16_nhwc failed for 8->8@5 3x3 forward.*InvalidC"):
            call()
        for _ in range(2):  # this process, and the next
            with deciding() as found:
                assert call().shape == (1, 8, 5, 5)
            assert found[0][0] != "simt"
            start(no_clock)
    with deciding() as found:
        call(*inputs(16))
    assert found[0][0] == "simt"  # another problem's launch may well succeed


def test_a_launch_without_memory_is_named_and_tried_again(start):
    start(no_clock)
    with (
        failing("simt", "cudaErrorMemoryAllocation: out of memory"),
        pytest.raises(RuntimeError, match="failed for 8->8"),
    ):
        call()
    assert chosen().family == "simt"


def test_a_launch_that_fails_while_it_is_measured_leaves_the_others(start):
    clock = Clock("mma")
    start(clock)
    with failing("depthwise"), pytest.warns(UserWarning, match=r"split: .*failed for .*cudaErrorInvalid") as said:
        call(times=4)
    assert len(said) == 1 and chosen().family == "mma"
    assert ("forward", "split") not in clock.timed
    assert "excluded on this device" in str(fused_sepconv.explain(*inputs(), padding=1))


def test_out_of_memory_leaves_it_to_the_plan_quietly(start, monkeypatch):
    tried = []

    def timer(run: Any) -> float:
        tried.append(run)
        raise torch.OutOfMemoryError("CUDA out of memory")

    start(timer)
    with deciding() as found, warnings.catch_warnings():
        warnings.simplefilter("error")
        call(times=5)
    assert found == [("simt", False)] * 2 + [("simt", True)] * 3 and len(tried) == 1
    start(no_clock)
    monkeypatch.setattr(choice, "_free_bytes", lambda device: 1 << 20)
    with deciding() as found:
        call(times=3)
    assert found[-1] == ("simt", True)


# What it may cost -----------------------------------------------------------------------------------------------------


def test_the_time_of_a_process_is_bounded(start):
    clock = Clock("mma")
    start(clock, budget=1e-9)
    call(times=3)
    with pytest.warns(UserWarning, match="FUSED_SEPCONV_AUTOTUNE_SECONDS: the 1e-09 s") as said:
        for features in (16, 24):
            call(*inputs(features), times=4)
    assert len(said) == 1 and len(clock.timed) == len(FAMILIES)
    assert chosen().family == "mma" and chosen(*inputs(16)).family == "simt"


def test_sizes_that_keep_changing_are_no_longer_measured(start, monkeypatch):
    monkeypatch.setattr(choice, "MOST_SIZES", 2)
    clock = Clock("mma")
    start(clock)
    with pytest.warns(UserWarning, match="sizes keep changing") as said, deciding() as found:
        for n in (1, 2, 3, 4):
            call(*inputs(n=n), times=4)
    assert len(said) == 1 and len(clock.timed) == 2 * len(FAMILIES)
    assert found[3::4] == [("mma", True)] * 2 + [("simt", True)] * 2


def test_what_is_remembered_is_bounded(start, monkeypatch):
    monkeypatch.setattr(choice, "MOST_REMEMBERED", 2)
    chooser = start(Clock("mma"))
    for n in range(1, 6):
        call(*inputs(n=n), times=3 if n % 2 else 1)
    assert len(chooser._calls) <= 2 and len(chooser._settled) <= 2
    with deciding() as found:
        call()
    assert found == [("mma", True)]


@pytest.mark.parametrize("how", ["the variable", "torch.use_deterministic_algorithms", "an empty batch"])
def test_the_plan_decides_without_measuring(how, start):
    start(Clock("mma"))
    call(times=3)
    start(no_clock, measures=how != "the variable")
    tensors = inputs(n=0) if how == "an empty batch" else inputs()
    torch.use_deterministic_algorithms(how.startswith("torch"))
    try:
        with deciding() as found:
            call(*tensors, times=3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[-1] == ("simt", True)


@pytest.mark.parametrize("value, on", [("1", True), ("0", False), ("", True), (None, True), ("yes", None)])
def test_the_variables(value, on, monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(choice.VARIABLE, value)
    if on is None:
        with pytest.raises(ValueError, match="FUSED_SEPCONV_AUTOTUNE: expected 0 or 1, got 'yes'"):
            choice._from_environment()
        return
    assert choice._from_environment().measures is on and choice._from_environment().budget == 30
    monkeypatch.setenv(choice.BUDGET_VARIABLE, "2.5")
    assert choice._from_environment().budget == 2.5
    for bad in ("-1", "nan", "long"):
        monkeypatch.setenv(choice.BUDGET_VARIABLE, bad)
        with pytest.raises(ValueError, match="FUSED_SEPCONV_AUTOTUNE_SECONDS: expected seconds"):
            choice._from_environment()


# The file -------------------------------------------------------------------------------------------------------------


def test_processes_share_the_file_and_measure_a_problem_once(tmp_path):
    """Two at once, as the ranks of a machine."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    assert sum(timed for timed, _ in outputs) == 2 * len(FAMILIES)  # of two problems
    assert all(found == [["split", True]] * 2 for _, found in outputs)


PROCESS = """
import json, sys, time, pytest
from pathlib import Path
from fused_sepconv.planning import choice
from tests.planning import test_choice as t

folder, clock = Path(sys.argv[1]), t.Clock("split")
def slow(call):
    time.sleep(0.2)
    return clock(call)
choice.chooser = choice.Chooser(timer=slow, folder=folder, environment=lambda: t.ENVIRONMENT)
choice.PATIENCE_SECONDS = 60.0
with pytest.MonkeyPatch.context() as patch, t.gpu_in_the_making(patch):
    (folder / str(time.time_ns())).touch()
    while len(list(folder.glob("[0-9]*"))) < 2:  # all begin together
        time.sleep(0.01)
    with t.deciding() as found:
        for features in (8, 16):
            t.call(*t.inputs(features), times=3)
print(json.dumps([len(clock.timed), [found[2], found[5]]]))
"""


def test_another_environment_has_measurements_of_its_own(start, tmp_path):
    other = {**ENVIRONMENT, "driver": "2"}
    for fastest, environment in (("mma", ENVIRONMENT), ("split", other)):
        start(Clock(fastest), environment=environment)
        call(times=3)
    for fastest, environment in (("mma", ENVIRONMENT), ("split", other)):
        chooser = start(no_clock, environment=environment)
        assert chosen().family == fastest
    chooser.file(CPU).path.rename(start(no_clock).file(CPU).path)  # not believed
    assert chosen().family == "simt"


def test_the_environment_is_all_that_a_time_depends_on(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(loader, "build_info", lambda: {"sources": "of these kernels"})
    found = choice.describe_environment()
    assert found["gpu"] == "NVIDIA H200" and found["multiprocessors"] == 132
    assert found["fused_sepconv"] == fused_sepconv.__version__ and found["torch"] == torch.__version__
    assert found["kernels"] == "of these kernels"
    assert "CUDA" in found["driver"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("content", ["", "{", '{"environment": {}, "measurements": {}}', "other candidates"])
def test_a_damaged_file_is_measured_anew_and_mended(content, start):
    path = start(Clock("mma")).file(CPU).path
    call(times=3)
    if content == "other candidates":  # as another build of the package may have planned
        content = path.read_text().replace("simt_forward", "another_forward")
    path.write_text(content)
    start(Clock("split"))
    call(times=3)
    start(no_clock)
    assert chosen().family == "split"


@pytest.mark.parametrize("why", ["no home", "not writable"])
def test_without_a_place_to_keep_them_measurements_last_for_the_process(why, start, tmp_path):
    if why == "no home":
        folder, expected = None, warnings.catch_warnings()
    else:
        (tmp_path / "file").touch()
        folder, expected = tmp_path / "file" / "cache", pytest.warns(UserWarning, match="can't be written")
    clock = Clock("mma")
    start(clock, folder)
    with expected as said:
        for features in (8, 16):
            call(*inputs(features), times=4)
    assert len(said or ()) == (0 if folder is None else 1)
    assert len(clock.timed) == 2 * len(FAMILIES)
    assert chosen().family == "mma"


def test_threads_that_meet_a_problem_together_measure_it_once(start):
    clock = Clock("mma")
    start(clock)
    tensors, barrier, results = inputs(), threading.Barrier(4), []
    call(*tensors, times=2)

    def run() -> None:
        barrier.wait()
        results.append(call(*tensors))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clock.timed) == len(FAMILIES)
    assert len(results) == 4 and all(torch.equal(results[0], y) for y in results)


# Recording, and what is left alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a graph is captured", "a compiler runs it"])
def test_while_it_is_recorded_nothing_is_measured(how, start, monkeypatch):
    clock = Clock("split")
    start(clock)
    call(times=2)
    with monkeypatch.context() as patch, deciding() as found:
        if how == "a graph is captured":
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        call(times=2)
        assert found == [("simt", False)] * 2 and clock.timed == []
    with deciding() as found:
        call()
    assert found == [("split", True)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with deciding() as found:  # what was measured before is recorded
        call()
    assert found == [("split", True)]


def test_a_compiler_is_not_measured_but_what_it_compiled_is(start):
    clock = Clock("simt")
    start(clock)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    for _ in range(3):
        torch.testing.assert_close(compiled(*tensors), call(*tensors))
    assert len(clock.timed) == len(FAMILIES)


def test_a_mode_that_records_operators_sees_only_the_callers(start):
    clock = Clock("simt")
    start(clock)
    with FlopCounterMode(display=False) as outer, FlopCounterMode(display=False) as inner:
        call(times=3)
    assert len(clock.timed) == len(FAMILIES)
    assert outer.get_total_flops() == inner.get_total_flops() == 3 * 2 * 25 * 8 * (9 + 8)


def test_the_callers_tensors_and_random_state_stay_as_they_are(start):
    seen, dtypes = [], set()

    def timer(run: Any) -> float:
        seen.extend(tensor for tensor in run.args[-1] if tensor is not None)
        result = run()
        dtypes.add((result if isinstance(result, Tensor) else result[0]).dtype)  # autocast does not reach it
        assert not torch.is_grad_enabled()
        return 1e-6

    start(timer)
    tensors = [tensor.requires_grad_() for tensor in inputs(dtype=torch.float32)]
    before, state = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
    arguments = ([1, 1], [1, 1, 1, 1], [1, 1], None, None, None, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            y = torch.ops.fused_sepconv.separable_conv2d(*tensors, None, None, None, *arguments)
            y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in [*tensors, y]}
    assert seen and all(tensor.untyped_storage().data_ptr() not in storages for tensor in seen)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    "like",
    [
        pytest.param(torch.empty(2, 3, 4, 5), id="NCHW"),
        pytest.param(torch.empty(2, 8, 4, 5, dtype=torch.float16).to(memory_format=torch.channels_last), id="NHWC"),
        pytest.param(torch.empty(1, 3, 4, 1, dtype=torch.float64).expand(2, 3, 4, 5), id="expanded"),
        pytest.param(torch.empty(1000)[1:].as_strided((2, 3, 4, 5), (100, 30, 7, 1)), id="with gaps"),
        pytest.param(torch.empty(64, dtype=torch.bfloat16)[3:11].view(1, 8, 1, 1), id="at an odd address"),
        pytest.param(torch.empty(0, 3, 4, 5), id="empty"),
        pytest.param(torch.empty(7), id="a bias"),
    ],
)
def test_random_tensors_are_laid_out_like_the_calls(like):
    made = choice.random_like(like, torch.Generator().manual_seed(0))
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
    assert not like.numel() or made.data_ptr() % 16 == like.data_ptr() % 16
    assert made.isfinite().all()
    assert not made.numel() or made.unique().numel() > 1


# What is said ---------------------------------------------------------------------------------------------------------


def test_explain_and_the_doctor_tell_what_was_measured_and_measure_nothing(start, monkeypatch):
    chooser = start(Clock("simt"))
    assert "measured" not in str(fused_sepconv.explain(*inputs(), padding=1))
    call(times=3)
    chooser.timer = no_clock
    after = fused_sepconv.explain(*inputs(), padding=1)
    (line,) = [line for line in str(after).splitlines() if "-> simt_forward" in line]
    assert "measured 1.0 us, predicted" in line
    assert str(after.forward).count("measured 5.0 us") == 3
    assert "measured" not in str(after.backward)
    data = json.loads(json.dumps(after.as_dict(), allow_nan=False))["forward"]["candidates"]
    assert [candidate["measured_seconds"] for candidate in data] == [1e-6, 5e-6, 5e-6, 5e-6]
    assert "measured" not in str(fused_sepconv.explain(*inputs(), padding=1, device="H200"))

    choice.exclude(after.forward.problem, CPU, after.forward.chosen, "its launch failed: for a reason")
    reason = "8->8@5 3x3 forward, N 1, bfloat16 nhwc: its launch failed: for a reason"
    with deciding() as found:
        call()
    assert found[0][0] != "simt"
    after = fused_sepconv.explain(*inputs(), padding=1).forward
    assert after.candidates[-1].excluded == reason and after.chosen.measured_seconds == 5e-6
    assert f"{after.candidates[-1].name}: excluded on this device: {reason}" in str(after)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    text = "\n".join(doctor._autotuning())
    assert "on" in text and f"GPU 0: 1 problems measured, in {chooser.file(CPU).path}" in text
    assert "excluded: " in text and reason in text
    start(no_clock, measures=False)
    assert "off" in doctor._autotuning()[0]


# The parts ------------------------------------------------------------------------------------------------------------


def test_a_candidate_is_what_runs_whatever_is_predicted_of_it():
    made = plan(MIDDLE, H200, ALL_KERNELS)
    names = [identity(candidate) for candidate in made.candidates]
    assert len(set(names)) == len(names)
    for candidate in made.candidates:
        guess = dataclasses.replace(candidate, predicted_seconds=1.0, bytes=1, note="another", measured_seconds=2.0)
        assert identity(guess) == identity(candidate)
    (tensor,) = (candidate for candidate in made.candidates if candidate.family == "mma")
    cut = dataclasses.replace(tensor, tiling=dataclasses.replace(tensor.tiling, rows=tensor.tiling.rows + 1))
    assert identity(cut) != identity(tensor)
    (split,) = (candidate for candidate in made.candidates if candidate.family == "split")
    other_step = dataclasses.replace(split.steps[0], name="another")
    assert identity(dataclasses.replace(split, steps=(other_step,))) != identity(split)
    assert choice._NOT_WHAT_RUNS.issubset(field.name for field in dataclasses.fields(Candidate))


def test_the_timer_warms_up_and_gives_the_median_in_seconds(monkeypatch):
    now = [0.0]  # milliseconds of the GPU
    taken = iter([500.0, 20.0, *([20.0, 10.0, 30.0, 90.0, 25.0] + [math.nan] * 9)])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    queued: list[float] = []  # before each run
    idle_since = [0.0]

    def run() -> None:
        queued.append(now[0] - idle_since[0])
        now[0] += next(taken)
        idle_since[0] = now[0]

    state: list[str] = []  # what was done to L2

    class Buffer:
        def zero_(self) -> None:
            now[0] += 0.03
            state.append("written")

        def sum(self) -> None:
            now[0] += 0.02
            state.append("read")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch, "empty", lambda size, **_: Buffer() if size * 8 == 100 << 20 else None)
    assert choice.cuda_seconds(run) == pytest.approx(0.025)
    assert state[-1] == "read" and state[-2] == "written"
    assert queued and min(queued) >= 2 * choice.QUEUED_SECONDS * 1e3 - 1e-9

    taken, queued[:] = iter([20.0] * 4), []

    def slow() -> None:  # for the host: more of the GPU's work has to wait before the next call
        time.sleep(0.002)
        run()

    assert choice.cuda_samples(slow, 0, 2, 2) == pytest.approx([0.02, 0.02])
    assert min(queued[2:]) >= 3.0 - 1e-9
