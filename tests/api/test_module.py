"""The modules are PyTorch's convolutions that they replace, in all that a user can do to them."""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from fused_sepconv import DepthwiseConv1d, DepthwiseConv2d, SeparableConv2d
from fused_sepconv.ops import launching
from tests.support.cases import ACTIVATIONS, four_sides, pair
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import emulated_kernels
from tests.support.twins import assert_alike, assert_twins, run

pytestmark = pytest.mark.usefixtures("double")

SHAPES = {"separable": (2, 4, 7, 6), "2d": (2, 4, 7, 6), "1d": (2, 4, 9)}
CLASSES = {"2d": (DepthwiseConv2d, nn.Conv2d), "1d": (DepthwiseConv1d, nn.Conv1d)}
kinds = pytest.mark.parametrize("kind", SHAPES)
depthwise_kinds = pytest.mark.parametrize("kind", CLASSES)


def padded(x, conv, padding, mode):
    """x as a padding of any form leaves it, for a convolution of one or two dimensions."""
    spatial = len(conv.kernel_size)
    last = [tuple(v)[-2:] if spatial == 2 else (1, *v) for v in (conv.kernel_size, conv.stride, conv.dilation)]
    if spatial == 1 and not isinstance(padding, str):
        padding = ((0, 0), padding if isinstance(padding, tuple) and len(padding) == 2 else (padding, padding))
    top, bottom, left, right = four_sides(padding, tuple(x.shape[-2:]) if spatial == 2 else (1, x.shape[-1]), *last)
    sides = (left, right, top, bottom)[: 2 * spatial]
    return F.pad(x, sides, mode="constant" if mode == "zeros" else mode) if any(sides) else x


class TorchPair(nn.Module):
    """What people write today: a depthwise convolution, a pointwise one, and what goes round them."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, *, bias=True,
                 depth_multiplier=1, depthwise_bias=False, padding_mode="zeros", pre_activation=None,
                 mid_activation=None, activation=None):  # fmt: skip
        super().__init__()
        between = in_channels * depth_multiplier
        self.padding = padding, padding_mode
        self.activations = tuple(ACTIVATIONS[name] for name in (pre_activation, mid_activation, activation))
        self.depthwise = nn.Conv2d(in_channels, between, kernel_size, stride, 0, dilation, in_channels, depthwise_bias)
        self.pointwise = nn.Conv2d(between, out_channels, 1, bias=bias)

    def forward(self, x, residual=None):
        pre, mid, post = self.activations
        y = self.pointwise(mid(self.depthwise(padded(pre(x), self.depthwise, *self.padding))))
        return post(y if residual is None else y + residual)


class Padded(nn.Module):
    """A PyTorch convolution with padding and activations that it can't express itself."""

    def __init__(self, conv, padding=0, padding_mode="zeros", pre_activation=None, activation=None):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.conv, self.padding = [conv], (padding, padding_mode)
        self.pre, self.post = ACTIVATIONS[pre_activation], ACTIVATIONS[activation]

    def forward(self, x):
        return self.post(self.conv[0](padded(self.pre(x), self.conv[0], *self.padding)))


def both(kind="separable", features=5, **options):
    """Ours and PyTorch's, with the same parameters."""
    torch.manual_seed(1)
    if kind == "separable":
        ours, theirs = SeparableConv2d(4, features, 3, **options), TorchPair(4, features, 3, **options)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs
    ours = CLASSES[kind][0](4, 3, **options)
    own = {name: options.pop(name) for name in (*("padding", "padding_mode"), *OWN_ACTIVATIONS) if name in options}
    conv = CLASSES[kind][1](4, 4 * options.pop("depth_multiplier", 1), 3, groups=4, **options)
    conv.load_state_dict(ours.state_dict())
    return ours, Padded(conv, **own)


OWN_ACTIVATIONS = ("pre_activation", "activation")


def image(*shape):
    return torch.randn(*(shape or SHAPES["separable"]))


# The same as PyTorch's


