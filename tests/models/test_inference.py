"""`optimize_for_inference`: what is folded gives what it gave, and what cannot be folded stays."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_sepconv import SeparableConv2d, optimize_for_inference, replace_separable_convs
from fused_sepconv.models import xception
from fused_sepconv.transforms.inference import FoldedSeparableConv2d
from tests.models.test_convert import Detectron2Pair, assert_same, depthwise, hooked, pointwise, with_statistics
from tests.support.third_party import segmentation_models_pytorch, timm, torchvision


def optimized(model):
    """(the model, as it was, the report)"""
    before = copy.deepcopy(model)
    return model, before, optimize_for_inference(model)


def count(model, *types):
    return sum(isinstance(module, types) for module in model.modules())


NETWORKS = {
    "legacy_xception": (lambda: timm.create_model("legacy_xception", num_classes=10), 34, 6, 8),
    "xception41": (lambda: timm.create_model("xception41", num_classes=10), 39, 6, 12),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 17, 18, 10),
    "DeepLabV3Plus": (
        lambda: segmentation_models_pytorch.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3), 5, 24, 0
    ),
    "ours": (lambda: xception(10, width=0.25), 34, 6, 8),
}  # fmt: skip
BY_DEFAULT = {("legacy_xception", True), ("mobilenet_v2", False), ("DeepLabV3Plus", True), ("ours", False)}


@pytest.mark.parametrize(
    ("name", "swapped_first"),
    [
        pytest.param(name, first, marks=() if (name, first) in BY_DEFAULT else pytest.mark.full)
        for name in NETWORKS
        for first in (False, True)
    ],
)
@torch.no_grad()
def test_an_optimized_model_gives_what_it_gave(name, swapped_first):
    make, pairs, norms, residuals = NETWORKS[name]
    model = with_statistics(make())
    if swapped_first:
        replace_separable_convs(model)
    ours, theirs, report = optimized(model)
    assert len(report.replaced) == pairs == count(ours, FoldedSeparableConv2d) and not report.skipped
    assert count(ours, nn.BatchNorm2d) == norms, "those that no separable convolution precedes"
    assert count(ours, fx.GraphModule) == residuals
    x = torch.randn(1, 3, 96, 96)
    assert_same(ours(x), theirs(x))


class Block(nn.Module):
    """Everything at once: an activation before, norms and activations between and after, and a residual connection."""

    def __init__(self, between=None, after=None, before=None, add="out of place"):
        super().__init__()
        self.before = before or nn.Identity()
        self.conv_dw, self.between = depthwise(), between or nn.Identity()
        self.conv_pw, self.after = pointwise(features=8), after or nn.Identity()
        self.last, self.add = nn.ReLU(), add

    def forward(self, x):
        y = self.after(self.conv_pw(self.between(self.conv_dw(self.before(x)))))
        if self.add == "none":
            return y
        if self.add == "in place":
            y += x
            return self.last(y)
        return self.last(x + y)


def norm_and(activation):
    return nn.Sequential(nn.BatchNorm2d(8), activation)


FOLDED = {
    "nothing between": (Block, {"activation": "relu"}),
    "BatchNorm": (lambda: Block(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), {"activation": "relu"}),
    "BatchNorm without weights": (
        lambda: Block(nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)),
        {"activation": "relu"},
    ),
    "ReLU": (lambda: Block(norm_and(nn.ReLU(True)), add="in place"), {"mid_activation": "relu", "activation": "relu"}),
    "ReLU6": (lambda: Block(norm_and(nn.ReLU6()), norm_and(nn.ReLU6()), add="none"), {"activation": "relu6"}),
    "SiLU": (lambda: Block(norm_and(nn.SiLU()), nn.BatchNorm2d(8)), {"mid_activation": "silu", "activation": "relu"}),
    "Hardswish": (lambda: Block(norm_and(nn.Hardswish()), nn.Dropout2d(0.5)), {"mid_activation": "hardswish"}),
    "an activation alone": (lambda: Block(nn.SiLU()), {"mid_activation": "silu"}),
    "two norms": (lambda: Block(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), nn.BatchNorm2d(8)), {}),
    "an activation before": (lambda: Block(nn.BatchNorm2d(8), before=nn.ReLU6()), {"pre_activation": "relu6"}),
    "a frozen norm": (lambda: Block(torchvision.ops.FrozenBatchNorm2d(8)), {}),
    "timm's norm with activation": (
        lambda: Block(timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU), timm.layers.BatchNormAct2d(8, apply_act=False)),
        {"mid_activation": "silu", "activation": "relu"},
    ),
}


@pytest.mark.parametrize("what", FOLDED)
@torch.no_grad()
def test_what_is_round_a_pair_becomes_part_of_it(what):
    make, activations = FOLDED[what]
    ours, theirs, report = optimized(with_statistics(nn.Sequential(nn.Conv2d(3, 8, 1), make())).double())
    assert report.replaced == ("1.conv_dw",) and not report.skipped
    folded = ours[1].conv_dw
    for place, activation in activations.items():
        assert getattr(folded, place) == activation
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    assert_same(ours(x), theirs(x), 1e-12)
    if theirs[1].add != "none":
        rest = [type(module) for module in ours[1].modules() if not any(True for _ in module.children())]
        assert set(rest) <= {nn.Conv2d, nn.Identity}, "nothing else is left to run"
        assert "add" not in ours[1].code
        assert ours[1].code.count("conv_dw(") == 1
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


@torch.no_grad()
def test_an_addition_to_what_an_activation_gave_stays_an_addition():
    ours, theirs, report = optimized(with_statistics(nn.Sequential(Block(after=norm_and(nn.ReLU6())))).double())
    assert report.replaced == ("0.conv_dw",) and ours[0].conv_dw.activation == "relu6"
    assert isinstance(ours[0], Block) and isinstance(ours[0].last, nn.ReLU)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    assert_same(ours(x), theirs(x), 1e-12)


@torch.no_grad()
def test_detectron2_s_norms_and_activations_are_inside_its_convolutions():
    ours, theirs, report = optimized(with_statistics(nn.Sequential(Detectron2Pair(nn.BatchNorm2d, F.relu))).double())
    assert report.replaced == ("0.depthwise",)
    assert (ours[0].depthwise.mid_activation, ours[0].depthwise.activation) == ("relu", "relu")
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert_same(ours(x), theirs(x), 1e-12)


@torch.no_grad()
def test_a_convolution_of_another_shape_keeps_it():
    layers = (
        nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=4, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        pointwise(bias=False),
        nn.BatchNorm2d(6),
    )
    ours, theirs, report = optimized(with_statistics(nn.Sequential(*layers)).double())
    assert report.replaced == ("0",)
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    assert_same(ours(x), theirs(x), 1e-12)
    layer = SeparableConv2d(4, 6, 3, stride=2, padding=((0, 1), (2, 1)), pre_activation="relu", mid_activation="elu")
    for padding in (((0, 1), (2, 1)), "same", "valid"):
        layer = SeparableConv2d(4, 6, 3, stride=2, padding=padding, pre_activation="relu", mid_activation="elu")
        ours, theirs, report = optimized(with_statistics(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU())).double())
        assert report.replaced == ("0",) and ours[0].mid_activation == "elu"
        assert_same(ours(x), theirs(x), 1e-12)


class Mutates(nn.Module):
    """Its ReLU works in place on what the caller handed in, and a later reader sees that."""

    def __init__(self):
        super().__init__()
        self.relu, self.conv_dw, self.conv_pw = nn.ReLU(inplace=True), depthwise(), pointwise(features=8)

    def forward(self, x):
        return self.conv_pw(self.conv_dw(self.relu(x))) - x


class MutatesThroughAnother(Mutates):
    """The same, where another module hands the caller's tensor on."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Identity()

    def forward(self, x):
        return self.conv_pw(self.conv_dw(self.relu(self.nothing(x)))) - x


