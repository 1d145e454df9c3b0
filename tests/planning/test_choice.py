"""Autotuning: what is fastest by the clock runs, it is timed once and kept, and nothing of the caller's is touched.

The kernels run emulated, on CPU tensors that are planned for as on a GPU, under a clock that the tests set.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_sepconv
from fused_sepconv import __main__ as doctor
from fused_sepconv.native import loader
from fused_sepconv.ops import launching, operators
from fused_sepconv.ops.problems import ALL_KERNELS
from fused_sepconv.planning import choice
from fused_sepconv.planning.choice import CacheFile, Tuner, contenders, identity
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import Plan, plan
from fused_sepconv.planning.problem import Candidate, Kernels
from tests.planning.test_plan import MIDDLE
from tests.support.emulation import emulated_kernels

H200 = DEVICES["H200"]
CPU = torch.device("cpu")
ENVIRONMENT = {"gpu": "a GPU, emulated", "driver": "1"}
FAMILIES = ("reference", "simt", "split", "mma")


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
    raise AssertionError("something was timed")


@contextmanager
def gpu_in_the_making(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the context "auto" asks the plan about CPU tensors too, and plans for them as for an H200."""
    here = launching._here
    with emulated_kernels(checked=False), fused_sepconv.use_backend("auto"):
        patch.setattr(launching, "_here", lambda *device: (H200, here(*device)[1]))
        patch.setattr(operators, "asks_the_plan", lambda x, backend: backend != "reference")
        yield


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with gpu_in_the_making(monkeypatch):
        yield


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Tuner]:
    """Switches autotuning on, as a process that starts now would: with nothing but the file to remember by."""

    def start(timer: Callable, folder: Path | None = tmp_path, environment: dict | None = None) -> Tuner:
        tuner = Tuner(timer, folder, lambda: environment or ENVIRONMENT)
        monkeypatch.setattr(choice, "tuner", tuner)
        return tuner

    return start


def inputs(features: int = 8, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(1, 8, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    return x, torch.randn(8, 1, 3, 3, dtype=dtype), torch.randn(features, 8, 1, 1, dtype=dtype)


def call(*tensors: Tensor) -> Tensor:
    return fused_sepconv.separable_conv2d(*(tensors or inputs()), padding=1)


def chosen(*tensors: Tensor, direction: str = "forward") -> Candidate:
    """What "auto" runs, as `explain` says."""
    return getattr(fused_sepconv.explain(*(tensors or inputs()), padding=1), direction).chosen


@contextmanager
def running(found: list[str]) -> Iterator[None]:
    """Notes the families that calls choose."""
    choose = Plan.chosen.fget
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "chosen", property(lambda self: found.append(choose(self).family) or choose(self)))
        yield


# Choosing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_took_least_runs(family, tune):
    tensors = inputs()
    tune(Clock(family))
    ran = []
    with running(ran):
        y = call(*tensors)
    assert ran == [family]
    assert chosen(*tensors).family == family
    torch.testing.assert_close(y, fused_sepconv.reference.separable_conv2d(*tensors, padding=1), rtol=0.02, atol=0.05)


def test_every_candidate_of_a_call_is_timed_once_in_each_direction(tune):
    clock = Clock("mma", backward="reference")
    tune(clock)
    for _ in range(2):
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        call(*tensors).sum().backward()
    able = [("forward", family) for family in FAMILIES] + [
        ("backward", c.family) for c in contenders(fused_sepconv.explain(*tensors, padding=1).backward)
    ]
    assert sorted(clock.timed) == sorted(able)
    assert chosen().family == "mma"
    assert chosen(direction="backward").family == "reference"


@pytest.mark.parametrize("fastest", ["reference", "simt", "depthwise"])
def test_a_depthwise_convolution_by_itself_is_tuned_too(fastest, tune):
    clock = Clock(fastest, backward=fastest)
    tune(clock)
    x, weight, _ = (tensor.requires_grad_() for tensor in inputs())
    ran = []
    with running(ran):
        y = fused_sepconv.depthwise_conv2d(x, weight, padding=1, activation="silu")
        grads = torch.autograd.grad(y.sum(), (x, weight))
    assert ran == [fastest, fastest]
    assert {direction for direction, _ in clock.timed} == {"forward", "backward"}
    with fused_sepconv.use_backend("reference"):
        expected = fused_sepconv.depthwise_conv2d(x, weight, padding=1, activation="silu")
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, weight)), rtol=0.05, atol=0.1)