OPTIONS = {
    "plain": {},
    "padding": {"padding": 1},
    "no bias": {"bias": False},
    "depth multiplier": {"depth_multiplier": 3, "padding": 1},
    "stride and dilation": {"stride": 2, "dilation": 2, "padding": 3},
    "same": {"padding": "same"},
    "same with a stride": {"padding": "same", "stride": 2},
    "valid": {"padding": "valid", "stride": 2},
    "activations": {"padding": 1, "pre_activation": "relu", "activation": "relu6"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "pre_activation": "elu"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "replicate, same with a stride": {"padding": "same", "stride": 2, "padding_mode": "replicate"},
    "reflect without padding": {"padding_mode": "reflect"},
}
IN_TWO_DIMENSIONS = {
    "two strides and dilations": {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)},
    "same with two strides": {"padding": "same", "stride": (3, 2)},
    "four sides": {"padding": ((1, 2), (0, 3))},
    "reflect on four sides": {"padding": ((2, 1), (0, 3)), "padding_mode": "reflect"},
}
OF_A_PAIR = {
    "depthwise bias": {"depthwise_bias": True, "mid_activation": "silu"},
    "circular with everything": {
        "padding": (2, 1), "stride": (1, 2), "padding_mode": "circular", "pre_activation": "elu",
        "depthwise_bias": True, "mid_activation": "gelu", "activation": "relu", "depth_multiplier": 2,
    },
}  # fmt: skip
IN_ONE_DIMENSION = {"two sides": {"padding": (2, 0)}, "reflect": {"padding": (2, 1), "padding_mode": "reflect"}}
EVERY = [
    pytest.param(kind, options, id=f"{kind}: {name}")
    for kind, tables in (
        ("separable", (OPTIONS, IN_TWO_DIMENSIONS, OF_A_PAIR)), ("2d", (OPTIONS, IN_TWO_DIMENSIONS)),
        ("1d", (OPTIONS, IN_ONE_DIMENSION)),
    )
    for table in tables
    for name, options in table.items()
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_it_computes_what_pytorchs_computes_and_so_do_its_copies(kind, options):
    ours, theirs = both(kind, **options)
    x = image(*SHAPES[kind])
    assert_twins(ours, theirs, x)
    assert_twins(ours, theirs, x[0])
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x), ours(x))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert not torch.equal(copied(x), ours(x))
    text = repr(ours).replace("'", "")
    assert text.startswith(f"{type(ours).__name__}(")
    assert kind != "separable" or ("(depthwise): Conv2d(4," in text and "(pointwise): Conv2d(" in text)
    for name in ("pre_activation", "mid_activation", "activation"):
        assert (f" {name}={options.get(name)}" in text or f"({name}={options.get(name)}" in text) == (name in options)
    assert options.get("padding_mode", "") in text and ("same" in text) == (options.get("padding") == "same")


@pytest.mark.parametrize("kernel_size", (1, 2, 5, (1, 3), (4, 3)), ids=str)
def test_every_kernel_size(kernel_size):
    ours, theirs = SeparableConv2d(4, 5, kernel_size, padding=2), TorchPair(4, 5, kernel_size, padding=2)
    theirs.load_state_dict(ours.state_dict())
    assert_twins(ours, theirs, image())


def test_a_pair_is_a_height_and_a_width():
    module = SeparableConv2d(4, 5, (3, 1), stride=(2, 1), padding=(1, 0))
    assert module(image(1, 4, 8, 6)).shape == (1, 5, 4, 6)
    assert pair(module.depthwise.kernel_size) == pair(DepthwiseConv2d(4, (3, 1)).kernel_size) == (3, 1)


@pytest.mark.parametrize("padding", (0, 1, "same"))
def test_a_residual_is_added_before_the_activation_and_gets_its_gradient(padding):
    ours, theirs = both(features=4, padding=padding, activation="silu")
    x = image()
    residual = torch.randn_like(theirs(x), requires_grad=True)
    assert_twins(ours, theirs, x, residual=residual.detach())
    assert torch.equal(ours(x, residual), ours(x, residual=residual))
    torch.testing.assert_close(ours(x[0], residual[0]), theirs(x, residual)[0])
    torch.testing.assert_close(*(torch.autograd.grad(m(x, residual).square().sum(), residual) for m in (ours, theirs)))


