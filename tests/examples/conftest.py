"""What `python examples/train.py` has: its folder on the path, and a torchvision that can be imported, or none."""

import sys
from pathlib import Path

import pytest

import tests.support.torchvision_operators  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """The flags for a folder of images of noise."""
    from tests.support.train_runs import make_noise

    return ("--data-dir", str(make_noise(tmp_path_factory.mktemp("noise"))))
