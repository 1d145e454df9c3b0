"""examples/train.py on several ranks: the losses of one rank, and what becomes of a run that loses one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.train_runs import CHECKPOINT_EVERY, STEPS, TINY, checkpoints, evaluations, losses, run

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400
"""Seconds, for what takes ten on an idle machine."""
EMA = "--model-ema"


def torchrun(output: Path, *flags: str, restarts: int = 0, dies_after: int = 0) -> str:
    """Trains TINY on two ranks; gives what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a free port
    command += [str(ROOT / "tests/support/run_train.py"), "--output", str(output), *TINY, "--batch-size", "4", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK_1_DIES_AFTER_STEP": str(dies_after)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def one_rank(noise, tmp_path_factory):
    """The same micro-batches on one rank, two of them a step; on one thread, for the ranks' rounding."""
    output, threads = tmp_path_factory.mktemp("one_rank"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(output, *TINY, *noise, EMA, "--batch-size", "4", "--grad-accum-steps", "2") == 0
    finally:
        torch.set_num_threads(threads)
    assert len(losses(output)) == STEPS
    return output


@pytest.fixture(scope="module")
def two_ranks(noise, tmp_path_factory):
    output = tmp_path_factory.mktemp("two_ranks")
    assert len(re.findall("^top-1 ", torchrun(output, *noise, EMA), re.MULTILINE)) == 1  # the first rank alone says so
    return output


def test_two_ranks_train_as_one_does_in_two_turns(one_rank, two_ranks):
    """Averaged weights too. BatchNorm's statistics are left out: they are the first rank's, or of both turns."""
    assert losses(two_ranks) == pytest.approx(losses(one_rank), rel=1e-5)
    ours, theirs = (load_file(output / "model.safetensors") for output in (two_ranks, one_rank))
    parameters = [name for name in theirs if name.endswith(("weight", "bias"))]
    assert len(parameters) > 50
    for name in parameters:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_sharded_ranks_train_to_the_same_losses(two_ranks, noise, tmp_path):
    torchrun(tmp_path, *noise, "--distributed", "fsdp")
    assert losses(tmp_path) == pytest.approx(losses(two_ranks), rel=1e-5)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(two_ranks / "model.safetensors").keys()


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(two_ranks, noise, tmp_path):
    """torchrun starts both ranks again, and the run ends as if nothing had been."""
    text = torchrun(tmp_path, *noise, EMA, "--resume", restarts=1, dies_after=CHECKPOINT_EVERY + 1)
    assert re.search(rf"resumed from \S+/step-{CHECKPOINT_EVERY:08d}\.ckpt", text), text
    assert losses(tmp_path) == losses(two_ranks)
    assert evaluations(tmp_path) == evaluations(two_ranks)
    assert checkpoints(tmp_path) == checkpoints(two_ranks)
