"""BatchNorm joined to an addition or a max-pooling: what PyTorch computes, in every mode, by the kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_sepconv import fuse_batch_norm
from fused_sepconv.models.max_pool import MaxPool3x3
from fused_sepconv.nn import norm_units as units
from fused_sepconv.nn.normalised import Normalised
from fused_sepconv.ops import joins
from tests.support.closeness import assert_gradient_as_close_as_eager
from tests.support.joins import prepared

C = 8


class Added(nn.Module):
    """A residual connection."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x):
        return self.bn(self.conv(x)) + x


class AddedInPlace(Added):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x
        return y


class Pooled(nn.Module):
    """A max-pooling, and a strided residual connection with a norm of its own."""

    def __init__(self, pool=None):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(C, 2 * C, 1), nn.BatchNorm2d(2 * C), pool or MaxPool3x3(2)
        self.skip, self.skip_bn = nn.Conv2d(C, 2 * C, 1, stride=2), nn.BatchNorm2d(2 * C, affine=False)

    def forward(self, x):
        return self.pool(self.bn(self.conv(x))) + self.skip_bn(self.skip(x))


class PooledAlone(Pooled):
    def forward(self, x):
        return torch.tanh(self.pool(self.bn(self.conv(x))))


MODELS = {
    "added": Added,
    "added in place": AddedInPlace,
    "pooled": Pooled,
    "pooled, PyTorch's": lambda: Pooled(nn.MaxPool2d(3, 2, 1)),
    "pooled alone": PooledAlone,
}
NORMS = {"added": 1, "added in place": 1, "pooled": 2, "pooled, PyTorch's": 2, "pooled alone": 1}


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).to(memory_format=torch.channels_last)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if dtype.itemsize < 4:
                norm.float()
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
            norm.running_var.uniform_(0.5, 2)
    return model


def image(dtype=torch.float64, size=9):
    x = torch.randn(3, C, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def step(model, x):
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()], allow_unused=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True)), **buffers}


@pytest.fixture
def in_pytorch(monkeypatch):
    """The operators in PyTorch's, in float64 too; gives the kinds of kernels that were asked for."""
    asked = []
    monkeypatch.setattr(units, "asks_the_plan", lambda x, backend: True)
    monkeypatch.setattr(units, "why_not", lambda x: "")
    monkeypatch.setattr(joins, "_prepared", lambda kind, *args: asked.append(kind.__name__) or prepared(kind, *args))
    return asked


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", MODELS)
def test_in_float64_a_join_is_its_parts(in_pytorch, name, training):
    plain = built(name).train(training)
    fused = copy.deepcopy(plain)
    assert len(fuse_batch_norm(fused).replaced) == NORMS[name]
    right, ours = step(plain, image()), step(fused, image())
    for each, value in right.items():
        torch.testing.assert_close(ours[each], value, rtol=1e-10, atol=1e-10)
    assert in_pytorch == (["Add"] if "added" in name else ["Pool", "Add", "PoolBackward"])


@pytest.mark.parametrize("name", ("added", "pooled"))
@pytest.mark.parametrize("training", (True, False))
def test_first_and_second_derivatives(in_pytorch, name, training):
    model = built(name).train(training)
    fuse_batch_norm(model)
    x = image(size=5)
    state = copy.deepcopy(model.state_dict())

    def function(x, *parameters):
        names = [name for name, _ in model.named_parameters()]
        values = {**{name: value.clone() for name, value in state.items()}, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(model, values, x)

    values = (x[:2].detach().requires_grad_(), *(each.detach().requires_grad_() for each in model.parameters()))
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)
    assert "Add" in in_pytorch


def test_a_joined_norm_is_still_a_tensor_for_everybody_else(in_pytorch):
    model = built("pooled")
    fuse_batch_norm(model)
    x = model.conv(image()).detach()

    def pooled():
        return model.pool(model.bn(x))

    handed = model.bn(x)
    assert type(handed) is Normalised and type(model.pool(handed)) is Normalised
    assert model.pool(handed).shape == (3, 2 * C, 5, 5) and not in_pytorch
    right = F.max_pool2d(handed + 0, 3, 2, 1)
    torch.testing.assert_close(pooled() * 1, right)
    torch.testing.assert_close(pooled().neg(), -right)
    assert int(model.bn.num_batches_tracked) == 3  # each call of the norm counts once, however often it is read
    other = torch.ones(3, 2 * C, 1, 1, dtype=torch.float64)  # broadcast: PyTorch's addition
    torch.testing.assert_close(pooled() + other, right + 1)
    torch.testing.assert_close(2 + pooled(), right + 2)


def test_nothing_is_joined_under_transforms_and_compilers(in_pytorch):
    plain = built("pooled").eval()
    fused = copy.deepcopy(plain)
    fuse_batch_norm(fused)
    x = image().detach()
    right = torch.func.grad(lambda x: plain(x).square().sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda x: fused(x).square().sum())(x), right)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    assert not in_pytorch


@pytest.mark.parametrize("spoil, reason", [
    (lambda m: m.pool.register_forward_hook(lambda *_: None), "MaxPool3x3"),
    (lambda m: setattr(m, "pool", nn.MaxPool2d(2, 2)), "MaxPool2d"),
    (lambda m: setattr(m, "pool", MaxPool3x3(1)), "MaxPool3x3"),
    (lambda m: setattr(m, "pool", nn.MaxPool2d(3, 2, return_indices=True)), ""),
])  # fmt: skip
def test_other_poolings_are_left_alone(spoil, reason):
    model = built("pooled alone")
    spoil(model)
    assert reason in dict(fuse_batch_norm(model).skipped)["bn"]


# Emulated, from here on


@pytest.mark.gradients
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_are_as_close_to_the_oracle_as_eager(plain, name, training, dtype):
    eager = built(name, dtype).train(training)
    fused, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    fuse_batch_norm(fused)
    plain.reset_launch_counts()
    ours = step(fused, image(dtype))
    names = {"norm_add"} if "added" in name else {"norm_add", "norm_pool", "norm_pool_backward"}
    assert {f"{each}_{str(dtype).removeprefix('torch.')}" for each in names} <= set(plain.launch_counts())
    yardstick, oracle = step(eager, image(dtype)), step(exact, image(dtype).detach().double().requires_grad_())
    for each, mine in ours.items():
        if mine is not None and mine.is_floating_point():
            assert_gradient_as_close_as_eager(mine, yardstick[each], oracle[each], name=each)
