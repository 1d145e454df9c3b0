"""A converted model computes what it did, whatever is done to it next, and conversion itself leaves nothing behind."""

import copy
import io
import pickle
import random

import numpy
import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fused_sepconv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    SeparableConv2d,
    optimize_for_inference,
    replace_depthwise_convs,
    replace_separable_convs,
    restore_convs,
)
from fused_sepconv.transforms import separable
from fused_sepconv.transforms.adopted import DepthwiseOfPair, PointwiseOfPair


def depthwise(**options):
    return nn.Conv2d(8, 8, 3, **{"padding": 1, "groups": 8, **options})


class Block(nn.Module):
    """A pair in the midst of a forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.dw, self.pw, self.last = nn.BatchNorm2d(8), depthwise(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        y = self.dw(torch.tanh(self.norm(x)))
        y = self.pw(y)
        return self.last(y) + y.mean()


class Keeps(Block):
    """The same, where the attribute says so also kept."""

    def __init__(self):
        super().__init__()
        self.keeps = False

    def forward(self, x):
        y = self.dw(torch.tanh(self.norm(x)))
        z = self.pw(y)
        if self.keeps:
            self.maps = y
        return self.last(z)


class Model(nn.Module):
    """Pairs as they occur: in a forward, in a longer Sequential, across two of them, and as a Sequential."""

    def __init__(self):
        super().__init__()
        self.line = nn.Sequential(nn.SiLU(), depthwise(), nn.Conv2d(8, 8, 1), nn.Tanh())
        self.across = nn.Sequential(
            nn.Sequential(nn.Tanh(), depthwise(bias=False)), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh())
        )
        self.whole = nn.Sequential(depthwise(), nn.Conv2d(8, 8, 1))
        self.block = Block()

    def forward(self, x):
        return self.block(self.whole(self.across(self.line(x))))


PAIRS = ("line.1", "across.0.1", "whole", "block.dw")
X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def twins(make=Model):
    """(converted, as it was)"""
    torch.manual_seed(0)
    theirs = make().double().eval()
    ours = copy.deepcopy(theirs)
    replace_separable_convs(ours)
    return ours, theirs


def pairs_run(call):
    """How many pairs in the midst of a forward ran as one."""
    ran = []
    PointwiseOfPair.watchers.append(lambda depthwise, _: ran.append(depthwise))
    try:
        call()
    finally:
        PointwiseOfPair.watchers.pop()
    return len(ran)


def assert_alike(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def compare(ours, theirs):
    """Outputs, gradients and state of both are the same."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        results.append((y.detach(), x.grad, gradients, dict(model.state_dict())))
    assert_alike(*results)
    assert [m.training for m in ours.modules()] == [m.training for m in theirs.modules()]


def test_the_pairs_run_as_one_and_look_as_they_did():
    ours, theirs = twins()
    assert replace_separable_convs(copy.deepcopy(theirs)).replaced == PAIRS
    assert pairs_run(lambda: ours(X)) == 3
    assert str(ours.block) == str(theirs.block) and str(ours.line) == str(theirs.line)
    compare(ours, theirs)


# What is done to a half ---------------------------------------------------------------------------------------------


class Wrap(nn.Module):
    """A low-rank addition, which reads the input twice and keeps it."""

    def __init__(self, conv):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.extra = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1).double()

    def forward(self, x):
        self.seen = x
        return self.conv(x) + self.extra(x)


class Checkpointed(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=True)


def put(model, name, new):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def same_type(conv, features=8):
    torch.manual_seed(2)
    return type(conv)(
        conv.in_channels,
        features,
        conv.kernel_size,
        padding=conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
    ).double()


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda _, args, y: y + args[0].mean())


def pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def backward_hook(model, name):
    model.get_submodule(name).register_full_backward_hook(lambda _, grad_input, __: (grad_input[0] * 2,))


def patch(model, name):
    conv = model.get_submodule(name)
    old = conv.forward
    conv.forward = lambda x: old(x) * 2


def halve(model, name):
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(0.5)


def reflect(model, name):
    conv = model.get_submodule(name)
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [p for p in reversed(conv.padding) for _ in range(2)]


