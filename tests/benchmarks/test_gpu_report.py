"""gpu_report.sh: whatever becomes of a stage, the next one runs, and all of them keep to their time."""

from __future__ import annotations

import subprocess
import tarfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
STAGES = [
    *("environment", "build", "cases", "first-minutes", "sanitizer-memcheck", "sanitizer-racecheck", "accuracy"),
    *("tests", "conformance", "bench"),
]


def gpu_report(tmp_path: Path, python: str, scale: int) -> tuple[int, dict[str, str], str]:
    """Runs the script with a stand-in for Python, its budgets at so many percent; returns its exit status, the summary
    by stage, and what it printed."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{python}\n")
    stand_in.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "report"), "PYTHON": str(stand_in), "SCALE": str(scale),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", CHECKOUT / "benchmarks" / "gpu_report.sh"], env=environment, capture_output=True, text=True, timeout=90
    )
    text = (tmp_path / "report/summary.txt").read_text()
    assert text in done.stdout
    return done.returncode, {line.split()[0]: line for line in text.splitlines()}, done.stdout


def test_every_stage_may_fail_and_the_next_runs(tmp_path: Path) -> None:
    status, lines, printed = gpu_report(tmp_path, "echo broken; exit 3", scale=100)
    assert list(lines) == STAGES
    assert status == len(STAGES)
    assert all("broken" in line or "compute-sanitizer is not" in line for line in lines.values())
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        assert {f"report/{stage}.log" for stage in STAGES} < set(archive.getnames())
    budgets = [int(line.split("budget ")[1].split()[0]) for line in printed.splitlines() if line.startswith("== ")]
    assert len(budgets) == len(STAGES) and sum(budgets) == 480


def test_a_stage_out_of_time_is_interrupted_and_says_what_it_found(tmp_path: Path) -> None:
    hangs = """trap "echo found so far; exit 1" INT
case "$*" in
  *"pip install"* | *run_cases*) sleep 30 & wait ;;
  *bench.py*) echo measured ;;
esac"""
    started = time.monotonic()
    status, lines, _ = gpu_report(tmp_path, hangs, scale=3)
    assert time.monotonic() - started < 25
    assert "time out" in lines["build"] and "time out" in lines["cases"]
    assert (tmp_path / "report/cases.log").read_text() == "found so far\n"
    assert "ok" in lines["accuracy"] and "ok" in lines["bench"] and status > 0
