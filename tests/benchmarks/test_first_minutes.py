"""first_minutes.py: no figure is faked where there is no GPU, and what was measured replaces what the plan assumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import first_minutes
import pytest
import torch

import fused_sepconv

PACKAGE = Path(fused_sepconv.__file__).parent


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A result of a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "first.json"
    assert first_minutes.main(["--json", str(file)]) == 0
    return file


def test_without_a_gpu_every_figure_is_named_as_missing(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(result.read_text())
    assert len(content["figures"]) > 50
    assert all(figure["seconds"] is None and figure["missing"] == "needs a GPU" for figure in content["figures"])
    ours = [f for f in content["figures"] if f["name"].startswith(("our", "fused"))]
    assert all(figure["predicted_seconds"] > 0 for figure in ours)
    assert content["ceilings"] is None and set(content["fractions"].values()) == {None}
    lines = capsys.readouterr().out.splitlines()
    assert sum("missing: needs a GPU" in line for line in lines) == len(content["figures"])


def test_what_was_measured_replaces_what_the_plan_assumes(result: Path, tmp_path: Path) -> None:
    figures = [first_minutes.Figure(**figure) for figure in json.loads(result.read_text())["figures"]]
    for figure in figures:
        figure.missing, figure.seconds = "", 1e-3
        if figure.bytes:  # half of a copy's bandwidth, but for the copy
            figure.seconds = figure.bytes / (4e12 if figure.name == "copy" else 2e12)
        if figure.flops:
            figure.seconds = figure.flops / (8e14 if "square" in figure.name else 6e14)
    measured = first_minutes.summary(first_minutes.Machine(rehearse=False), figures)
    assert measured["ceilings"]["bytes_per_second"] == pytest.approx(4e12)
    assert measured["ceilings"]["matrix_flops"]["bfloat16"] == pytest.approx(8e14)
    assert measured["fractions"] == {
        "planning/problem.py: LAUNCH_SECONDS": pytest.approx(1e-3 / first_minutes.LAUNCHES),
        "planning/problem.py: LIBRARY_BANDWIDTH": 0.5,
        "families/pytorch/plan.py: LIBRARY_MATRIX": 0.75,
        "families/pytorch/plan.py: LIBRARY_DEPTHWISE_BANDWIDTH": 0.5,
        "families/depthwise/plan.py: BANDWIDTH_FRACTION": 0.5,
    }
    result.write_text(json.dumps(measured))
    copy = tmp_path / "package"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    assert first_minutes.apply(result, copy) == 0
    for where, value in measured["fractions"].items():
        file, _, name = where.partition(": ")
        changed = dict(  # the file's numbers by name, as Python reads them
            line.split("  # measured on ")[0].split(" = ", 1)
            for line in (copy / file).read_text().splitlines()
            if "  # measured on " in line
        )
        assert float(changed[name]) == pytest.approx(value)
        compile((copy / file).read_text(), file, "exec")


def test_what_was_not_measured_stays(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_minutes.apply(result, tmp_path) == 1  # and touches no file: there is none
    assert "LIBRARY_MATRIX: was not measured, stays" in capsys.readouterr().out