class AddsIntoAnother(Mutates):
    """The sum is written where another name still reads."""

    def forward(self, x):
        sum_ = another = x * 1
        sum_ += self.conv_pw(self.conv_dw(x))
        return 3 * sum_ + another


class WritesInBetween(Mutates):
    """What the convolution read is another thing by the time of the addition."""

    def forward(self, x):
        z = x * 1
        y = self.conv_pw(self.conv_dw(z))
        z *= 2
        return z + y


@pytest.mark.parametrize("make", (Mutates, MutatesThroughAnother, AddsIntoAnother, WritesInBetween))
@torch.no_grad()
def test_what_works_in_place_on_others_tensors_stays(make):
    ours, theirs, report = optimized(nn.Sequential(make()).eval())
    assert report.replaced == ("0.conv_dw",)
    assert ours[0].conv_dw.pre_activation is None
    x = torch.randn(1, 8, 5, 5)
    assert_same(ours(x.clone()), theirs(x.clone()))


STAYS = {
    "a norm of another kind": (lambda: Block(nn.GroupNorm(2, 8)), "GroupNorm between"),
    "a norm after the activation": (
        lambda: Block(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8))),
        "ReLU and BatchNorm2d between",
    ),
    "a norm with the batch's statistics": (
        lambda: Block(nn.BatchNorm2d(8, track_running_stats=False)),
        "BatchNorm2d between",
    ),
    "two activations": (lambda: Block(nn.Sequential(nn.ReLU(), nn.SiLU())), "ReLU and SiLU between"),
    "another activation": (lambda: Block(nn.LeakyReLU()), "LeakyReLU between"),
    "squeeze-and-excitation": (lambda: Block(timm.layers.SqueezeExcite(8)), "used in 2 places"),
    "hooks": (lambda: hooked(Block(nn.BatchNorm2d(8)), "between"), "BatchNorm2d between"),
}


@pytest.mark.parametrize("what", STAYS)
@torch.no_grad()
def test_what_cannot_be_folded_stays_with_its_reason(what):
    make, reason = STAYS[what]
    model = nn.Sequential(make()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
    ours, theirs, report = optimized(model)
    assert not report.replaced
    ((name, why),) = report.skipped
    assert name == "0.conv_dw" and reason in why
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(ours(x), theirs(x))


@torch.no_grad()
def test_in_bfloat16_the_weights_are_folded_before_they_are_rounded():
    model = with_statistics(nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.ReLU(), pointwise(), nn.BatchNorm2d(6)))
    exact = copy.deepcopy(model.bfloat16()).double()
    ours, theirs, _ = optimized(model)
    x = torch.randn(2, 8, 16, 16).bfloat16()
    truth = exact(x.double())
    assert (ours(x) - truth).norm() < 1.5 * (theirs(x) - truth).norm()


def test_it_is_for_evaluation_alone():
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(8), pointwise())
    with pytest.raises(ValueError, match=r"model: expected one in evaluation mode"):
        optimize_for_inference(model)
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        optimize_for_inference(3)
    optimize_for_inference(model.eval())
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    x = torch.randn(1, 8, 5, 5)
    model(x)
    with pytest.raises(RuntimeError, match="cannot train any more"):
        model.train()(x)


def test_a_second_time_there_is_nothing_to_do():
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(8), pointwise(), SeparableConv2d(6, 2, 3)).eval()
    assert optimize_for_inference(model).replaced == ("0",)
    again = optimize_for_inference(model)
    assert not again.replaced
    assert again.skipped == (("3", "there is nothing round it to fold"),)