def assert_moved_twins(ours, theirs, x, target, dtype, memory_format):
    """Moved to another place, dtype and format, they are as close to float64 as each other."""
    x = x.to(dtype)
    oracle = run(copy.deepcopy(theirs).to(dtype).double(), x.double())
    moved = [m.to(target.device, dtype, memory_format=memory_format) for m in (ours, theirs)]
    assert {p.dtype for p in moved[0].parameters()} == {dtype}
    x = x.to(target.device).contiguous(memory_format=memory_format)
    actual, expected = (run(module, x) for module in moved)
    assert actual["y"].is_contiguous(memory_format=memory_format)
    assert_as_close_as_eager(actual.pop("y"), expected.pop("y"), oracle.pop("y"))
    for name, gradient in actual.items():
        assert_gradient_as_close_as_eager(gradient, expected[name], oracle[name], name=name)


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("kind", ("separable", "3x3", "7x7"))
def test_it_may_be_moved_to_another_dtype_and_memory_format(target, dtype, memory_format, kind):
    """7x7 and a bias between a residual and a norm, as in ConvNeXt."""
    if kind == "separable":
        ours = SeparableConv2d(16, 24, 3, padding=1, activation="relu")
        theirs = TorchPair(16, 24, 3, padding=1, activation="relu")
    else:
        ours = DepthwiseConv2d(72, int(kind[0]), padding=int(kind[0]) // 2)
        theirs = nn.Conv2d(72, 72, int(kind[0]), padding=int(kind[0]) // 2, groups=72)
    theirs.load_state_dict(ours.state_dict())
    x = image(2, 16, 9, 9) if kind == "separable" else image(2, 72, 9, 10)
    assert_moved_twins(ours, theirs, x, target, dtype, memory_format)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", ({"kernel_size": 7, "padding": 3}, {"kernel_size": 5, "padding": 2, "stride": 2}))
def test_the_layers_of_convnext_and_efficientnet_run_on_the_fast_kernels_in_channels_last(dtype, options):
    ours, theirs = DepthwiseConv2d(72, **options), nn.Conv2d(72, 72, groups=72, **options)
    theirs.load_state_dict(ours.state_dict())
    x = image(2, 72, 9, 10).to(dtype).contiguous(memory_format=torch.channels_last)
    oracle = run(copy.deepcopy(theirs).to(dtype).double(), x.double())
    expected = run(theirs.to(dtype), x)
    with emulated_kernels(checked=False) as native, launching.preferring("depthwise"):
        before = native.executed()
        actual = run(ours.to(dtype), x)
        ran = {name for name, count in native.executed().items() if count > before.get(name, 0)}
    names = sorted("_".join(name.split("_")[:2]) for name in ran if not name.startswith("reduce"))
    assert names == ["depthwise_backward", "depthwise_forward"]
    for name, result in actual.items():
        assert_as_close_as_eager(result, expected[name], oracle[name], name=name)


def test_a_sequence_whose_channels_are_its_fastest_dimension_stays_so(target):
    """(N, L, C), as transformers have it: an image of one row in NHWC."""
    module = DepthwiseConv1d(8, 5, padding=(4, 0), dtype=torch.float32).to(target.device)
    x = torch.randn(2, 11, 8, dtype=torch.float32, device=target.device)
    y = module(x.transpose(1, 2))
    assert y.transpose(1, 2).is_contiguous()
    causal = F.pad(x.transpose(1, 2), (4, 0))
    torch.testing.assert_close(y, F.conv1d(causal, module.weight, module.bias, groups=8), rtol=1e-5, atol=1e-5)


def test_device_and_dtype_are_what_they_are_set_to():
    for module, features in (
        (SeparableConv2d(4, 5, 3, depthwise_bias=True, device="meta", dtype=torch.bfloat16), 5),
        (DepthwiseConv2d(4, 3, device="meta", dtype=torch.bfloat16), 4),
    ):
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
        assert module(torch.empty(2, 4, 6, 6, device="meta", dtype=torch.bfloat16)).shape == (2, features, 4, 4)
    module = SeparableConv2d(4, 5, 3)
    for method, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        getattr(module, method)()
        assert module(image().to(dtype)).dtype == dtype


# What it is made of


def test_it_is_two_plain_convolutions_and_has_their_keys_and_first_weights():
    torch.manual_seed(5)
    module = SeparableConv2d(4, 5, (3, 2), depth_multiplier=2, depthwise_bias=True)
    torch.manual_seed(5)
    convolutions = {"depthwise": nn.Conv2d(4, 8, (3, 2), groups=4), "pointwise": nn.Conv2d(8, 5, 1)}
    assert {name: type(child) for name, child in module.named_children()} == dict.fromkeys(convolutions, nn.Conv2d)
    expected = nn.ModuleDict(convolutions).state_dict()
    assert set(module.state_dict()) == set(expected) and module.depthwise.groups == 4
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
    assert list(SeparableConv2d(4, 5, 3).state_dict()) == ["depthwise.weight", "pointwise.weight", "pointwise.bias"]
    assert list(SeparableConv2d(4, 5, 3, bias=False).state_dict()) == ["depthwise.weight", "pointwise.weight"]


def test_an_initialiser_that_knows_convolutions_finds_them():
    def initialise(module):
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.5)

    module = SeparableConv2d(4, 5, 3, bias=False).apply(initialise)
    assert {p.unique().item() for p in module.parameters()} == {0.5}
    assert torch.equal(module(torch.ones(1, 4, 3, 3)), torch.full((1, 5, 1, 1), 9.0))


@depthwise_kinds
def test_a_depthwise_module_is_pytorchs_convolution_with_a_shorter_constructor(kind):
    ours, theirs = CLASSES[kind]
    torch.manual_seed(5)
    module = ours(4, 3, stride=2, padding=1, depth_multiplier=2)
    torch.manual_seed(5)
    conv = theirs(4, 8, 3, 2, 1, groups=4)
    assert isinstance(module, theirs)
    assert list(module.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), conv.parameters(), strict=True))
    for name in theirs.__constants__:
        assert getattr(module, name) == getattr(conv, name), name
    torch.testing.assert_close(module(torch.ones(SHAPES[kind])), conv(torch.ones(SHAPES[kind])))