def test_the_gradients_of_a_tuned_call_are_those_of_the_reference(tune):
    tune(Clock("reference", backward="simt"))
    tensors = [tensor.requires_grad_() for tensor in inputs(dtype=torch.float32)]
    ours = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    with fused_sepconv.use_backend("reference"):
        theirs = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # sums that cancel, in another order


def test_at_most_four_are_timed_and_pytorch_is_one_of_them():
    made = plan(MIDDLE, H200, ALL_KERNELS)
    first = dataclasses.replace(made.chosen, predicted_seconds=1e-9)
    crowd = tuple(dataclasses.replace(first, name=f"number {i}") for i in range(9))
    refused = dataclasses.replace(first, name="refused", refusal="no")
    found = contenders(dataclasses.replace(made, candidates=(refused, *crowd, *made.candidates)))
    assert [candidate.name for candidate in found] == ["number 0", "number 1", "number 2", "reference"]


def test_the_other_backends_do_what_they_say(tune):
    tune(no_clock)
    ran = []
    with running(ran):
        for backend in ("fused", "reference"):
            with fused_sepconv.use_backend(backend):
                call()
    assert ran == []


def test_without_the_variable_nothing_is_timed_or_written(monkeypatch, tmp_path):
    assert choice.tuner is None or os.environ.get(choice.VARIABLE) == "1"
    monkeypatch.setattr(choice, "tuner", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Tuner, "_measure", no_clock)
    call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value, on", [("1", True), ("0", False), ("", False), (None, False)])
def test_the_variable(value, on, monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(choice.VARIABLE, value)
    assert (choice._from_environment() is not None) == on


def test_a_value_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "yes")
    with pytest.raises(ValueError, match="FUSED_SEPCONV_AUTOTUNE: expected 0 or 1, got 'yes'"):
        choice._from_environment()


def test_an_empty_batch_has_nothing_to_time(tune):
    tune(no_clock)
    x, depthwise, pointwise = inputs()
    assert call(x[:0], depthwise, pointwise).shape == (0, 8, 5, 5)


# Keeping --------------------------------------------------------------------------------------------------------------


def test_another_process_need_not_time_again(tune):
    tune(Clock("split"))
    call()
    tune(no_clock)
    call()
    assert chosen().family == "split"


def test_a_new_process_reads_the_user_cache(monkeypatch, tmp_path, tune):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(choice.VARIABLE, "1")
    tune(Clock("split"), choice.cache_folder())
    call()
    new = subprocess.run([sys.executable, "-c", NEW_PROCESS], capture_output=True, text=True, check=True)
    assert new.stdout.split() == ["split"]


NEW_PROCESS = """
import pytest, torch
from fused_sepconv.planning import choice
from tests.planning import test_choice

choice.tuner.timer, choice.tuner.environment = test_choice.no_clock, lambda: test_choice.ENVIRONMENT
with pytest.MonkeyPatch.context() as patch, test_choice.gpu_in_the_making(patch):
    ran = []
    with test_choice.running(ran):
        test_choice.call()
print(*ran)
"""


def test_another_environment_has_measurements_of_its_own(tune, tmp_path):
    for fastest, driver in (("simt", "1"), ("split", "2")):
        tune(Clock(fastest), environment={**ENVIRONMENT, "driver": driver})
        call()
    for fastest, driver in (("simt", "1"), ("split", "2")):
        tune(no_clock, environment={**ENVIRONMENT, "driver": driver})
        assert chosen().family == fastest
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_came_from_another_environment_is_not_believed(tune):
    source = tune(Clock("simt")).file(CPU).path
    call()
    target = tune(Clock("split"), environment={**ENVIRONMENT, "driver": "2"}).file(CPU).path
    source.rename(target)
    call()
    assert chosen().family == "split"


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


