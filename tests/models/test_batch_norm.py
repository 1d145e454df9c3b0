"""`fuse_batch_norm`: the fused model is the unfused one, in every mode, and what can't be fused is left alone."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_sepconv import (
    DepthwiseConv2d,
    SeparableConv2d,
    explain,
    fuse_batch_norm,
    replace_separable_convs,
    unfuse_batch_norm,
)
from fused_sepconv.models import xception
from fused_sepconv.nn import norm_units as units
from fused_sepconv.nn.normalised import Normalised
from fused_sepconv.ops import joins, norm_units
from tests.support.joins import prepared


def small(**options):
    torch.manual_seed(0)
    options = {"middle_blocks": 1, "width": 0.05, "dtype": torch.float64, **options}
    model = xception(5, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
                module.weight[0] = 0
    return model


@pytest.fixture(params=(False, True), ids=("composed", "operator"))
def operator(request, monkeypatch):
    """PyTorch's BatchNorm, or the operator (in PyTorch's operators, as there is no float64 kernel)."""
    calls = []
    if request.param:
        monkeypatch.setattr(units, "asks_the_plan", lambda x, backend: True)
        monkeypatch.setattr(norm_units, "runs", lambda x, *_: calls.append(x) is None)
        monkeypatch.setattr(norm_units, "_prepared", lambda *_: None)
        monkeypatch.setattr(units, "why_not", lambda x: "")
        monkeypatch.setattr(joins, "_prepared", lambda *args: calls.append(args) or prepared(*args))
    return calls if request.param else None


def train(model, steps, freeze=False):
    """Outputs, gradients and state over several steps."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(steps):
        model.train()
        if freeze:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        optimizer.zero_grad()
        y = model(torch.randn(2, 3, 40, 40, generator=generator, dtype=torch.float64))
        y.square().sum().log().backward()  # a step that does not depend on how large y is
        seen += [y.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        model.eval()
        with torch.no_grad():
            seen.append(model(torch.ones(1, 3, 40, 40, dtype=torch.float64)))
    return [*seen, *model.state_dict().values()]


@pytest.mark.parametrize("freeze", (False, True), ids=("batch", "frozen"))
@pytest.mark.parametrize("momentum", (0.1, None), ids=str)
def test_a_network_trains_as_without(operator, freeze, momentum):
    plain = small(bn_momentum=momentum)
    fused = copy.deepcopy(plain)
    assert len(fuse_batch_norm(fused).replaced) == 3 + 2 + 2 + 9
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for ours, right in zip(train(fused, 3, freeze), train(plain, 3, freeze), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)
    assert operator is None or operator


def test_xception_fuses_37_of_40_and_there_is_a_way_back():
    """21 with a convolution, 8 with an addition, 4 with a max-pooling, and the 4 beside those with its addition."""
    model = xception(10, device="meta", fuse_norm=True)
    assert len(unfuse_batch_norm(model).replaced) == 37
    assert all(type(module) in (nn.BatchNorm2d,) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    report = fuse_batch_norm(model)
    assert len(report.replaced) == 37
    reasons = dict(report.skipped)
    assert "adaptive_avg_pool2d" in reasons["exit.module2.bn2"]
    assert "2 places" in reasons["entry.module1.bn2"]
    with pytest.raises(TypeError, match="model"):
        fuse_batch_norm(torch.relu)


class Block(nn.Module):
    """BatchNorm → ReLU → depthwise and pointwise, with a switch."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1))
        self.sepconv = SeparableConv2d(6, 4, 3, padding=1)
        self.norm2, self.depthwise = nn.BatchNorm2d(4), DepthwiseConv2d(4, 3, pre_activation="silu")

    def forward(self, x):
        return self.depthwise(self.norm2(self.sepconv(self.conv(self.act(self.norm(x))))))


def block():
    torch.manual_seed(0)
    return Block().double()


def step(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters())), *model.buffers()]


def close(ours, right):
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


X = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_other_peoples_pairs_and_depthwise_convolutions(operator):
    plain, fused = block(), block()
    replace_separable_convs(fused)
    assert fuse_batch_norm(fused).replaced == ("norm", "norm2")
    for model in (fused, pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        close(step(model, X), step(copy.deepcopy(plain), X))
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    close(step(compiled, X)[0], step(copy.deepcopy(plain), X)[0])
    assert operator is None or len(operator) >= 6


def test_hooks_are_heard_before_and_after():
    model = block()
    replace_separable_convs(model)
    seen = []
    handle = model.norm.register_forward_hook(lambda module, args, result: seen.append(result))
    assert dict(fuse_batch_norm(model).skipped)["norm"].startswith("it carries hooks")
    handle.remove()
    assert fuse_batch_norm(model).replaced == ("norm",)
    right = step(block(), X)
    model.norm.register_forward_hook(lambda module, args, result: seen.append(result))
    close(step(model, X), right)
    assert isinstance(seen[0], torch.Tensor)


def test_every_other_reader_gets_a_tensor():
    norm = nn.BatchNorm2d(4).double()
    right = copy.deepcopy(norm)(X)
    model = nn.Sequential(norm, SeparableConv2d(4, 4, 3)).double()
    fuse_batch_norm(model)
    handed = norm(X)
    assert type(handed) is Normalised
    results = (handed + 0, 0 + handed, handed * 1, F.max_pool2d(handed, 1), torch.cat([handed]), handed.clone(),
               handed[:], abs(handed) - abs(handed) + handed)  # fmt: skip
    close(results, [right] * len(results))
    assert handed.shape == right.shape
    close([F.relu(handed) + 0, F.gelu(handed)], [F.relu(right), F.gelu(right)])
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * X.mean((0, 2, 3)))
    changed = X.clone()
    handed = norm(changed)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        model[1](handed)


@pytest.mark.parametrize(
    "spoil, reason",
    (
        (lambda m: m.depthwise.register_forward_pre_hook(lambda *_: None), "carries hooks"),
        (lambda m: setattr(m.depthwise, "padding_mode", "reflect"), "zeros around"),
        (lambda m: setattr(m, "norm2", nn.Sequential(m.norm2, nn.ReLU())), "one activation before"),
        (lambda m: setattr(m, "norm", m.norm2), "several places"),
        (lambda m: setattr(m, "norm2", nn.Sequential(m.norm2, nn.Dropout())), "Dropout"),
    ),
)
def test_what_cannot_be_fused_is_left_with_its_reason(spoil, reason):
    model = block()
    spoil(model)
    report = fuse_batch_norm(model)
    assert any(reason in why for _, why in report.skipped), report


def test_explain_sees_a_fused_model():
    model = small(dtype=torch.float32, fuse_norm=True)
    assert len(explain(model, torch.randn(1, 3, 40, 40)).layers) == 34 - 7 * 3


# Two processes

WORKER = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from fused_sepconv import SeparableConv2d, fuse_batch_norm
torch.set_num_threads(1)
rank, sync = int(os.environ["RANK"]), sys.argv[1] == "sync"
dist.init_process_group("gloo")
torch.manual_seed(0)
layers = [nn.BatchNorm2d(4), SeparableConv2d(4, 6, 3, padding=1, pre_activation="relu"), nn.BatchNorm2d(6),
          SeparableConv2d(6, 3, 3)]
model = nn.Sequential(*layers).double()
model = nn.parallel.DistributedDataParallel(model)
if sync:  # after DDP, which refuses PyTorch's own on the CPU
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
assert len(fuse_batch_norm(model.module).replaced) == 2
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
x = torch.randn(7, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
own = x[:3] if rank == 0 else x[3:]
own = own if sync else x[:3]
for _ in range(3):
    optimizer.zero_grad()
    # DDP takes the mean of the gradients: twice the sum of each rank's part is the whole batch's.
    (2 * model(own).square().sum()).backward() if sync else model(own).square().sum().backward()
    optimizer.step()
if rank == 0:
    torch.save(model.module.state_dict(), sys.argv[2])
if sync:
    try:
        own = own.clone().requires_grad_()
        torch.autograd.grad(model.module(own).square().sum(), own, create_graph=True)
    except RuntimeError as error:
        assert "no second derivative" in str(error), error
    else:
        raise AssertionError("a second derivative that is not one")
dist.destroy_process_group()
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ("sync", "plain"))
def test_two_processes_are_one_with_the_whole_batch(tmp_path, kind):
    script, out = tmp_path / "worker.py", tmp_path / "state.pt"
    script.write_text(textwrap.dedent(WORKER))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, kind, str(out)], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    torch.manual_seed(0)
    first, second = SeparableConv2d(4, 6, 3, padding=1, pre_activation="relu"), SeparableConv2d(6, 3, 3)
    model = nn.Sequential(nn.BatchNorm2d(4), first, nn.BatchNorm2d(6), second).double()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(7, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x if kind == "sync" else x[:3]).square().sum().backward()
        optimizer.step()
    for name, value in torch.load(out).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-10, atol=1e-10)