@kinds
def test_a_checkpoint_of_pytorchs_loads(kind):
    fresh, theirs = both(kind, padding="same", stride=2)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_twins(fresh, theirs, image(*SHAPES[kind]))


# Adopted convolutions


def test_adopted_convolutions_share_their_parameters():
    depthwise, pointwise = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), nn.Conv2d(8, 5, 1)
    module = SeparableConv2d.from_convs(depthwise, pointwise)
    assert module.depthwise.weight is depthwise.weight and module.depthwise.bias is depthwise.bias
    assert module.pointwise.weight is pointwise.weight and module.pointwise.bias is pointwise.bias
    with torch.no_grad():
        depthwise.weight.mul_(2)
    x = image()
    torch.testing.assert_close(module(x), pointwise(depthwise(x)))
    module(x).sum().backward()
    assert depthwise.weight.grad is not None and pointwise.bias.grad is not None


@pytest.mark.parametrize(
    "options",
    (
        {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": 2}, {"padding": "same", "padding_mode": "replicate"},
        {"stride": (1, 2), "dilation": (2, 1), "bias": False}, {"padding": "same", "kernel_size": (2, 4)},
    ),
    ids=str,
)  # fmt: skip
def test_adopted_convolutions_keep_their_options(options):
    depthwise, pointwise = nn.Conv2d(4, 4, **{"kernel_size": 3, "groups": 4, **options}), nn.Conv2d(4, 5, 1, bias=False)
    module = SeparableConv2d.from_convs(depthwise, pointwise, pre_activation="relu", activation="gelu")
    x = image()
    torch.testing.assert_close(module(x), F.gelu(pointwise(depthwise(F.relu(x)))))


@depthwise_kinds
def test_an_adopted_depthwise_convolution_shares_its_parameters_and_keeps_its_options(kind):
    ours, theirs = CLASSES[kind]
    conv = theirs(4, 8, 3, stride=2, padding=2, dilation=2, groups=4, padding_mode="circular").eval()
    module = ours.from_conv(conv, activation="silu")
    assert module.weight is conv.weight and module.bias is conv.bias and not module.training
    x = image(*SHAPES[kind])
    torch.testing.assert_close(module(x), F.silu(conv(x)))


# What users attach: to a convolution, and to one child of a pair


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def setting(**attributes):
    def attach(conv):
        for name, make in attributes.items():
            setattr(conv, name, make(conv))

    return attach


ATTACHMENTS = {
    "forward hook": lambda c: c.register_forward_hook(lambda _, args, output: output * 2),
    "forward pre-hook": lambda c: c.register_forward_pre_hook(lambda _, args: (args[0].clamp(max=0.5),)),
    "hook with kwargs": lambda c: c.register_forward_hook(lambda _, args, kw, output: -output, with_kwargs=True),
    "full backward hook": lambda c: c.register_full_backward_hook(lambda _, into, arriving: (into[0] * 3,)),
    "full backward pre-hook": lambda c: c.register_full_backward_pre_hook(lambda _, arriving: (arriving[0] * 3,)),
    "pruned": lambda c: prune.l1_unstructured(c, "weight", amount=0.4),
    "pruned by rows": lambda c: prune.ln_structured(c, "weight", amount=2, n=2, dim=0),
    "pruned for good": lambda c: prune.remove(prune.l1_unstructured(c, "weight", amount=0.4), "weight"),
    "weight norm": parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "own parametrization": lambda c: parametrize.register_parametrization(c, "weight", Doubled()),
    "own forward": setting(forward=lambda c: lambda x, original=c.forward: original(x) * 0.5),
    "new parameter": setting(weight=lambda c: nn.Parameter(torch.full_like(c.weight, 0.1))),
    "bias put on or taken away": setting(
        bias=lambda c: nn.Parameter(torch.linspace(-1, 1, c.out_channels)) if c.bias is None else None
    ),
    "frozen": lambda c: c.requires_grad_(False),
}
OF_A_CONVOLUTION = {
    **{name: attach for name, attach in ATTACHMENTS.items() if name != "own forward"},  # which takes its activations
    "pruned bias": lambda c: prune.random_unstructured(c, "bias", amount=2),
    "another stride": setting(stride=lambda c: (*c.stride[:-1], 2)),
    "another padding": setting(padding=lambda c: (*c.padding[:-1], 2)),
    "another dilation": setting(dilation=lambda c: (*c.dilation[:-1], 2)),
}


class Standardized(nn.Conv2d):
    """A child of another class: the weights are made to have mean 0 before they are used."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Wrapped(nn.Module):
    """A low-rank adapter, as fine-tuning libraries put round a convolution."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.extra = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
        nn.init.constant_(self.extra.weight, 0.25)

    def forward(self, x):
        return self.conv(x) + self.extra(x)


def standardized(conv):
    other = Standardized(conv.in_channels, conv.out_channels, 1)
    other.load_state_dict(conv.state_dict())
    return other


POINTWISE = {
    "another class": standardized,
    "adapter": Wrapped,
    "another width": lambda conv: nn.Conv2d(conv.in_channels, 9, 1),
    "a stride": lambda conv: nn.Conv2d(conv.in_channels, 5, 1, stride=2),
    "identity": lambda conv: nn.Identity(),
}
ON_A_PAIR = {
    **{
        f"{name}, {child}": lambda pair, attach=attach, child=child: attach(getattr(pair, child))
        for name, attach in ATTACHMENTS.items()
        for child in ("depthwise", "pointwise")
    },
    **{
        f"pointwise: {name}": lambda pair, make=make: setattr(pair, "pointwise", make(pair.pointwise))
        for name, make in POINTWISE.items()
    },
}
old_norms = pytest.mark.filterwarnings("ignore:.*_norm.*:FutureWarning")


@old_norms
@pytest.mark.parametrize("attach", ON_A_PAIR.values(), ids=ON_A_PAIR)
@pytest.mark.parametrize("options", ("same with a stride", "reflect", "activations"))
def test_what_is_attached_to_a_child_does_what_it_does_in_the_pair(attach, options):
    pairs = both(**OPTIONS[options])
    for module in pairs:
        torch.manual_seed(3)
        attach(module)
    for _ in range(2):
        assert_twins(*pairs, image())


@old_norms
@depthwise_kinds
@pytest.mark.parametrize("attach", OF_A_CONVOLUTION.values(), ids=OF_A_CONVOLUTION)
def test_what_is_attached_to_a_depthwise_module_does_what_it_does_in_pytorchs(kind, attach):
    ours, theirs = CLASSES[kind]
    modules = ours(4, 3, padding=1), theirs(4, 4, 3, padding=1, groups=4)
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        torch.manual_seed(3)
        attach(module)
    for _ in range(2):
        assert_twins(*modules, image(*SHAPES[kind]))


def test_hooks_see_what_their_child_reads_and_gives():
    ours, theirs = both(padding=1, pre_activation="gelu", mid_activation="silu", activation="elu")
    for child, register in itertools.product(
        ("depthwise", "pointwise"), ("register_forward_hook", "register_full_backward_hook")
    ):
        seen = []
        look = functools.partial(lambda seen, _, *of: seen.append((of[0][0], of[1])), seen)
        handles = [getattr(getattr(module, child), register)(look) for module in (ours, theirs)]
        assert_twins(ours, theirs, image())
        for handle in handles:
            handle.remove()
        (ours_in, ours_out), (theirs_in, theirs_out) = seen
        if child == "pointwise":  # ours pads the depthwise one's input itself
            torch.testing.assert_close(ours_in, theirs_in)
        torch.testing.assert_close(ours_out, theirs_out)


def test_a_hook_taken_off_again_leaves_no_trace():
    ours, theirs = both(padding=1)
    handle = ours.depthwise.register_forward_hook(lambda child, args, output: output * 2)
    x = image()
    assert not torch.allclose(ours(x), theirs(x))
    handle.remove()
    assert_twins(ours, theirs, x)


def test_hooks_on_the_module_itself_work():
    ours, theirs = both(padding=1)
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda _, args, output: output + 1)
        module.register_full_backward_hook(lambda _, grad_in, grad_out: tuple(g * 5 for g in grad_in if g is not None))
    assert_twins(ours, theirs, image())


