"""What `python examples/train.py` has: its folder on the path, and a torchvision that can be imported, or none."""

import sys
from pathlib import Path

import tests.support.torchvision_operators  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
