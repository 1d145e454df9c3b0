"""The paper's Figures 1 to 4 are what it says they are: equivalent forms, and the two ends of a spectrum."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_sepconv import SeparableConv2d
from fused_sepconv.models.inception_spectrum import (
    ExtremeInception,
    InceptionModule,
    SegmentedInception,
    SimplifiedInception,
)

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(2, 6, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("segments", (1, 2, 3, 12))
@pytest.mark.parametrize("mid_activation", (None, "relu"))
def test_figure_3_is_equivalent_to_figure_2(segments, mid_activation):
    simplified = SimplifiedInception(6, 12, segments, mid_activation=mid_activation, **F64)
    segmented = SegmentedInception.of(simplified)
    assert segmented.spatial.groups == segments
    torch.testing.assert_close(segmented(X), simplified(X))
    count = [sum(p.numel() for p in module.parameters()) for module in (simplified, segmented)]
    assert count[0] == count[1] == 6 * 12 + 12 * 12 // segments * 9


def test_one_segment_is_a_regular_convolution():
    module = SegmentedInception(6, 12, 1, **F64)
    weight = torch.einsum("fmhw,mc->fchw", module.spatial.weight, module.pointwise.weight[:, :, 0, 0])
    torch.testing.assert_close(module(X), F.conv2d(X, weight, padding=1))


def test_a_segment_a_channel_is_figure_4():
    extreme = ExtremeInception(6, 12, mid_activation="elu", **F64)
    segmented = SegmentedInception(6, 12, 12, mid_activation="elu", **F64)
    segmented.load_state_dict(extreme.state_dict())
    torch.testing.assert_close(extreme(X), segmented(X))
    assert extreme.spatial.weight.shape == (12, 1, 3, 3)


def test_stacked_extreme_modules_are_separable_convolutions_but_at_the_two_ends():
    first, second = ExtremeInception(6, 12, **F64), ExtremeInception(12, 5, **F64)
    between = SeparableConv2d.from_convs(first.spatial, second.pointwise)
    torch.testing.assert_close(second(first(X)), second.spatial(between(first.pointwise(X))))


def test_figure_1_has_four_towers():
    module = InceptionModule(6, 4, **F64)
    relu_conv = {n: [m.weight for m in getattr(module, n).modules() if hasattr(m, "weight")] for n in module._modules}
    assert [[tuple(w.shape[-2:]) for w in weights] for weights in relu_conv.values()] == [
        [(1, 1)],
        [(1, 1), (3, 3)],
        [(1, 1), (3, 3), (3, 3)],
        [(1, 1)],
    ]
    y = module(X)
    assert y.shape == (2, 16, 7, 8) and y.min() >= 0
    pooled = F.relu(F.conv2d(F.avg_pool2d(X, 3, 1, 1), relu_conv["tower4"][0]))
    torch.testing.assert_close(y[:, 12:], pooled)


def test_bad_segments_are_named():
    for make in (SimplifiedInception, SegmentedInception):
        with pytest.raises(ValueError, match="segments: expected a divisor of out_channels = 12, got 5"):
            make(6, 12, 5)
        with pytest.raises(ValueError, match="mid_activation"):
            make(6, 12, 3, mid_activation="tanh")


def test_the_example_prints_the_cost_of_every_step():
    command = [sys.executable, str(ROOT / "examples" / "inception_spectrum.py"), "--channels", "12", "--size", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    rows = {line[:18].strip(): line[18:].split() for line in output.splitlines()[2:-1]}
    assert [name for name in rows if "segment" in name] == ["1 segment", *(f"{n} segments" for n in (2, 3, 4, 6, 12))]
    for n in (2, 4, 12):
        parameters = 12 * 12 + 12 * 12 // n * 9
        assert rows[f"{n} segments"][:2] == [f"{parameters:,}", f"{parameters * 25:,}"]
    assert rows["Inception module"][0] == f"{4 * 12 * 3 + 3 * 9 * 3 * 3:,}"
