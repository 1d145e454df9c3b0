"""`restore_convs` gives PyTorch's own convolutions back: same keys, same results, and nothing of ours in between."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fused_sepconv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    SeparableConv2d,
    optimize_for_inference,
    replace_depthwise_convs,
    replace_separable_convs,
    restore_convs,
)
from fused_sepconv.models import xception


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pw = nn.Conv2d(8, 12, 1)  # declared before the convolution that is called before it
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        return self.pw(self.dw(x))


class Network(nn.Module):
    """A pair in the midst of a forward, one in a Sequential, one that is a module, and a depthwise one alone."""

    def __init__(self):
        super().__init__()
        self.dw = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.pw = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.row = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.Conv2d(8, 8, 1))
        self.pair = Pair()
        self.alone = nn.Conv2d(12, 12, 5, padding=2, groups=12)

    def forward(self, x):
        x = self.bn(self.pw(self.dw(x))).relu()
        return self.alone(self.pair(self.row(x)).relu())


def is_plain(model):
    return not any(
        type(module).__module__.startswith("fused_sepconv") and not type(module).__name__.startswith("Plain")
        for module in model.modules()
    )


def result(model, x):
    """Result and every gradient, by name."""
    x, parameters = x.clone().requires_grad_(), dict(model.named_parameters())
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return {"y": y, **dict(zip(("x", *parameters), gradients, strict=True))}


def assert_restored(model, x, before):
    """Restored, a model has the results, gradients, keys and parameters that it had."""
    expected, parameters = result(model, x), dict(model.named_parameters())
    report = restore_convs(model)
    assert report.replaced and not report.skipped
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == before.state_dict().keys()
    for other in (expected, result(before, x)):
        torch.testing.assert_close(result(model, x), other)


def test_a_converted_network_is_pytorchs_again():
    theirs = Network().double()
    ours = copy.deepcopy(theirs)
    assert len(replace_separable_convs(ours).replaced) == 3 and replace_depthwise_convs(ours).replaced == ("alone",)
    assert not is_plain(ours)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    assert_restored(ours, x, theirs)
    assert all(type(module) in (nn.Conv2d, nn.BatchNorm2d, nn.Sequential, Network) for module in ours.modules())
    assert vars(ours.alone).keys() == vars(theirs.alone).keys() and vars(ours.dw).keys() == vars(theirs.dw).keys()
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))
    assert not restore_convs(ours).replaced


OPTIONS = {
    "plain": {"padding": 1},
    "activations": {"padding": 1, "pre_activation": "silu", "activation": "gelu"},
    "relu6 and elu": {"pre_activation": "relu6", "activation": "elu"},
    "relu and hardswish": {"pre_activation": "relu", "activation": "hardswish"},
    "same": {"padding": "same"},
    "same with a stride": {"padding": "same", "stride": 2},
    "same with more stride than kernel": {"padding": "same", "stride": 4},
    "two sides": {"padding": (1, 2)},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "circular, same with a stride": {"padding": "same", "stride": 2, "padding_mode": "circular"},
    "two sides, replicated, dilation": {"padding": (0, 2), "padding_mode": "replicate", "dilation": 2},
    "depth multiplier": {"depth_multiplier": 2, "bias": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ("separable", "2d", "1d"))
def test_every_option_survives_and_scripts(kind, options):
    options = {**options}
    shape = (2, 4, 9) if kind == "1d" else (2, 4, 9, 8)
    if kind != "1d" and isinstance(options.get("padding", 0), tuple):
        options["padding"] = ((0, 1), options["padding"])
    if kind == "separable":
        module = SeparableConv2d(4, 5, 3, **options, mid_activation="relu", dtype=torch.float64)
    else:
        module = (DepthwiseConv2d if kind == "2d" else DepthwiseConv1d)(4, 3, **options, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(module)
    assert_restored(module, x, before)
    assert is_plain(module)
    scripted = torch.jit.script(module)
    for image in (x, torch.randn(1, 4, *(7,) * (len(shape) - 2), dtype=torch.float64)):
        torch.testing.assert_close(scripted(image), before(image))
    if options == OPTIONS["plain"] and kind != "separable":
        assert type(module) is (nn.Conv2d if kind == "2d" else nn.Conv1d)


def test_a_residual_is_still_added():
    module = SeparableConv2d(4, 4, 3, padding=1, activation="relu")
    x, residual = torch.randn(2, 2, 4, 5, 5)
    expected = module(x, residual)
    restore_convs(module)
    torch.testing.assert_close(module(x, residual), expected)
    torch.testing.assert_close(torch.jit.script(module)(x, residual), expected)


def test_what_is_attached_stays():
    model = nn.Sequential(DepthwiseConv2d(4, 3, padding=1), SeparableConv2d(4, 6, 3))
    parametrizations.weight_norm(model[0])
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 4, 7, 7)
    expected, keys = model(x), model.state_dict().keys()
    assert restore_convs(model).replaced == ("0", "1")
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0], nn.Conv2d) and not isinstance(model[0], DepthwiseConv2d)
    assert model.state_dict().keys() == keys and len(seen) == 2


def test_a_folded_and_an_own_network_are_restored_too():
    x = torch.randn(1, 3, 71, 71)
    model = xception(10, width=0.05, middle_blocks=1).eval()
    folded = copy.deepcopy(model)
    optimize_for_inference(folded)
    for network in (model, folded):
        expected = network(x)
        assert restore_convs(network).replaced and is_plain_of_pairs(network)
        torch.testing.assert_close(network(x), expected)


def is_plain_of_pairs(model):
    return not any(isinstance(module, SeparableConv2d) for module in model.modules())


def test_a_forward_of_the_users_own_is_left_and_named():
    class Twice(SeparableConv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    report = restore_convs(nn.Sequential(Twice(4, 4, 3)))
    assert not report.replaced and report.skipped == (("0", "a Twice has a forward of its own"),)
    with pytest.raises(TypeError, match=r"model: expected an nn.Module"):
        restore_convs(3)
