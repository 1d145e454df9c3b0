"""Other people's models with their depthwise and pointwise convolutions swapped for ours: same keys and gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_sepconv import SeparableConv2d, explain, replace_separable_convs
from fused_sepconv.models import xception
from fused_sepconv.transforms.adopted import AdoptedSeparableConv2d, DepthwiseOfPair
from tests.support.third_party import segmentation_models_pytorch, timm, torchvision


def with_statistics(model):
    """BatchNorms that do something, in evaluation too."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def assert_same(ours, theirs, tolerance=1e-5):
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def swapped(model):
    """(the model with its pairs swapped, as it was, the report): keys and parameters are the same ones."""
    before = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    report = replace_separable_convs(model)
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    return model, before, report


def assert_same_step(ours, theirs, x):
    """A training step gives the same loss and the same gradients."""
    for model in (ours, theirs):
        model.train()
        model.zero_grad()
        torch.manual_seed(0)  # of a dropout
        model(x).square().mean().backward()
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(their.grad.abs().max())
        assert (mine.grad - their.grad).abs().max() <= 1e-4 * scale + 1e-9, name


MODELS = {
    "legacy_xception": lambda: timm.create_model("legacy_xception", num_classes=10),
    "xception41p": lambda: timm.create_model("xception41p", num_classes=10),
    "DeepLabV3Plus": lambda: segmentation_models_pytorch.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name == "xception41p" else ()) for name in MODELS]
)
def test_a_swapped_model_gives_what_it_gave_and_trains_as_it_did(name):
    ours, theirs, report = swapped(with_statistics(MODELS[name]()))
    x = torch.randn(2, 3, 96, 96)
    assert not any(module.training for module in ours.modules())
    with torch.no_grad():
        assert_same(ours(x), theirs(x))
    assert_same_step(ours, theirs, x)
    names = dict(ours.named_modules())
    if name == "legacy_xception":
        assert len(report.replaced) == 34 and not report.skipped
        assert report.replaced[:3] == ("block1.rep.0", "block1.rep.3", "block2.rep.1")
        assert all(isinstance(names[replaced], SeparableConv2d) for replaced in report.replaced)
    elif name == "xception41p":
        assert len(report.replaced) == 39 and not report.skipped
        assert report.replaced[0] == "blocks.0.stack.conv1.conv_dw"
    elif name == "DeepLabV3Plus":
        assert report.replaced == (
            *(f"decoder.aspp.0.convs.{i}.0" for i in (1, 2, 3)),
            "decoder.aspp.1",
            "decoder.block2.0",
        )
        assert not report.skipped
    else:
        assert not report.replaced and len(report.skipped) == 17
        reason = "BatchNorm2d and ReLU6 between it and the pointwise convolution features.2.conv.2"
        assert ("features.2.conv.1.0", reason) in report.skipped
        assert "left as they are: 17" in str(report) and reason in str(report)


def test_ours_has_nothing_to_swap():
    model = xception(middle_blocks=1)
    report = replace_separable_convs(model)
    assert not report.replaced and not report.skipped


# What is a pair -----------------------------------------------------------------------------------------------------


def depthwise(channels=8, **options):
    return nn.Conv2d(channels, channels, 3, **{"padding": 1, "groups": channels, **options})


def pointwise(channels=8, features=6, **options):
    return nn.Conv2d(channels, features, 1, **options)


class Pair(nn.Module):
    """Two attributes, under names that say the opposite of what they are."""

    def __init__(self):
        super().__init__()
        self.pointwise, self.b = pointwise(), depthwise()
        self.depthwise = self.pointwise
        del self.pointwise

    def forward(self, x):
        return self.depthwise(self.b(x))


class Named(Pair):
    def forward(self, features, scale=None):
        return self.depthwise(self.b(features))


