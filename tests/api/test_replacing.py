"""replace_depthwise_convs, and what explain says of a model: nobody notices, and the report says what was left."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fused_sepconv
from fused_sepconv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    SeparableConv2d,
    depthwise_conv2d,
    replace_depthwise_convs,
)
from tests.api.test_module import CLASSES, OF_A_CONVOLUTION, SHAPES, depthwise_kinds, old_norms
from tests.support.twins import assert_alike, assert_twins, run

pytestmark = pytest.mark.usefixtures("double")


@old_norms
@depthwise_kinds
@pytest.mark.parametrize("attach", OF_A_CONVOLUTION.values(), ids=OF_A_CONVOLUTION)
def test_what_was_attached_before_a_replacement_still_does_what_it_did(kind, attach):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(nn.Sequential(CLASSES[kind][1](4, 4, 3, padding=1, groups=4)))
        attach(models[-1][0])
    model, replaced = models
    report = replace_depthwise_convs(replaced)
    parametrised = parametrize.is_parametrized(model[0])
    assert report.replaced == (() if parametrised else ("0",))
    assert [(name, "parametris" in reason) for name, reason in report.skipped] == [("0", True)] * parametrised
    for _ in range(2):
        assert_twins(replaced, model, torch.randn(SHAPES[kind]))


@depthwise_kinds
@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
def test_padding_changed_later_does_what_it_does_in_pytorchs(kind, mode):
    """PyTorch settles at construction how far a padding with other than zeros reaches."""
    ours_class, theirs_class = CLASSES[kind]
    theirs = theirs_class(4, 4, 3, padding=1, groups=4, padding_mode=mode)
    converted, adopted = copy.deepcopy(theirs), ours_class.from_conv(theirs)
    replace_depthwise_convs(converted)
    ours = ours_class(4, 3, padding=1, padding_mode=mode)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(SHAPES[kind])
    for padding in ((2,) if kind == "1d" else (2, 0), 0, "valid"):
        for module in (theirs, converted, adopted, ours):
            module.padding = theirs_class(4, 4, 3, padding=padding).padding
        for module in (converted, adopted, ours):
            torch.testing.assert_close(module(x), theirs(x))


# explain


def test_explain_plans_a_call_and_every_layer_of_a_model():
    x = torch.empty(2, 64, 12, 12, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(64, 1, 7, 7, dtype=torch.bfloat16, device="meta")
    call = fused_sepconv.explain(depthwise_conv2d, x, weight, padding=3, device="H200")
    assert call.forward.problem.kernel == (7, 7) and call.forward.problem.direction == "forward"
    assert call.backward.problem.direction == "backward"
    assert "pytorch" in str(call)
    model = nn.Sequential(
        DepthwiseConv2d(64, 7, padding=3), nn.GELU(), SeparableConv2d(64, 8, 3), nn.Flatten(2), DepthwiseConv1d(8, 5)
    ).to("meta", torch.bfloat16)
    layers = fused_sepconv.explain(model, x, device="H200").layers
    assert [name for name, _ in layers] == ["0", "2", "4"]
    assert layers[0][1] == call
    assert layers[2][1].forward.problem.kernel == (1, 5)


def test_explain_takes_either_function_by_name_and_separable_conv2d_without():
    x, weights = torch.randn(1, 4, 5, 5), (torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1))
    assert fused_sepconv.explain(fused_sepconv.separable_conv2d, x, *weights) == fused_sepconv.explain(x, *weights)


# Replacing


class Same(nn.Conv2d):
    """As timm's: a subclass that pads by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class InvertedResidual(nn.Module):
    """As in EfficientNet: a norm, an activation and a gate between the depthwise and the pointwise convolution."""

    def __init__(self, channels, kernel, stride):
        super().__init__()
        hidden = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU())
        self.conv_dw = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, hidden, 1), nn.Sigmoid())
        self.conv_pwl = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        y = F.silu(self.bn(self.conv_dw(self.expand(x))))
        return self.conv_pwl(y * self.gate(y))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.ModuleList([ConvNeXtBlock(8), InvertedResidual(8, 5, 2), InvertedResidual(8, 3, 1)])
        self.shared = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, padding_mode="reflect")
        self.again = self.shared
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.tokens = nn.Conv1d(8, 16, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.again(F.relu(self.shared(x)))
        return self.head(self.tokens(self.grouped(x).flatten(2)).mean(-1))


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_a_network_is_replaced_in_place_and_nobody_notices(training):
    torch.manual_seed(4)
    network = Network().train(training)
    before = copy.deepcopy(network)
    parameters, modules = dict(network.named_parameters()), dict(network.named_modules())
    report = replace_depthwise_convs(network)
    assert report.replaced == ("blocks.0.dwconv", "blocks.1.conv_dw", "blocks.2.conv_dw", "shared", "tokens")
    assert report.skipped == ()
    assert all(dict(network.named_parameters())[name] is p for name, p in parameters.items())
    assert all(dict(network.named_modules())[name] is m for name, m in modules.items())
    assert network.state_dict().keys() == before.state_dict().keys()
    assert isinstance(network.tokens, DepthwiseConv1d) and network.again is network.shared
    for module in network.modules():
        assert module.training is training
    x = torch.randn(2, 3, 24, 20)
    assert_alike(run(network, x), run(before, x))
    assert_alike(dict(network.named_buffers()), dict(before.named_buffers()))
    network.load_state_dict(before.state_dict())
    assert_alike(run(copy.deepcopy(network), x), run(before, x))


def test_the_report_says_what_was_left_and_why():
    parametrised = nn.Conv2d(4, 4, 3, groups=4)
    parametrizations.weight_norm(parametrised)
    patched = nn.Conv2d(4, 4, 3, groups=4)
    patched.forward = lambda x: x
    model = nn.ModuleDict({
        "plain": nn.Conv2d(4, 8, (3, 1), groups=4), "one channel": nn.Conv2d(1, 8, 3),
        "grouped": nn.Conv2d(4, 8, 3, groups=2), "parametrised": parametrised, "patched": patched,
        "subclass": Same(4, 4, 3, groups=4), "volume": nn.Conv3d(4, 4, 3, groups=4),
        "transposed": nn.ConvTranspose2d(4, 4, 3, groups=4),
        "complex": nn.Conv2d(4, 4, 3, groups=4, dtype=torch.complex64),
        "separable": SeparableConv2d(4, 5, 3), "ours": DepthwiseConv2d(4, 3),
    })  # fmt: skip
    report = replace_depthwise_convs(model)
    assert report.replaced == ("plain",)
    reasons = dict(report.skipped)
    words = {
        "parametrised": "parametrised", "patched": "forward", "subclass": "Same", "volume": "Conv3d",
        "transposed": "ConvTranspose2d", "complex": "complex64", "separable.depthwise": "SeparableConv2d",
    }  # fmt: skip
    assert reasons.keys() == words.keys() and all(word in reasons[name] for name, word in words.items()), reasons
    assert type(model["separable"].depthwise) is nn.Conv2d and model["separable"].runs_as_one()
    assert "plain" in str(report) and reasons["subclass"] in str(report)
    again = replace_depthwise_convs(model)
    assert again.replaced == () and again.skipped == report.skipped


def test_a_convolution_by_itself_is_replaced_too():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    x = torch.randn(1, 4, 5, 5)
    y = conv(x)
    assert replace_depthwise_convs(conv).replaced == ("(the model)",)
    assert isinstance(conv, DepthwiseConv2d)
    torch.testing.assert_close(conv(x), y)
