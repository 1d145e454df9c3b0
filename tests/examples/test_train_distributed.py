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

from tests.support.train_runs import CHECKPOINT_EVERY, STEPS, TINY, checkpoints, evaluations, losses, run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400
"""Seconds, for what takes ten on an idle machine."""
EMA = "--model-ema"


def torchrun(output: Path, *flags: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a free port
    command += [str(ROOT / "tests/support/run_train.py"), "--output", str(output), *TINY, "--batch-size", "4", *flags]
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
    """The same micro-batches on one rank, two of them a step; on one thread, for the ranks' rounding."""
    output, threads = tmp_path_factory.mktemp("one_rank"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(output, *TINY, EMA, "--batch-size", "4", "--grad-accum-steps", "2") == 0
    finally:
        torch.set_num_threads(threads)
    assert len(losses(output)) == STEPS
    return output


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two_ranks")
    text = finish(torchrun(output, EMA))
    assert text.splitlines()[-1].startswith("top-1 ")
    return output


def test_two_ranks_train_as_one_does_in_two_turns(one_rank, two_ranks):
    """Averaged weights too. BatchNorm's statistics are left out: they are the first rank's, or of both turns."""
    assert losses(two_ranks) == pytest.approx(losses(one_rank), rel=1e-5)
    ours, theirs = (load_file(output / "model.safetensors") for output in (two_ranks, one_rank))
    parameters = [name for name in theirs if name.endswith(("weight", "bias"))]
    assert len(parameters) > 50
    for name in parameters:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_sharded_ranks_train_to_the_same_losses(two_ranks, tmp_path):
    finish(torchrun(tmp_path, "--distributed", "fsdp"))
    assert losses(tmp_path) == pytest.approx(losses(two_ranks), rel=1e-5)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(two_ranks / "model.safetensors").keys()


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(two_ranks, tmp_path):
    """torchrun starts both ranks again, and the run ends as if nothing had been."""
    launcher = torchrun(tmp_path, EMA, "--resume", restarts=1)
    first = tmp_path / "checkpoints" / f"step-{CHECKPOINT_EVERY:08d}.ckpt"
    deadline = time.monotonic() + PATIENCE
    while not first.exists() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process_of_rank(launcher, 1), signal.SIGKILL)
    text = finish(launcher)
    resumed = re.search(r"resumed from \S+/step-(\d+)\.ckpt", text)
    assert resumed and CHECKPOINT_EVERY <= int(resumed[1]) < STEPS, text
    assert losses(tmp_path) == losses(two_ranks)
    assert evaluations(tmp_path) == evaluations(two_ranks)
    assert checkpoints(tmp_path) == checkpoints(two_ranks)