@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
def test_what_is_changed_on_a_child_later_takes_effect(mode):
    """As when a segmentation network turns strides into dilations after loading; PyTorch settles at construction how
    far a padding with other than zeros reaches."""
    module = SeparableConv2d(4, 5, 3, padding=1, padding_mode=mode)
    x = image()
    for attribute, value in (("padding", (2, 0)), ("stride", (2, 3)), ("dilation", (2, 1))):
        setattr(module.depthwise, attribute, value)
        torch.testing.assert_close(module(x), module.pointwise(module.depthwise(x)))


@kinds
@pytest.mark.parametrize("mode", ("zeros", "reflect"))
def test_only_an_input_of_its_channels_is_accepted(kind, mode):
    """A function takes 6 filters on 2 or 3 channels for a depth multiplier; a module knows its channels."""
    options = {"padding": 1, "padding_mode": mode}
    module = SeparableConv2d(6, 4, 3, **options) if kind == "separable" else CLASSES[kind][0](6, 3, **options)
    for shape in ((2, 2), (2,), (2, 3), (2, 12)):
        with pytest.raises(ValueError, match=r"x: expected \(N, 6, (H, W|L)\) or \(6, (H, W|L)\), got"):
            module(image(*shape, *SHAPES[kind][2:]))


class Own(torch.Tensor):
    """A tensor whose constructors are its own affair."""

    def new_empty(self, *_, **__):
        raise AssertionError("new_empty of a subclass was called")

    new_zeros = new_empty


