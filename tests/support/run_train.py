"""`python tests/support/run_train.py FLAGS` is `python examples/train.py FLAGS`, beside whichever torchvision.

Rank 1 is killed after the step that RANK_1_DIES_AFTER_STEP says, unless torchrun has started it again.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import tests.support.torchvision_operators  # noqa: E402, F401
from training.run import Checkpoints  # noqa: E402

original = Checkpoints.on_train_batch_end


def on_train_batch_end(self, trainer, *rest):
    original(self, trainer, *rest)
    if trainer.global_step == int(os.environ["RANK_1_DIES_AFTER_STEP"]) and trainer.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    Checkpoints.on_train_batch_end = on_train_batch_end
sys.argv[0] = str(ROOT / "examples" / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
