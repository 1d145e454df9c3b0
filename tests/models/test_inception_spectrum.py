"""The paper's Figures 1 to 4 are what it says they are: equivalent forms, and the two ends of a spectrum."""

import pytest
import torch
import torch.nn.functional as F

from fused_sepconv import SeparableConv2d
from fused_sepconv.models import xception
from fused_sepconv.models.inception_spectrum import (
    ExtremeInception,
    GoogLeNetModule,
    InceptionModule,
    SegmentedInception,
    SegmentedSeparableConv2d,
    SimplifiedInception,
)

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


def test_figure_4_with_batch_norm_and_relu_after_each_operation():
    module = ExtremeInception(6, 12, mid_activation="relu", activation="relu", norm=True, **F64)
    t = F.relu(F.batch_norm(F.conv2d(X, module.pointwise.weight), None, None, training=True))
    z = F.batch_norm(F.conv2d(t, module.spatial.weight, padding=1, groups=12), None, None, training=True)
    torch.testing.assert_close(module(X), F.relu(z))


@pytest.mark.parametrize("reductions", (None, (2, 3, 5)))
def test_googlenet_s_module_naive_and_with_reductions(reductions):
    module = GoogLeNetModule(6, (3, 4, 2), reductions, **F64)
    weights = [module.get_parameter(name) for name, _ in module.named_parameters()]

    def conv(x, weight):
        return F.relu(F.conv2d(x, weight, padding=weight.shape[-1] // 2))

    pooled = F.max_pool2d(X, 3, 1, 1)
    if reductions is None:
        one, three, five = weights
        expected = [conv(X, one), conv(X, three), conv(X, five), pooled]
    else:
        one, before3, three, before5, five, after = weights
        expected = [conv(X, one), conv(conv(X, before3), three), conv(conv(X, before5), five), conv(pooled, after)]
    torch.testing.assert_close(module(X), torch.cat(expected, 1))
    assert module(X).shape[1] == 3 + 4 + 2 + (6 if reductions is None else 5)


@pytest.mark.parametrize("segments", (1, 2, 4, 6))
def test_a_segmented_separable_convolution_sees_its_segment_alone(segments):
    """Against one regular convolution whose weights between segments are zeros; 6 channels in 4 are 2, 2, 1 and 1."""
    module = SegmentedSeparableConv2d(
        *(6, 5, 3), segments=segments, padding=1, pre_activation="relu", mid_activation="elu", **F64
    )
    whole, begin = torch.zeros(6, 6, 3, 3, dtype=torch.float64), 0
    for conv in module.spatial:
        for weight in conv.weight.chunk(conv.groups):
            end = begin + len(weight)
            whole[begin:end, begin:end] = weight
            begin = end
    assert begin == 6 and sum(conv.groups for conv in module.spatial) == segments
    t = F.elu(F.conv2d(F.relu(X), whole, padding=1))
    torch.testing.assert_close(module(X), module.pointwise(t))


def test_xception_s_segments_go_from_regular_to_separable():
    """Parameters fall with every segment more; as many segments as channels are the network itself."""
    size = {"width": 0.02, "middle_blocks": 1, "dtype": torch.float64}
    counts = []
    for segments in (1, 2, 3, 7, 40):
        torch.manual_seed(0)
        network = xception(3, segments=segments, **size)
        counts.append(sum(p.numel() for p in network.parameters()))
    assert counts == sorted(set(counts), reverse=True)
    torch.manual_seed(0)
    plain, x = xception(3, **size), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(network(x), plain(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="segments"):
        xception(segments=0)


def test_stray_arguments_are_refused():
    for make in (
        InceptionModule,
        SimplifiedInception,
        ExtremeInception,
        lambda *a, **k: SegmentedInception(*a, 2, **k),
    ):
        with pytest.raises(TypeError, match="stride"):
            make(6, 12, stride=2)
    with pytest.raises(ValueError, match="reductions: expected three"):
        GoogLeNetModule(6, (3, 4, 2), (1, 2))


def test_bad_segments_are_named():
    for make in (SimplifiedInception, SegmentedInception):
        with pytest.raises(ValueError, match="segments: expected a divisor of out_channels = 12, got 5"):
            make(6, 12, 5)
        with pytest.raises(ValueError, match="mid_activation"):
            make(6, 12, 3, mid_activation="tanh")