@pytest.mark.parametrize("flag", ["benchmark", "deterministic"])
def test_other_flags_of_pytorchs_convolutions_are_other_measurements(flag, tune, monkeypatch):
    clock = Clock()
    tune(clock)
    call()
    count = len(clock.timed)
    monkeypatch.setattr(torch.backends.cudnn, flag, not getattr(torch.backends.cudnn, flag))
    call()
    assert len(clock.timed) == 2 * count


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff\xfe", b"{", b"[]", b"null", b"[" * 100_000, b'{"environment": {}, "measurements": {}}'),
        *("PROBLEM: []", "PROBLEM: {}", 'PROBLEM: {"CANDIDATE": NaN}', 'PROBLEM: {"CANDIDATE": -1.0}'),
        *('PROBLEM: {"CANDIDATE": "1"}', 'PROBLEM: {"CANDIDATE": Infinity}', 'PROBLEM: {"another": 1e-6}', "7"),
    ],
)
def test_a_damaged_file_is_as_good_as_none_and_mended(content, tune):
    path = tune(Clock("simt")).file(CPU).path
    call()
    whole = json.loads(path.read_text())
    if isinstance(content, str):  # the measurements, in a file that is otherwise whole
        ((problem, seconds),) = whole["measurements"].items()
        content = content.replace("PROBLEM", json.dumps(problem)).replace(
            '"CANDIDATE"', json.dumps(next(iter(seconds)))
        )
        content = f"{{{content}}}" if ":" in content else content
        content = f'{{"environment": {json.dumps(ENVIRONMENT)}, "measurements": {content}}}'.encode()
    path.write_bytes(content)
    tune(Clock("split"))
    call()
    assert chosen().family == "split"
    tune(no_clock)
    assert chosen().family == "split"


def test_a_plan_with_candidates_that_were_not_timed_is_timed_anew(tune):
    tuner = tune(Clock("simt"))
    call()
    (key,) = tuner.file(CPU).read()
    seconds = tuner.file(CPU).read()[key]
    seconds.pop(identity(chosen()))
    tuner.file(CPU).add({key: seconds})
    clock = Clock("split")
    tune(clock)
    call()
    assert len(clock.timed) == len(FAMILIES)


@pytest.mark.parametrize("why", ["no home", "not writable"])
def test_without_a_place_to_keep_them_measurements_last_for_the_process(why, tune, tmp_path):
    if why == "no home":
        folder, expected = None, warnings.catch_warnings()
    else:
        (tmp_path / "file").touch()
        folder, expected = tmp_path / "file" / "cache", pytest.warns(UserWarning, match="can't be written")
    clock = Clock("simt")
    tune(clock, folder)
    with expected as said:
        for features in (8, 16):
            call(*inputs(features))
            call(*inputs(features))
    assert len(said or ()) == (0 if folder is None else 1)
    assert len(clock.timed) == 2 * len(FAMILIES)
    assert chosen().family == "simt"


def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice.cache_folder() == tmp_path / "fused_sepconv"
    monkeypatch.setenv("HOME", str(tmp_path))
    for not_absolute in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", not_absolute)
        assert choice.cache_folder() == tmp_path / ".cache" / "fused_sepconv"


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert choice.cache_folder() is None


def add_many(folder: Path, writer: int, start: Any) -> None:
    file = CacheFile(folder, ENVIRONMENT)
    start.wait()
    for number in range(25):
        file.add({f"{writer}, {number}": {"a": 1.0, "b": 2.0}})


