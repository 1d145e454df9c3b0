"""examples/experiments.py: each comparison gives its table and its picture."""

from __future__ import annotations

import pytest
from PIL import Image

import experiments
from tests.support.train_runs import NETWORK

TINY = ("--dataset", "synthetic", "--synthetic-images", "8", "--num-classes", "3", "--batch-size", "4")
TINY = (*TINY, "--epochs", "1", "--log-interval", "1", "--img-size", "32")


@pytest.mark.parametrize("name", ["activation", "residual", "backends"])
def test_a_comparison_gives_a_table_and_a_picture(name, tmp_path):
    lines = experiments.compare(name, tmp_path, [*TINY, *NETWORK]).splitlines()
    assert lines[0].split()[:3] == [name, "parameters", "multiply-adds"]
    assert len(lines) == 1 + len(experiments.EXPERIMENTS[name])
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 300


def test_the_spectrum_s_costs_fall_with_every_segment(monkeypatch, tmp_path):
    few = {
        name: flags
        for name, flags in experiments.EXPERIMENTS["spectrum"].items()
        if name[:2] in ("1 ", "3 ", "16", "a ")
    }
    monkeypatch.setitem(experiments.EXPERIMENTS, "spectrum", few)
    lines = experiments.compare("spectrum", tmp_path, [*TINY, *NETWORK]).splitlines()[1:]
    assert len(lines) == len(few) > 3
    for column in (-7, -6):
        values = [int(line.split()[column].replace(",", "")) for line in lines]
        assert values == sorted(set(values), reverse=True)
