"""A real photograph through a stack of three layers and back, with the torch pair beside it."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn

from fused_sepconv import SeparableConv2d
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager

LAYERS = (
    {"in_channels": 3, "out_channels": 16, "kernel_size": 3, "stride": 2, "padding": 1},
    {"in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1, "dilation": 1},
    {"in_channels": 32, "out_channels": 24, "kernel_size": 5, "stride": (2, 2), "padding": 2},
)


def photograph(name):
    """(1, 3, 427, 640), between -1 and 1."""
    pixels = np.array(load_sample_image(name))
    assert pixels.shape == (427, 640, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 127.5 - 1


def stacks():
    """Three layers of ours with ReLU between, and three torch pairs that share nothing but their values."""
    ours = nn.Sequential(*(SeparableConv2d(**layer, activation="relu") for layer in LAYERS))
    pairs = []
    for layer, mine in zip(LAYERS, ours, strict=True):
        depthwise_options = {**layer, "out_channels": layer["in_channels"], "groups": layer["in_channels"]}
        depthwise = nn.Conv2d(**depthwise_options, bias=False)
        pointwise = nn.Conv2d(layer["in_channels"], layer["out_channels"], 1)
        depthwise.load_state_dict(mine.depthwise.state_dict())
        pointwise.load_state_dict(mine.pointwise.state_dict())
        pairs += [nn.Sequential(depthwise, pointwise, nn.ReLU())]
    return ours, nn.Sequential(*pairs)


def there_and_back(network, image):
    """The result, the loss, and every gradient in the order of the parameters, the image's first."""
    image = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = network(image)
    loss = (y.float() if y.dtype.itemsize < 4 else y).square().mean()
    loss.backward()
    return y.detach(), loss.detach(), [image.grad, *(parameter.grad for parameter in network.parameters())]


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize(
    "name, memory_format, every",
    (
        pytest.param("china.jpg", torch.contiguous_format, 4, id="china-nchw"),
        pytest.param("flower.jpg", torch.channels_last, 4, id="flower-nhwc"),
        *(
            pytest.param(f"{name}.jpg", layout, 1, id=f"{name}-{layout}", marks=pytest.mark.full)
            for name in ("china", "flower")
            for layout in (torch.contiguous_format, torch.channels_last)
        ),
    ),
)
def test_a_photograph_goes_through_three_layers_and_back_as_through_the_torch_pairs(
    target, dtype, name, memory_format, every
):
    """One pixel of four a side, or in full."""
    image = photograph(name)[..., ::every, ::every].to(dtype)
    ours, theirs = (network.to(dtype) for network in stacks())
    exact, exact_loss, exact_gradients = there_and_back(copy.deepcopy(theirs).double(), image.double())
    image = image.to(target.device).contiguous(memory_format=memory_format)
    actual, loss, gradients = there_and_back(ours.to(target.device, memory_format=memory_format), image)
    eager, eager_loss, eager_gradients = there_and_back(theirs.to(target.device, memory_format=memory_format), image)

    assert actual.shape == (1, 24, -(-107 // every), 160 // every) and exact.std() > 0.01, "the photograph still shows"
    assert_as_close_as_eager(actual, eager, exact)
    for value in (loss, eager_loss):
        torch.testing.assert_close(value.double().cpu(), exact_loss, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert len(gradients) == 1 + 3 * 3
    for number, trio in enumerate(zip(gradients, eager_gradients, exact_gradients, strict=True)):
        assert trio[2].abs().max() > 0
        assert_gradient_as_close_as_eager(*trio, name=f"gradient {number}")