class Longer(nn.Module):
    """A pair in the midst of a forward, with a method of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv_dw, self.conv_pw, self.after = (
            nn.BatchNorm2d(8),
            depthwise(),
            pointwise(),
            nn.Conv2d(6, 2, 3),
        )

    def forward(self, x):
        y = self.conv_pw(self.conv_dw(torch.tanh(self.norm(x))))
        return self.after(y) + y.mean()

    def a_method(self):
        return 3


class OtherOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = depthwise(), pointwise(features=8)

    def forward(self, x):
        return self.depthwise(self.pointwise(x))


class Branches(Pair):
    def forward(self, x):
        y = self.b(x)
        return self.depthwise(y) + y.mean()


class Decides(Pair):
    def forward(self, x):
        return self.depthwise(self.b(x)) if x.sum() > 0 else x


class TrainsOtherwise(Pair):
    def forward(self, x):
        y = self.b(x)
        return self.depthwise(y.relu() if self.training else y)


class Twice(Pair):
    def forward(self, x):
        return self.depthwise(self.b(x)) + self.depthwise(self.b(x + 1))


class Detectron2Conv2d(nn.Conv2d):
    """As in detectron2: a convolution that may carry a norm and an activation."""

    def __init__(self, *args, norm=None, activation=None, **options):
        super().__init__(*args, **options)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


Detectron2Conv2d.__module__, Detectron2Conv2d.__qualname__ = "detectron2.layers.wrappers", "Conv2d"


class Detectron2Pair(nn.Module):
    def __init__(self, norm=None, activation=None):
        super().__init__()
        norms = (None, None) if norm is None else (norm(8), norm(6))
        self.depthwise = Detectron2Conv2d(8, 8, 3, padding=1, groups=8, norm=norms[0], activation=activation)
        self.pointwise = Detectron2Conv2d(8, 6, 1, norm=norms[1], activation=activation)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


def hooked(model, child):
    model.get_submodule(child).register_forward_hook(lambda *_: None)
    return model


def patched():
    model = Pair()
    model.b.forward = lambda x: 2 * nn.Conv2d.forward(model.b, x)
    return model


def shared():
    convs = depthwise(), pointwise(features=8)
    return nn.Sequential(nn.Sequential(*convs), nn.Sequential(*convs))


def pruned():
    model = Pair()
    nn.utils.parametrizations.weight_norm(model.b)
    return model


TAKEN = {
    "two attributes of a module": (Pair, "block"),
    "neighbours in a Sequential": (lambda: nn.Sequential(depthwise(stride=2), pointwise(bias=False)), "block"),
    "in a longer Sequential": (lambda: nn.Sequential(nn.ReLU(), depthwise(), pointwise(), nn.ReLU()), "block.1"),
    "across two Sequentials": (
        lambda: nn.Sequential(nn.Sequential(nn.ReLU(), depthwise()), nn.Sequential(pointwise(), nn.ReLU())),
        "block.0.1",
    ),
    "in a forward with arguments of its own": (Named, "block.b"),
    "in a longer forward": (Longer, "block.conv_dw"),
    "a depth multiplier and a dilation": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=8), pointwise(16)),
        "block",
    ),
    "detectron2's, without norms": (Detectron2Pair, "block.depthwise"),
    "timm's SeparableConvNormAct": (lambda: timm.layers.SeparableConvNormAct(8, 6), "block.conv_dw"),
    "timm's SeparableConv2d, which has properties": (lambda: timm.layers.SeparableConv2d(8, 6), "block.conv_dw"),
    "timm's TensorFlow padding": (
        lambda: timm.layers.SeparableConv2d(8, 6, stride=2, padding="same"),
        "block.conv_dw",
    ),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_pair_is_taken_wherever_it_is(what):
    make, name = TAKEN[what]
    model = with_statistics(nn.ModuleDict({"block": make()}))["block"]
    holder = nn.Sequential()
    holder.add_module("block", model)
    ours, theirs, report = swapped(holder.double())
    assert report.replaced == (name,) and not report.skipped
    assert isinstance(ours.get_submodule(name), (AdoptedSeparableConv2d, DepthwiseOfPair))
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        assert_same(ours(x), theirs(x), 1e-12)
    assert_same_step(ours, theirs, x)
    explanation = explain(ours, x)
    assert [layer for layer, _ in explanation.layers] == [name]
    assert replace_separable_convs(ours).replaced == ()


LEFT = {
    "nothing follows": (lambda: nn.Sequential(depthwise(), nn.ReLU()), "no pointwise convolution follows after ReLU"),
    "the other order": (OtherOrder, "no pointwise convolution follows in"),
    "a norm between": (lambda: nn.Sequential(depthwise(), nn.GroupNorm(2, 8), pointwise()), "GroupNorm between"),
    "a strided pointwise one": (lambda: nn.Sequential(depthwise(), pointwise(stride=2)), "but block.1, Conv2d"),
    "another reader": (Branches, "used in 2 places"),
    "a squeeze-and-excitation between": (
        lambda: nn.Sequential(depthwise(), timm.layers.SqueezeExcite(8), pointwise()),
        "used in 2 places: SEModule block.1",
    ),
    "a forward that decides": (Decides, "the forward of block cannot be traced (TraceError"),
    "something between in training": (TrainsOtherwise, "is not of the form pointwise(depthwise(x))"),
    "called twice": (Twice, "called in several places"),
    "shared": (shared, "called in several places"),
    "hooks": (lambda: hooked(Pair(), "b"), "it carries hooks"),
    "hooks on the other": (
        lambda: hooked(Pair(), "depthwise"),
        "the pointwise convolution block.depthwise carries hooks",
    ),
    "a parametrised weight": (pruned, "a ParametrizedConv2d is more than a convolution"),
    "a forward of the instance's own": (patched, "a Conv2d is more than a convolution"),
    "another padding": (
        lambda: nn.Sequential(depthwise(padding_mode="reflect"), pointwise()),
        "padding_mode is 'reflect'",
    ),
    "detectron2's, with norms": (lambda: Detectron2Pair(nn.BatchNorm2d), "a norm or an activation of its own"),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_no_pair_is_left_with_its_reason(what):
    make, reason = LEFT[what]
    holder = nn.Sequential()
    holder.add_module("block", make())
    types = [type(module) for module in holder.modules()]
    report = replace_separable_convs(holder)
    assert not report.replaced
    (skipped,) = report.skipped
    assert reason in skipped[1], skipped
    assert [type(module) for module in holder.modules()] == types


def test_a_model_in_training_stays_in_training():
    model = nn.Sequential(nn.Sequential(depthwise(), pointwise(features=8)), Longer())
    model[1].after.eval()
    assert len(replace_separable_convs(model).replaced) == 2
    assert [name for name, module in model.named_modules() if not module.training] == ["1.after"]


def test_a_child_s_own_name_comes_before_ours():
    ours, theirs, report = swapped(nn.Sequential(Pair()))
    assert report.replaced == ("0",)
    assert ours[0].depthwise.kernel_size == ours.get_submodule("0.depthwise").kernel_size == (1, 1)
    x = torch.randn(1, 8, 5, 5)
    for model in (ours, torch.fx.symbolic_trace(ours), copy.deepcopy(ours)):
        assert_same(model(x), theirs(x))
    with pytest.raises(RuntimeError, match=r"cannot compile a AdoptedSeparableConv2d: call .*restore_convs\(model\)"):
        torch.jit.script(ours)


def test_the_model_itself_may_be_the_pair():
    ours, theirs, report = swapped(Pair())
    assert report.replaced == ("b",)
    x = torch.randn(1, 8, 5, 5)
    assert_same(ours(x), theirs(x))
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        replace_separable_convs(3)


# A swapped model is an ordinary one ---------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """One that is a module of its own, and one in a longer forward, swapped."""
    model = nn.Sequential(nn.Sequential(depthwise(), pointwise(features=8)), Longer()).eval()
    assert replace_separable_convs(model).replaced == ("0", "1.conv_dw")
    assert model[1].a_method() == 3
    assert isinstance(model[0], nn.Sequential) and [type(conv) for conv in model[0]] == [nn.Conv2d, nn.Conv2d]
    return model


X = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))


def test_a_copy_keeps_the_pairs_and_has_weights_of_its_own(pair):
    expected = pair(X)
    for model in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert torch.equal(model(X), expected)
        with torch.no_grad():
            model[1].conv_pw.weight.zero_()
        assert not torch.equal(model(X), expected) and torch.equal(pair(X), expected)


def test_a_swapped_model_compiles_and_exports(pair):
    expected = pair(X)
    torch.testing.assert_close(torch.compile(pair, fullgraph=True, backend="aot_eager")(X), expected)
    program = torch.export.export(pair, (X,))
    calls = [node for node in program.graph.nodes if "fused_sepconv" in str(node.target)]
    assert len(calls) == 1, "the pair in the longer forward is its two convolutions for whoever traces it"
    torch.testing.assert_close(program.module()(X), expected)
    assert set(program.state_dict) >= set(dict(pair.named_parameters()))
