"""run_cases: its list is complete, and it fails, naming what, where a kernel is not launched or computes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from fused_sepconv.planning.plan import INSTANCES
from tests import run_cases

ONLY = "mma_backward_input"


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit status and the lines of a short run: two instances."""
    status = run_cases.main(["--smallest", "--only", ONLY])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("smallest", [False, True])
def test_every_instance_has_a_case(smallest: bool) -> None:
    assert [name for name in INSTANCES if not run_cases.runs_of(name, smallest)] == []
    assert not smallest or all(len(run_cases.runs_of(name, smallest)) == 1 for name in INSTANCES)


def test_every_backward_runs_with_and_without_bias_and_mid_activation() -> None:
    for name in INSTANCES:
        cases = [run.case for run in run_cases.runs_of(name)]
        if "_backward_" not in name:
            continue
        assert {case.bias or case.depthwise_bias for case in cases} == {False, True}, name
        takes_mid = not name.startswith(("mma_backward_input", "depthwise_normalised"))
        places = {case.activation if case.operator == "depthwise_conv2d" else case.mid_activation for case in cases}
        assert None in places and (not takes_mid or len(places) > 1), name


def test_a_run_says_in_its_last_line_that_all_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(capsys)
    assert status == 0
    # y and the gradients of x, two weights and two biases, in both dtypes
    assert lines[-1] == "instances: 2 of 2 run, 12 results compared, 0 wrong"


def test_an_instance_without_its_case_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lost = run_cases.runs_of, f"{ONLY}_3x3_float16"
    monkeypatch.setattr(run_cases, "runs_of", lambda name, *rest: [] if name == lost else whole(name, *rest))
    status, lines = run(capsys)
    assert status == 1
    assert f"missed: {lost} (no case)" in lines
    assert lines[-1] == "instances: 1 of 2 run, 6 results compared, 0 wrong"


def test_a_new_kernel_without_a_case_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INSTANCES, f"{ONLY}_9x9_int8", None)
    status, lines = run(capsys)
    assert status == 1
    assert f"missed: {ONLY}_9x9_int8 (no case)" in lines
    assert lines[-1].startswith("instances: 2 of 3 run, ")


def test_a_case_that_launches_another_kernel_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_cases.runs_of
    other = {f"{ONLY}_3x3_float16": "simt_forward_float16_nhwc"}
    monkeypatch.setattr(run_cases, "runs_of", lambda name, *rest: whole(other.get(name, name), *rest))
    status, lines = run(capsys)
    assert status == 1
    assert any(line.startswith(f"{ONLY}_3x3_float16: not launched by ") for line in lines)
    assert f"missed: {ONLY}_3x3_float16" in lines


def test_a_wrong_gradient_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Callable = run_cases.ours

    def planted(run: run_cases.Run, *arguments: object) -> dict:
        found = ours(run, *arguments)
        if run.dtype == "float16":
            found["gradient of depthwise_weight"][3, 0, 1, 1] += 0.5
        return found

    monkeypatch.setattr(run_cases, "ours", planted)
    status, lines = run(capsys)
    assert status == 1
    assert any(re.search(r"float16 nhwc.*gradient of depthwise_weight: ", line) for line in lines)
    assert lines[-1] == "instances: 2 of 2 run, 12 results compared, 1 wrong"


def test_an_interrupted_run_says_what_it_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: Callable = run_cases.ours

    def out_of_time(run: run_cases.Run, *arguments: object) -> dict:
        if run.dtype == "float16":
            raise KeyboardInterrupt
        return ours(run, *arguments)

    monkeypatch.setattr(run_cases, "ours", out_of_time)
    status, lines = run(capsys)
    assert status == 1
    assert f"missed: {ONLY}_3x3_float16" in lines
    assert lines[-1] == "instances: 1 of 2 run, 6 results compared, 0 wrong"


def test_launches_are_counted_by_instance(plain) -> None:
    plain.reset_launch_counts()
    assert plain.launch_counts() == {}
    plain.reset_counters()
    (run,) = run_cases.runs_of("simt_forward_float32_nhwc", smallest=True)
    run_cases.ours(run, {name: tensor.float() for name, tensor in run.case.tensors().items()}, "cpu", 3)
    steps = ("forward", *(f"backward_{s}" for s in ("intermediate", "input", "depthwise_weight", "pointwise_weight")))
    expected = {f"simt_{step}_float32_nhwc": 1 for step in steps}
    assert plain.launch_counts() == {**expected, "reduce_splits_float32": 4} == plain.executed()