def test_writers_at_once_lose_nothing_and_readers_see_whole_files(tmp_path):
    processes = multiprocessing.get_context("fork")
    start = processes.Barrier(5)
    writers = [processes.Process(target=add_many, args=(tmp_path, writer, start)) for writer in range(4)]
    for writer in writers:
        writer.start()
    start.wait()
    file, count = CacheFile(tmp_path, ENVIRONMENT), 0
    while any(writer.is_alive() for writer in writers):
        seen = len(file.read())
        assert seen >= count
        count = seen
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert set(file.read()) == {f"{writer}, {number}" for writer in range(4) for number in range(25)}
    assert os.listdir(tmp_path) == [file.path.name]


def test_a_lock_that_is_never_given_back_does_not_stop_a_writer(tmp_path):
    file = CacheFile(tmp_path, ENVIRONMENT)
    with choice._alone_in(tmp_path):
        file.add({"problem": {"a": 1.0}})
    assert file.read() == {"problem": {"a": 1.0}}


def test_threads_that_meet_a_problem_together_time_it_once(tune):
    clock = Clock("simt")
    tune(clock)
    tensors, start, results = inputs(), threading.Barrier(4), []

    def run() -> None:
        start.wait()
        results.append(call(*tensors))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clock.timed) == len(FAMILIES)
    assert len(results) == 4 and all(torch.equal(results[0], y) for y in results)