def loaded(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(torch.load(buffer, weights_only=True))
    return model


def trained(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def exported(model):
    return torch.export.export(model.eval(), (X,), strict=False).module()


def replicated(model):
    """As DataParallel's replicas are made, with other weights."""

    def replica(module):
        new = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            new._modules[name] = replica(child)
        for name, parameter in module._parameters.items():
            setattr(new, name, None if parameter is None else parameter * 1.5)
        return new

    copied = replica(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return Outputs(lambda x: copied(x))


class Outputs(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


HALVES = ("block.dw", "line.2", "across.0.1", "block.pw", "line.1", "across.1.0", "whole.0", "whole.1")
TO_A_HALF = {
    "wrap": lambda m, n: put(m, n, Wrap(m.get_submodule(n))),
    "checkpoint": lambda m, n: put(m, n, Checkpointed(m.get_submodule(n))),
    "put it in a Sequential": lambda m, n: put(m, n, nn.Sequential(m.get_submodule(n), nn.Tanh())),
    "replace it by a new one": lambda m, n: (torch.manual_seed(3), put(m, n, nn.Conv2d(8, 8, 1).double())),
    "replace it by nothing": lambda m, n: put(m, n, nn.Identity()),
    "replace it by one of its type": lambda m, n: put(m, n, same_type(m.get_submodule(n))),
    "replace it by a copy": lambda m, n: put(m, n, copy.deepcopy(m.get_submodule(n))),
    "replace it by a file's": lambda m, n: put(m, n, pickle.loads(pickle.dumps(m.get_submodule(n)))),
    "hook": hook,
    "hook before": pre_hook,
    "hook backwards": backward_hook,
    "patch its forward": patch,
    "prune": lambda m, n: prune.l1_unstructured(m.get_submodule(n), "weight", amount=0.5),
    "prune for good": lambda m, n: (
        prune.l1_unstructured(m.get_submodule(n), "weight", amount=0.5),
        prune.remove(m.get_submodule(n), "weight"),
    ),
    "weight norm": lambda m, n: parametrizations.weight_norm(m.get_submodule(n)),
    "spectral norm": lambda m, n: (torch.manual_seed(4), parametrizations.spectral_norm(m.get_submodule(n))),
    "fold a norm into it": lambda m, n: put(
        m, n, fuse_conv_bn_eval(m.get_submodule(n).eval(), nn.BatchNorm2d(8).double().eval())
    ),
    "freeze": lambda m, n: m.get_submodule(n).requires_grad_(False),
    "halve its weights": halve,
    "change its padding mode": reflect,
    "share it": lambda m, n: put(m, n, m.get_submodule("line.1")),
}
TO_THE_MODEL = {
    "copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save and load": loaded,
    "train": trained,
    "train mode": lambda m: m.train(),
    "move to another dtype and back": lambda m: m.float().double(),
    "another memory format": lambda m: m.to(memory_format=torch.channels_last),
    "compile": compiled,
    "export": exported,
    "replicate": replicated,
    "trace": lambda m: torch.jit.trace(m.eval(), X),
    "symbolic trace": lambda m: torch.fx.symbolic_trace(m.block),
    "vmap": lambda m: Outputs(lambda x: torch.vmap(m.eval())(x[None])[0]),
    "functional call": lambda m: Outputs(
        lambda x: torch.func.functional_call(m, {n: p * 2 for n, p in m.named_parameters()}, x)
    ),
    "slice": lambda m: nn.Sequential(m.line[:3], m.across[:1], m.whole[1:], m.whole[:1]),
    "append": lambda m: (m.whole.append(nn.Tanh()), m)[1],
    "insert": lambda m: (m.whole.insert(1, nn.Tanh()), m)[1],
    "call the halves": lambda m: Outputs(lambda x: m.block.pw(torch.relu(m.block.dw(x)) + m.whole[1](m.line[1](x)))),
    "quantise": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        # By turns, a half of the Sequential that becomes a module and a half of another pair.
        pytest.param(what, name, marks=() if j in (i % 6, 7 - i % 2) else pytest.mark.full)
        for i, what in enumerate(TO_A_HALF)
        for j, name in enumerate(HALVES)
    ],
)
def test_what_is_done_to_a_half_does_what_it_did(what, name):
    ours, theirs = twins()
    for model in (ours, theirs):
        TO_A_HALF[what](model, name)
    compare(ours, theirs)


@pytest.mark.parametrize("what", TO_THE_MODEL)
def test_what_is_done_to_a_model_does_what_it_did(what):
    compare(*(TO_THE_MODEL[what](model) for model in twins()))


@pytest.mark.parametrize("seed", range(12))
def test_several_things_one_after_another_do_what_they_did(seed):
    """At random: what each step does to the two is drawn alike, and everything is compared after each."""
    draw = random.Random(seed)
    ours, theirs = twins()
    for _ in range(4):
        # A step may be impossible after another; then it must be so for both.
        if draw.random() < 0.7:
            step = draw.choice(sorted(TO_A_HALF)), draw.choice(HALVES)
            done = [attempt(lambda m, s=step: TO_A_HALF[s[0]](m, s[1]) and None, m) for m in (ours, theirs)]
        else:
            step = (draw.choice(sorted(TO_THE_MODEL)),)
            done = [attempt(TO_THE_MODEL[step[0]], m) for m in (ours, theirs)]
            if not any(isinstance(result, Exception) for result in done):
                ours, theirs = done
        failed = [type(result) if isinstance(result, Exception) else None for result in done]
        assert failed[0] == failed[1], (step, done)
        if failed[0] is not None:
            break
        ours_fails, theirs_fails = (attempt(lambda m: m(X) is None, m) for m in (ours, theirs))
        assert isinstance(ours_fails, Exception) == isinstance(theirs_fails, Exception), (step, ours_fails)
        if isinstance(theirs_fails, Exception):
            break
        compare(ours, theirs)


def attempt(action, model):
    try:
        return action(model)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_restored_model_is_quantised_as_the_original():
    quantised = []
    for model in twins():
        restore_convs(model.float())
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (X.float(),))
        prepared(X.float())
        quantised.append(quantize_fx.convert_fx(prepared))
    convs = [type(quantised[0].get_submodule(name)).__module__ for name in ("line.1", "whole.1", "block.dw")]
    assert all("quantized" in module for module in convs)
    assert torch.equal(*(model(X.float()) for model in quantised))


# What the code that calls the halves may look like: how often they run as one, and what must not be lost.


def two_statements(m, x):
    y = m.dw(x)
    return m.pw(y)


def one_variable(m, x):
    x = m.dw(x)
    x = m.pw(x)
    return x


def branches(m, x):
    if x.dim() == 4:
        x = m.dw(x)
        x = m.pw(x)
    return x * 2


def loops(m, x):
    for _ in range(3):
        x = m.pw(m.dw(x))
    return x


def reads_it_again(m, x):
    y = m.dw(x)
    z = m.pw(y)
    return z + y


def reads_it_perhaps(m, x):
    y = m.dw(x)
    z = m.pw(y)
    return z + y if x.dim() == 4 else z


def reads_it_in_the_next_round(m, x):
    y = x
    for _ in range(2):
        x = x + y
        y = m.dw(x)
        x = m.pw(y)
    return x


def reads_it_in_a_closure(m, x):
    y = m.dw(x)
    z = m.pw(y)
    return (lambda: z + y)()


def reads_its_variables(m, x):
    y = m.dw(x)
    z = m.pw(y)
    return z + locals()["y"]


def handles_an_error(m, x):
    y = x
    try:
        y = m.dw(x)
        z = m.pw(y)
        raise ValueError
    except ValueError:
        return z + y


def swaps(m, x):
    y = m.dw(x)
    m = m.other
    return m.pw(y)


FORMS = {
    "one call": (lambda m, x: m.pw(m.dw(x)), 1),
    "two statements": (two_statements, 1),
    "one variable": (one_variable, 1),
    "in a branch": (branches, 1),
    "in a loop": (loops, 3),
    "within another call": (lambda m, x: torch.relu(m.pw(m.dw(x + 1))) + x, 1),
    "twice": (lambda m, x: m.pw(m.dw(x)) + m.pw(m.dw(x * 2)), 2),
    "read again": (reads_it_again, 0),
    "read again in one case": (reads_it_perhaps, 0),
    "read again in a loop": (reads_it_in_the_next_round, 0),
    "read in a closure": (reads_it_in_a_closure, 0),
    "read by a handler": (handles_an_error, 0),
    "another module by the same name": (swaps, 0),
    "something between": (lambda m, x: m.pw(torch.relu(m.dw(x))), 0),
    "an assignment within": (lambda m, x: m.pw(y := m.dw(x)) + y, 0),
    "read among all variables": (reads_its_variables, 0),
    "an argument by name": (lambda m, x: m.pw(input=m.dw(input=x)), 0),
    "several arguments": (lambda m, x: m.pw(*[m.dw(x)]), 0),
    "by index": (lambda m, x: m.both[1](m.both[0](x)), 0),
    "halves alone": (lambda m, x: m.dw(x) * m.pw(x), 0),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_halves_run_as_one_where_the_calling_code_says_that_they_may(form):
    function, expected = FORMS[form]
    theirs = Block().double()
    theirs.other, theirs.both = Block().double(), nn.ModuleList([theirs.dw, theirs.pw])
    ours = copy.deepcopy(theirs)
    for module in (ours, ours.other):
        DepthwiseOfPair.take(module.dw)
        PointwiseOfPair.take(module.pw)
    assert_alike(function(ours, X), function(theirs, X))
    assert pairs_run(lambda: function(ours, X)) == expected


@pytest.mark.parametrize("convert", (replace_separable_convs, optimize_for_inference))
@torch.no_grad()
def test_what_a_forward_keeps_is_the_depthwise_result(convert):
    theirs = Keeps().double().eval()
    theirs.keeps = True
    ours = copy.deepcopy(theirs)
    report = convert(ours)
    assert not report.replaced and "is kept by the model" in report.skipped[0][1]
    assert_alike(ours(X), theirs(X))
    assert_alike(ours.maps, theirs.maps)


@torch.no_grad()
def test_a_forward_that_may_keep_the_result_later_is_no_pair():
    ours, theirs = twins(Keeps)
    assert type(ours.dw) is type(ours.pw) is nn.Conv2d
    ours.keeps = theirs.keeps = True
    assert_alike(ours(X), theirs(X))
    assert_alike(ours.maps, theirs.maps)


@torch.no_grad()
def test_x_and_the_weights_may_change_between_the_halves():
    results = []
    for model in twins(Block):
        x = X.clone()
        t = model.dw(x)
        x.mul_(3)
        model.dw.weight.data.zero_()
        results.append((t, model.pw(t), x))
    assert_alike(*results)


@torch.no_grad()
def test_each_half_moves_by_itself():
    ours, theirs = twins(Block)
    for half in (ours.dw, ours.pw):
        assert copy.deepcopy(half).float()(X.float()).dtype == torch.float32
    ours.pw.to("meta")
    assert_alike(ours.dw(X), theirs.dw(X))


class Loops(Block):
    """The two are called by code of which it cannot be said, while it runs, what it will call next."""

    def forward(self, x):
        for conv in (self.dw, self.pw):
            x = conv(x)
        return x


def test_a_pair_that_is_not_seen_to_be_one_is_left_with_the_reason():
    ours = Loops()
    report = replace_separable_convs(ours)
    assert not report.replaced
    assert report.skipped == (
        ("dw", "the code that calls it and the pointwise convolution pw is not of the form pointwise(depthwise(x))"),
    )


# What conversion does to the rest -------------------------------------------------------------------------------------


class Nosy(nn.Module):
    """A module that does everything in its forward and its `train` that a tool must not provoke."""

    def __init__(self):
        super().__init__()
        self.dw, self.bn, self.pw = depthwise(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.pair = nn.Sequential(nn.Tanh(), depthwise(), nn.Conv2d(8, 8, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.maps, self.by_name, self.count, self.trains = [], {}, 0, 0
        self.helper = Helper()
        self.pw.requires_grad_(False)

    def train(self, mode=True):
        self.trains += 1
        for parameter in self.dw.parameters():
            parameter.requires_grad_(not mode)
        return super().train(mode)

    def forward(self, x):
        self.calls += 1
        self.count += 1
        for parameter in self.parameters():
            parameter.data.mul_(1)
        x = self.pw(self.bn(self.dw(x)))
        self.last = x
        self.maps.append(x)
        self.by_name["x"] = x
        self.helper.note(x)
        noise = torch.rand(1).item() + random.random() + numpy.random.rand()
        return self.pair(x) + noise


class Helper:
    def __init__(self):
        self.noted = []

    def note(self, x):
        self.noted.append(x)


@pytest.mark.parametrize("convert", (replace_separable_convs, replace_depthwise_convs, optimize_for_inference))
def test_conversion_runs_nothing_of_the_model_s_on_it(convert):
    model = nn.Sequential(Nosy())
    for module in model.modules():
        module.training = False
    ran = []
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: ran.append("hook"))
            module.register_forward_pre_hook(lambda *_: ran.append("hook"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: ran.append("global"))
    nosy = model[0]
    versions = {name: (p, p._version, p.requires_grad) for name, p in model.named_parameters()}
    before = {name: value for name, value in vars(nosy).items() if not name.startswith("_")}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    try:
        convert(model)
    finally:
        everywhere.remove()
    assert not ran
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert {name: value for name, value in vars(nosy).items() if not name.startswith("_")} == before
    assert nosy.calls == 0 and not nosy.maps and not nosy.by_name and not nosy.helper.noted and not nosy.trains
    for name, parameter in model.named_parameters():
        if convert is not optimize_for_inference:
            kept, version, requires_grad = versions[name]
            assert parameter is kept and (parameter._version, parameter.requires_grad) == (version, requires_grad)
    copy.deepcopy(model), pickle.dumps(model.state_dict())


@pytest.mark.parametrize("convert", (replace_separable_convs, optimize_for_inference))
def test_after_an_error_nothing_is_converted(convert, monkeypatch):
    model = Model().eval()
    before = [(module, type(module)) for module in model.modules()]
    calls = []

    def fails_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return original(*args, **kwargs)

    if convert is replace_separable_convs:
        original = separable._join
        monkeypatch.setattr(separable, "_join", fails_at_the_second)
    else:
        from fused_sepconv.transforms import inference

        original = inference.Chain._folded
        monkeypatch.setattr(inference.Chain, "_folded", fails_at_the_second)
    with pytest.raises(MemoryError):
        convert(model)
    assert [(module, type(module)) for module in model.modules()] == before


# Additions and hooks that `optimize_for_inference` meets --------------------------------------------------------------


class Adds(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.dw, self.bn, self.pw, self.relu, self.add = (
            depthwise(),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            add,
        )
        self.line = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        return self.relu(self.add(self, self.pw(self.bn(self.dw(x))), x))


def in_place(module, y, x):
    y += module.line
    return y


ADDITIONS = {
    "a line": lambda module, y, x: y + module.line,
    "a line in place": in_place,
    "a wider one": lambda module, y, x: module.line.expand(3, 1, 8, 1, 1) + y,
    "doubles": lambda module, y, x: y + x.double(),
    "doubles in place": lambda module, y, x: y.add_(x.double()),
    "itself": lambda module, y, x: y + y,
    "halves": lambda module, y, x: x.half() + y,
    "x": lambda module, y, x: x + y,
}


@pytest.mark.parametrize("what", ADDITIONS)
@torch.no_grad()
def test_an_addition_gives_the_shape_and_the_dtype_that_it_gave(what):
    theirs = nn.Sequential(Adds(ADDITIONS[what])).eval()
    ours = copy.deepcopy(theirs)
    assert optimize_for_inference(ours).replaced == ("0.dw",)
    x = X.float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("0.relu", "0.bn", "0.pw", "0.nothing", "0.inside", "0.inside.0", "0.dw"))
@torch.no_grad()
def test_every_module_s_hooks_run_in_an_optimized_model(name):
    class Residual(Adds):
        def __init__(self):
            super().__init__(None)
            self.nothing = nn.Identity()
            self.inside = nn.Sequential(nn.SiLU())

        def forward(self, x):
            return self.relu(self.nothing(self.pw(self.inside(self.bn(self.dw(x))))) + x)

    theirs = nn.Sequential(Residual()).eval()
    theirs.get_submodule(name).register_forward_hook(lambda _, __, y: y * 2)
    ours = copy.deepcopy(theirs)
    optimize_for_inference(ours)
    torch.testing.assert_close(ours(X.float()), theirs(X.float()), rtol=1e-5, atol=1e-5)


# Constructors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "kind"), ((DepthwiseConv2d, nn.Conv2d), (DepthwiseConv1d, nn.Conv1d)))
def test_what_is_put_in_a_model_is_made_as_what_it_stands_for(ours, kind):
    model = nn.Sequential(kind(8, 8, 3, groups=8))
    replace_depthwise_convs(model)
    assert isinstance(model[0], ours)
    made = type(model[0])(8, 16, 3, 2, 1, groups=8, bias=False)
    plain = kind(8, 16, 3, 2, 1, groups=8, bias=False)
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, 8, 9, 9)[(...,) if kind is nn.Conv2d else (..., 0)]
    torch.testing.assert_close(made(x), plain(x))
    full = type(model[0])(8, 4, 3)  # PEFT's: no groups
    torch.testing.assert_close(full(x), getattr(nn.functional, f"conv{x.dim() - 2}d")(x, full.weight, full.bias))
    for args in ((8, 8, 3), (8, 3, 1, 1)):
        with pytest.raises(TypeError, match=rf"stride: expected by name, {ours.__name__}\(in_channels, kernel_size"):
            ours(*args)


def test_a_slice_of_a_converted_sequential_is_a_sequential():
    ours, theirs = twins()
    assert isinstance(ours.whole, SeparableConv2d)
    assert [type(part) for part in ours.whole[:1]] == [nn.Conv2d]
    assert_alike(ours.whole[:1](X), theirs.whole[:1](X))
    assert_alike(type(ours.whole)(*theirs.whole, nn.Tanh())(X), torch.tanh(theirs.whole(X)))
