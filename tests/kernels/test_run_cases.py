"""run_cases: its list is complete, and it fails, naming what, where a kernel is not launched or computes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from fused_sepconv.planning.plan import INSTANCES
from tests import run_cases

ONLY = "mma_backward_input"
LAST = f"{ONLY}_3x3_float16"


@pytest.mark.parametrize("smallest", [False, True])
def test_every_instance_has_a_case(smallest: bool) -> None:
    assert [name for name in INSTANCES if not run_cases.runs_of(name, smallest)] == []
    assert not smallest or all(len(run_cases.runs_of(name, smallest)) == 1 for name in INSTANCES)


def test_every_backward_runs_with_and_without_bias_and_mid_activation() -> None:
    for name in INSTANCES:
        cases = [run.case for run in run_cases.runs_of(name)]
        if "_backward_" not in name or name.startswith("norm_"):  # a BatchNorm has neither
            continue
        assert {case.bias or case.depthwise_bias for case in cases} == {False, True}, name
        takes_mid = not name.startswith(("mma_backward_input", "depthwise_normalised"))
        places = {case.activation if case.operator == "depthwise_conv2d" else case.mid_activation for case in cases}
        assert None in places and (not takes_mid or len(places) > 1), name


def nothing_planted(patch: pytest.MonkeyPatch) -> None:
    pass


def case_lost(patch: pytest.MonkeyPatch) -> None:
    whole = run_cases.runs_of
    patch.setattr(run_cases, "runs_of", lambda name, *rest: [] if name == LAST else whole(name, *rest))


def kernel_added(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(INSTANCES, f"{ONLY}_9x9_int8", None)


def another_kernel_launched(patch: pytest.MonkeyPatch) -> None:
    whole, other = run_cases.runs_of, {LAST: "simt_forward_float16_nhwc"}
    patch.setattr(run_cases, "runs_of", lambda name, *rest: whole(other.get(name, name), *rest))


def wrong_gradient(patch: pytest.MonkeyPatch) -> None:
    def planted(run: run_cases.Run, *arguments: object, ours: Callable = run_cases.ours) -> dict:
        found = ours(run, *arguments)
        if run.dtype == "float16":
            found["gradient of depthwise_weight"][3, 0, 1, 1] += 0.5
        return found

    patch.setattr(run_cases, "ours", planted)


def out_of_time(patch: pytest.MonkeyPatch) -> None:
    def interrupted(run: run_cases.Run, *arguments: object, ours: Callable = run_cases.ours) -> dict:
        if run.dtype == "float16":
            raise KeyboardInterrupt
        return ours(run, *arguments)

    patch.setattr(run_cases, "ours", interrupted)


# What is planted, the exit status, what a line must match, and the end of the last line. Of two instances, y and the
# gradients of x, two weights and two biases are compared.
PLANTED = (
    (nothing_planted, 0, "right ", "2 of 2 run, 12 results compared, 0 wrong"),
    (case_lost, 1, rf"missed: {LAST} \(no case\)", "1 of 2 run, 6 results compared, 0 wrong"),
    (kernel_added, 1, rf"missed: {ONLY}_9x9_int8 \(no case\)", "2 of 3 run, 12 results compared, 0 wrong"),
    (another_kernel_launched, 1, f"{LAST}: not launched by ", "1 of 2 run, 13 results compared, 0 wrong"),
    (wrong_gradient, 1, "float16 nhwc.*gradient of depthwise_weight: ", "2 of 2 run, 12 results compared, 1 wrong"),
    (out_of_time, 1, f"missed: {LAST}", "1 of 2 run, 6 results compared, 0 wrong"),
)


@pytest.mark.parametrize(("plant", "status", "line", "end"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_run_says_what_is_right_wrong_and_missing(plant, status, line, end, capsys, monkeypatch) -> None:
    plant(monkeypatch)
    assert run_cases.main(["--smallest", "--only", ONLY]) == status
    lines = capsys.readouterr().out.splitlines()
    assert any(re.search(line, found) for found in lines), lines
    assert lines[-1] == f"instances: {end}"


def test_launches_are_counted_by_instance(plain) -> None:
    plain.reset_launch_counts()
    assert plain.launch_counts() == {}
    plain.reset_counters()
    (run,) = run_cases.runs_of("simt_forward_float32_nhwc", smallest=True)
    run_cases.ours(run, {name: tensor.float() for name, tensor in run.case.tensors().items()}, "cpu", 3)
    steps = ("forward", *(f"backward_{s}" for s in ("intermediate", "input", "depthwise_weight", "pointwise_weight")))
    expected = {f"simt_{step}_float32_nhwc": 1 for step in steps}
    assert plain.launch_counts() == {**expected, "reduce_splits_float32": 4} == plain.executed()
