"""examples/experiments.py: each comparison gives its table and its picture."""

from __future__ import annotations

import pytest
from PIL import Image

import experiments
from tests.support.train_runs import NETWORK


def test_the_spectrum_s_costs_fall_with_every_segment(noise, monkeypatch, tmp_path, capsys):
    spectrum = experiments.EXPERIMENTS["spectrum"]
    few = {name: spectrum[name] for name in ("1 segment", "3 segments", "a segment a channel")}
    monkeypatch.setitem(experiments.EXPERIMENTS, "spectrum", few)
    flags = (*NETWORK, *noise, "-j", "0", "--batch-size", "20", "--epochs", "1", "--log-interval", "1")
    monkeypatch.setattr("sys.argv", ["experiments.py", "spectrum", "--output", str(tmp_path), *flags])
    experiments.main()
    head, *lines = capsys.readouterr().out.splitlines()  # the table alone
    assert head.split()[:3] == ["spectrum", "parameters", "multiply-adds"]
    assert len(lines) == len(few)
    for column in (-7, -6):
        values = [int(line.split()[column].replace(",", "")) for line in lines]
        assert values == sorted(set(values), reverse=True)
    with Image.open(tmp_path / "spectrum.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_each_variant_of_a_comparison_is_a_network_or_a_backend_of_its_own(name):
    seen = set()
    for flags in experiments.EXPERIMENTS[name].values():
        options = experiments.parse(["--dataset", "digits", *flags])
        seen.add((options.backend, str(experiments.train.network_of(options, options.model, 10))))
    assert len(seen) == len(experiments.EXPERIMENTS[name])
