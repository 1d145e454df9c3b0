"""examples/train.py on several ranks: the losses of one rank, and what becomes of a run that loses one of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.train_runs import CHECKPOINT_EVERY, STEPS, TINY, checkpoints, losses, rows, run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240
"""Seconds, for what takes ten on an idle machine."""


def torchrun(output: Path, *flags: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a free port
    command += [str(ROOT / "tests" / "run_train.py"), "--output", str(output), *TINY, "--batch-size", "4", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    """What it said, after it has ended well."""
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, text
    return text


def process_of_rank(launcher: subprocess.Popen, rank: int) -> int:
    """The process that torchrun has started for a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == launcher.pid and b"RANK=%d" % rank in variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """The same micro-batches on one rank, two of them a step."""
    output = tmp_path_factory.mktemp("one_rank")
    assert run(output, *TINY, "--batch-size", "4", "--grad-accum-steps", "2") == 0
    assert len(losses(output)) == STEPS
    return output


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_ranks(request, tmp_path_factory):
    """(engine, output) of a run without interruption."""
    output = tmp_path_factory.mktemp(request.param)
    text = finish(torchrun(output, "--distributed", request.param))
    assert text.splitlines()[-1].startswith("top-1 ")
    return request.param, output


def parameters(output: Path) -> dict[str, torch.Tensor]:
    """Of the averaged weights. BatchNorm's statistics are left out: one rank updates them twice a step."""
    tensors = load_file(output / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("weight", "bias"))}


def test_two_ranks_train_as_one_does_in_two_turns(one_rank, two_ranks):
    _, output = two_ranks
    assert losses(output) == pytest.approx(losses(one_rank), rel=1e-5)
    ours, theirs = parameters(output), parameters(one_rank)
    assert len(theirs) > 50
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(two_ranks, tmp_path):
    """torchrun starts both ranks again, and the run ends as if nothing had been."""
    engine, whole = two_ranks
    launcher = torchrun(tmp_path, "--distributed", engine, "--resume", restarts=1)
    first = tmp_path / "checkpoints" / f"step-{CHECKPOINT_EVERY:08d}"
    deadline = time.monotonic() + PATIENCE
    while not first.exists() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process_of_rank(launcher, 1), signal.SIGKILL)
    text = finish(launcher)
    resumed = re.search(r"resumed from \S+, after (\d+) steps", text)
    assert resumed and CHECKPOINT_EVERY <= int(resumed[1]) < STEPS, text
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-6)
    assert [row["top1"] for row in rows(tmp_path, "epochs.csv")] == [row["top1"] for row in rows(whole, "epochs.csv")]
    assert checkpoints(tmp_path) == checkpoints(whole)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_in_two_turns_train_as_one_does_in_four(engine, tmp_path):
    """What the ranks do not exchange after the first turn is not lost."""
    short = ("--epochs", "1", "--warmup-epochs", "0")
    finish(torchrun(tmp_path / "two", *short, "--grad-accum-steps", "2", "--distributed", engine))
    assert run(tmp_path / "one", *TINY, *short, "--batch-size", "4", "--grad-accum-steps", "4") == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_another_number_of_ranks_goes_on_with_a_checkpoint(one_rank, two_ranks, tmp_path):
    """From two ranks to one, shards put together: the same losses from there on, and the steps before are not there."""
    _, output = two_ranks
    middle = STEPS - CHECKPOINT_EVERY
    flags = (
        "--batch-size",
        "4",
        "--grad-accum-steps",
        "2",
        "--resume",
        str(output / "checkpoints" / f"step-{middle:08d}"),
    )
    assert run(tmp_path, *TINY, *flags) == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(middle + 1, STEPS + 1))
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(losses(one_rank)[middle:], rel=1e-5)
