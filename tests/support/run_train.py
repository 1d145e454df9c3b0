"""`python tests/support/run_train.py FLAGS` is `python examples/train.py FLAGS`, beside whichever torchvision."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import tests.support.torchvision_operators  # noqa: E402, F401

sys.argv[0] = str(ROOT / "examples" / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