@pytest.mark.parametrize("wanted", ("x", "depthwise.weight"))
def test_a_subclass_with_constructors_of_its_own_goes_forward_and_back(wanted):
    found = []
    for module in both(padding=1, activation="silu"):
        module.requires_grad_(False)
        x = torch.ones(2, 4, 7, 6).as_subclass(Own)
        leaf = x.requires_grad_() if wanted == "x" else module.depthwise.weight.requires_grad_()
        y = module(x)
        y.sum().backward()
        found.append((y, leaf.grad))
    for actual, expected in zip(*found, strict=True):
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize("place", ("pre_activation", "mid_activation", "activation"))
def test_silu_runs_pytorchs_own_derivative_where_nothing_differentiates_it_again(place):
    module = SeparableConv2d(4, 5, 3, padding=1, **{place: "silu"})
    y = module(image().requires_grad_()).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward()
    names = {event.name for event in profile.events()}
    assert "aten::silu_backward" in names and "aten::sigmoid" not in names
    assert torch.autograd.gradgradcheck(module, (image(1, 4, 3, 3).requires_grad_(),))


@kinds
@pytest.mark.parametrize("options", ({}, {"stride": 2, "padding": "same", "depth_multiplier": 2}), ids=str)
def test_its_operations_are_counted_by_the_formula_of_the_op(kind, options):
    """Counting watches every module through global hooks: that alone must not send the call another way."""
    module, _ = both(kind, **options)
    x = image(*SHAPES[kind]).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    pixels, channels = y.numel() // y.shape[1], 4 * options.get("depth_multiplier", 1)
    expected = 2 * pixels * channels * (3 ** (y.dim() - 2) + (5 if kind == "separable" else 0))
    assert forward.get_total_flops() == expected
    for frozen, times in ((False, 2), (True, 1)):  # a frozen module still sends the gradient through to x
        y = module.requires_grad_(not frozen)(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert backward.get_total_flops() == times * expected


# Its place in a network


def test_it_serves_in_a_network_and_twice_and_under_a_subclass():
    first, second = both(features=8, padding=1, bias=False), both(features=4, padding="same", activation="silu")
    reduce = nn.Conv2d(8, 4, 1)
    networks = [
        nn.Sequential(a, nn.BatchNorm2d(8), nn.ReLU(), reduce, b, b) for a, b in zip(first, second, strict=True)
    ]
    assert_twins(*networks, image())

    class Scaled(SeparableConv2d):
        def forward(self, x, residual=None):
            return 2 * super().forward(x, residual)

    scaled, (plain, _) = Scaled(4, 5, 3), both()
    scaled.load_state_dict(plain.state_dict())
    x = image()
    torch.testing.assert_close(scaled(x), 2 * plain(x))


def test_a_batch_norm_folds_into_a_depthwise_module_as_into_pytorchs():
    conv, norm = DepthwiseConv2d(4, 3, padding=1).eval(), nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.running_mean)
    x = image()
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)))


@depthwise_kinds
@pytest.mark.parametrize("options", (OPTIONS["activations"], OPTIONS["reflect"]), ids=("zeros", "reflect"))
def test_a_depthwise_module_compiles_into_one_graph(kind, options):
    torch._dynamo.reset()
    module, _ = both(kind, **options)
    x = image(*SHAPES[kind])
    compiled = run(torch.compile(module, backend="aot_eager", fullgraph=True), x)
    assert_alike({name.removeprefix("_orig_mod."): value for name, value in compiled.items()}, run(module, x))