# Where nothing is timed -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["a graph is captured", "a compiler runs it"])
def recorded(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A context in which nothing may be timed."""

    @contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if request.param == "a graph is captured":
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            else:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            yield

    return context


def test_while_it_is_recorded_the_plan_decides(recorded, tune):
    clock = Clock("split")
    tune(clock)
    predicted = chosen().family
    assert predicted == "simt"
    ran = []
    with recorded(), running(ran):
        call()
    assert clock.timed == []
    with running(ran):
        call()  # it is timed later
    assert ran == [predicted, "split"]


def test_what_was_measured_before_is_recorded(recorded, tune):
    tune(Clock("split"))
    call()
    ran = []
    with recorded(), running(ran):
        call()
    assert ran == ["split"]


def test_fake_tensors_are_not_timed(tune):
    tune(no_clock)
    with FakeTensorMode() as mode:
        y = call(*(mode.from_tensor(tensor) for tensor in inputs()))
    assert y.shape == (1, 8, 5, 5)


def test_a_compiler_is_not_timed_but_what_it_compiled_is(tune):
    clock = Clock("simt")
    tune(clock)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    assert len(clock.timed) == len(FAMILIES)


def test_a_mode_that_records_operators_sees_only_the_callers(tune):
    clock = Clock("simt")
    tune(clock)
    with FlopCounterMode(display=False) as outer, FlopCounterMode(display=False) as inner:
        call()
    assert len(clock.timed) == len(FAMILIES)
    assert outer.get_total_flops() == inner.get_total_flops() == 2 * 25 * 8 * (9 + 8)


@pytest.mark.filterwarnings("ignore")  # the tracer's, and that it is deprecated
def test_a_tracer_records_the_operator_alone(tune):
    clock = Clock()
    tune(clock)
    traced = torch.jit.trace(call, inputs(), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes() if not node.kind().startswith("prim::")] == [
        "fused_sepconv::separable_conv2d"
    ]
    assert len(clock.timed) == len(FAMILIES)


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda *t: f(*t).float().sum())])
def test_inside_a_transform_it_is_timed_as_anywhere(transform, tune):
    clock = Clock("simt", backward="simt")
    tune(clock)
    x, depthwise, pointwise = inputs()
    if transform is torch.vmap:
        transform(lambda x: call(x, depthwise, pointwise))(x.unsqueeze(0))
    else:
        transform(call)(x, depthwise, pointwise)
    assert {family for _, family in clock.timed} >= {"reference", "simt", "split"}


# What is left alone ---------------------------------------------------------------------------------------------------


def test_the_callers_tensors_and_random_state_stay_as_they_are(tune):
    seen = []

    def timer(run: Any) -> float:
        *_, tensors = run.args
        seen.extend(tensor for tensor in tensors if tensor is not None)
        run()
        assert not torch.is_grad_enabled()
        return 1e-6

    tune(timer)
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    before, state = [tensor.detach().clone() for tensor in tensors], torch.get_rng_state()
    y = call(*tensors)
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in [*tensors, y]}
    assert seen and all(tensor.untyped_storage().data_ptr() not in storages for tensor in seen)
    assert not any(tensor.requires_grad for tensor in seen)
    assert y.grad_fn is not None


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


def test_autocast_does_not_reach_what_is_timed(tune):
    dtypes = set()

    def timer(run: Any) -> float:
        dtypes.add(run().dtype)
        return 1e-6

    tune(timer)
    x, depthwise, pointwise = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arguments = ([1, 1], [1, 1, 1, 1], [1, 1], None, None, None, "auto")
        torch.ops.fused_sepconv.separable_conv2d(x, depthwise, pointwise, None, None, None, *arguments)
    assert dtypes == {torch.float32}


def test_out_of_memory_leaves_it_to_the_plan_and_says_so_once(tune):
    tried = []

    def timer(run: Any) -> float:
        tried.append(run)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tune(timer)
    ran = []
    with pytest.warns(UserWarning, match="FUSED_SEPCONV_AUTOTUNE.*CUDA out of memory") as said, running(ran):
        for features in (8, 16, 8, 16):
            call(*inputs(features))
    assert len(said) == 1
    assert len(tried) == 2  # once a problem: it is not tried again with every call
    choice.tuner = None
    assert ran == [chosen(*inputs(features)).family for features in (8, 16, 8, 16)]


# What is said ---------------------------------------------------------------------------------------------------------


def test_explain_tells_what_was_measured(tune):
    tune(Clock("simt"))
    before = fused_sepconv.explain(*inputs(), padding=1)
    assert "measured" not in str(before)
    call()
    after = fused_sepconv.explain(*inputs(), padding=1)
    (line,) = [line for line in str(after).splitlines() if "-> simt_forward" in line]
    assert "measured 1.0 us, predicted" in line
    assert str(after.forward).count("measured 5.0 us") == 3
    assert "measured" not in str(after.backward)
    data = json.loads(json.dumps(after.as_dict(), allow_nan=False))["forward"]["candidates"]
    assert [candidate["measured_seconds"] for candidate in data] == [1e-6, 5e-6, 5e-6, 5e-6]


def test_explain_times_nothing(tune):
    tune(no_clock)
    fused_sepconv.explain(*inputs(), padding=1)
    fused_sepconv.explain(torch.nn.Sequential(fused_sepconv.SeparableConv2d(3, 8, 3)), torch.randn(1, 3, 5, 5))


def test_a_prediction_for_another_device_stays_a_prediction(tune):
    tune(Clock("simt"))
    call()
    assert "measured" not in str(fused_sepconv.explain(*inputs(), padding=1, device="H200"))


def test_the_doctor_says_whether_it_is_on_and_where_measurements_are(tune, monkeypatch):
    monkeypatch.setattr(choice, "tuner", None)
    assert "off" in "\n".join(doctor._autotuning())
    tuner = tune(Clock("simt"))
    call()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    text = "\n".join(doctor._autotuning())
    assert "on" in text and "GPU 0: 1 problems measured" in text and str(tuner.file(CPU).path) in text


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


def test_of_equal_times_the_plans_first_wins():
    made = plan(MIDDLE, H200, ALL_KERNELS)
    seconds = {identity(candidate): 1e-6 for candidate in contenders(made)}
    assert choice.as_measured(made, seconds).chosen.name == made.chosen.name


def test_what_can_not_run_here_does_not_run_whatever_was_measured():
    seconds = {identity(candidate): 1e-6 for candidate in plan(MIDDLE, H200, ALL_KERNELS).candidates}
    without = plan(MIDDLE, H200, Kernels(frozenset(), "none were built"))
    assert choice.as_measured(without, seconds).chosen.family == "reference"


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
