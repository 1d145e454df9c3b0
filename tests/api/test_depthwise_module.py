"""DepthwiseConv2d and DepthwiseConv1d are PyTorch's depthwise convolutions in all that a user can do to them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import fused_sepconv
from fused_sepconv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    SeparableConv2d,
    depthwise_conv2d,
    replace_depthwise_convs,
)
from fused_sepconv.ops import launching
from tests.support.cases import ACTIVATIONS, four_sides, pair
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import emulated_kernels

KINDS = {"2d": (DepthwiseConv2d, nn.Conv2d, (2, 4, 7, 6)), "1d": (DepthwiseConv1d, nn.Conv1d, (2, 4, 9))}
kinds = pytest.mark.parametrize("kind", KINDS)


class Padded(nn.Module):
    """A PyTorch convolution with padding and activations that it can't express itself."""

    def __init__(self, conv, padding, padding_mode, pre_activation, activation):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.conv, self.padding = [conv], padding
        self.mode = "constant" if padding_mode == "zeros" else padding_mode
        self.activations = ACTIVATIONS[pre_activation], ACTIVATIONS[activation]

    def forward(self, x):
        (conv,), (pre, post) = self.conv, self.activations
        spatial = len(conv.kernel_size)
        last = [tuple(v)[-2:] if spatial == 2 else (1, *v) for v in (conv.kernel_size, conv.stride, conv.dilation)]
        size = tuple(x.shape[-2:]) if spatial == 2 else (1, x.shape[-1])
        top, bottom, left, right = four_sides(self.padding, size, *last)
        sides = (left, right, top, bottom)[: 2 * spatial]
        return post(conv(F.pad(pre(x), sides, mode=self.mode) if any(sides) else pre(x)))


def both(kind, *, depth_multiplier=1, padding=0, padding_mode="zeros", pre_activation=None, activation=None, **options):
    """Ours and PyTorch's, with the same parameters."""
    ours_kind, theirs_kind, _ = KINDS[kind]
    torch.manual_seed(1)
    ours = ours_kind(
        4, 3, depth_multiplier=depth_multiplier, padding=padding, padding_mode=padding_mode,
        pre_activation=pre_activation, activation=activation, **options,
    )  # fmt: skip
    conv = theirs_kind(4, 4 * depth_multiplier, 3, groups=4, **options)
    conv.load_state_dict(ours.state_dict())
    form = padding
    if kind == "1d" and not isinstance(padding, str):
        form = ((0, 0), padding if isinstance(padding, tuple) and len(padding) == 2 else (padding, padding))
    return ours, Padded(conv, form, padding_mode, pre_activation, activation)


def run(module, x):
    """Result and every gradient of one forward and backward, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype))
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_alike(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(
                actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(autouse=True)
def double():
    """Modules are made in float64, where alike means alike."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


OPTIONS = {
    "plain": {},
    "padding": {"padding": 1},
    "no bias": {"bias": False},
    "depth multiplier": {"depth_multiplier": 3, "padding": 1},
    "stride and dilation": {"stride": 2, "dilation": 2, "padding": 3},
    "same": {"padding": "same"},
    "same with a stride": {"padding": "same", "stride": 2},
    "valid": {"padding": "valid", "stride": 2},
    "activations": {"padding": 1, "pre_activation": "relu", "activation": "gelu"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "pre_activation": "elu"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "replicate, same with a stride": {"padding": "same", "stride": 2, "padding_mode": "replicate"},
    "reflect without padding": {"padding_mode": "reflect"},
}
OF_ONE_KIND = [("2d", {"padding": ((1, 2), (0, 3))}), ("2d", {"padding": ((2, 1), (0, 3)), "padding_mode": "reflect"}),
               ("2d", {"stride": (2, 1), "padding": (1, 2)}), ("1d", {"padding": (2, 0)}),
               ("1d", {"padding": (2, 1), "padding_mode": "reflect"})]  # fmt: skip
EVERY = [(kind, options) for kind in KINDS for options in OPTIONS.values()] + OF_ONE_KIND
every = pytest.mark.parametrize(("kind", "options"), EVERY, ids=str)


@every
def test_it_computes_what_pytorchs_computes(kind, options):
    ours, theirs = both(kind, **options)
    x = torch.randn(KINDS[kind][2])
    assert_alike(run(ours, x), run(theirs, x))
    assert_alike(run(ours, x[0]), run(theirs, x[0]))


@every
@pytest.mark.parametrize("how", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("copy", "pickle"))
def test_a_copy_is_the_same_and_its_own(kind, options, how):
    module, _ = both(kind, **options)
    x = torch.randn(KINDS[kind][2])
    copied = how(module)
    assert torch.equal(copied(x), module(x))
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.equal(copied(x), module(x))


@kinds
def test_it_is_pytorchs_convolution_with_a_shorter_constructor(kind):
    ours, theirs, shape = KINDS[kind]
    torch.manual_seed(5)
    module = ours(4, 3, stride=2, padding=1, depth_multiplier=2)
    torch.manual_seed(5)
    conv = theirs(4, 8, 3, 2, 1, groups=4)
    assert isinstance(module, theirs)
    assert list(module.state_dict()) == list(conv.state_dict()) == ["weight", "bias"]
    for ours_tensor, theirs_tensor in zip(module.parameters(), conv.parameters(), strict=True):
        assert torch.equal(ours_tensor, theirs_tensor)
    for name in theirs.__constants__:
        assert getattr(module, name) == getattr(conv, name), name
    torch.testing.assert_close(module(torch.ones(shape)), conv(torch.ones(shape)))


@kinds
def test_a_checkpoint_of_pytorchs_loads_and_back(kind):
    ours, theirs = both(kind, bias=True)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    fresh = KINDS[kind][0](4, 3)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh.weight, ours.weight) and torch.equal(fresh.bias, ours.bias)


@kinds
def test_its_text_says_what_it_is(kind):
    module, _ = both(kind, padding="same", stride=2, activation="relu")
    assert repr(module).startswith(f"{type(module).__name__}(4, 4, kernel_size=")
    assert "same" in repr(module) and "activation='relu'" in repr(module) and "pre_activation" not in repr(module)


def test_device_and_dtype_go_to_the_parameters():
    module = DepthwiseConv2d(4, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(2, 4, 6, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 4, 4, 4)


@kinds
def test_an_adopted_convolution_shares_its_parameters_and_keeps_its_options(kind):
    ours, theirs, shape = KINDS[kind]
    conv = theirs(4, 8, 3, stride=2, padding=2, dilation=2, groups=4, padding_mode="circular").eval()
    module = ours.from_conv(conv, activation="silu")
    assert module.weight is conv.weight and module.bias is conv.bias and not module.training
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), F.silu(conv(x)))


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("kernel", (3, 7))
def test_it_may_be_moved_to_another_dtype_and_memory_format(target, dtype, memory_format, kernel):
    """With 7 as in ConvNeXt: 7x7 and a bias, between a residual and a norm."""
    ours = DepthwiseConv2d(72, kernel, padding=kernel // 2)
    theirs = nn.Conv2d(72, 72, kernel, padding=kernel // 2, groups=72)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 72, 9, 10).to(dtype)
    oracle = run(copy.deepcopy(theirs).to(dtype).double(), x.double())
    moved = [m.to(target.device, dtype, memory_format=memory_format) for m in (ours, theirs)]
    x = x.to(target.device).contiguous(memory_format=memory_format)
    actual, expected = (run(module, x) for module in moved)
    assert actual["y"].is_contiguous(memory_format=memory_format)
    assert_as_close_as_eager(actual.pop("y"), expected.pop("y"), oracle.pop("y"))
    for name, gradient in actual.items():
        assert_gradient_as_close_as_eager(gradient, expected[name], oracle[name], name=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", ({"kernel_size": 7, "padding": 3}, {"kernel_size": 5, "padding": 2, "stride": 2}))
def test_the_layers_of_convnext_and_efficientnet_run_on_the_fast_kernels_in_channels_last(dtype, options):
    ours = DepthwiseConv2d(72, **options)
    theirs = nn.Conv2d(72, 72, groups=72, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 72, 9, 10).to(dtype).contiguous(memory_format=torch.channels_last)
    oracle = run(copy.deepcopy(theirs).to(dtype).double(), x.double())
    expected = run(theirs.to(dtype), x)
    with emulated_kernels(checked=False) as native, launching.preferring("depthwise"):
        before = native.executed()
        actual = run(ours.to(dtype), x)
        ran = {name for name, count in native.executed().items() if count > before.get(name, 0)}
    assert sorted(name.split("_")[:2] for name in ran if not name.startswith("reduce")) == [
        ["depthwise", "backward"],
        ["depthwise", "forward"],
    ]
    assert_as_close_as_eager(actual.pop("y"), expected.pop("y"), oracle.pop("y"))
    for name, gradient in actual.items():
        assert_gradient_as_close_as_eager(gradient, expected[name], oracle[name], name=name)


def test_a_sequence_whose_channels_are_its_fastest_dimension_stays_so(target):
    """(N, L, C), as transformers have it: an image of one row in NHWC."""
    module = DepthwiseConv1d(8, 5, padding=(4, 0), dtype=torch.float32).to(target.device)
    x = torch.randn(2, 11, 8, dtype=torch.float32, device=target.device)
    y = module(x.transpose(1, 2))
    assert y.transpose(1, 2).is_contiguous()
    causal = F.pad(x.transpose(1, 2), (4, 0))
    torch.testing.assert_close(y, F.conv1d(causal, module.weight, module.bias, groups=8), rtol=1e-5, atol=1e-5)


@kinds
def test_its_operations_are_counted_by_the_formula_of_the_op(kind):
    module, _ = both(kind, depth_multiplier=2)
    x = torch.randn(KINDS[kind][2], requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    assert forward.get_total_flops() == 2 * y.numel() * 3 ** (y.dim() - 2)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        module.requires_grad_(False)(x).sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops(), "a forward, and the gradient of x alone"


# What users attach


def attach_forward_hook(conv):
    conv.register_forward_hook(lambda module, args, output: output * 2)


def attach_forward_pre_hook(conv):
    conv.register_forward_pre_hook(lambda module, args: (args[0].clamp(max=0.5),))


def attach_full_backward_hook(conv):
    conv.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 3,))


def attach_prune_unstructured(conv):
    prune.l1_unstructured(conv, "weight", amount=0.4)


def attach_prune_bias(conv):
    prune.random_unstructured(conv, "bias", amount=2)


def attach_weight_norm(conv):
    parametrizations.weight_norm(conv)


def attach_spectral_norm(conv):
    parametrizations.spectral_norm(conv)


def attach_old_weight_norm(conv):
    nn.utils.weight_norm(conv)


def attach_parametrisation(conv):
    class Positive(nn.Module):
        def forward(self, weight):
            return weight.abs()

    parametrize.register_parametrization(conv, "weight", Positive())


def attach_new_parameter(conv):
    conv.weight = nn.Parameter(torch.full_like(conv.weight, 0.1))


def attach_bias_taken_away(conv):
    conv.bias = None


def attach_frozen_weight(conv):
    conv.weight.requires_grad_(False)


def attach_another_stride(conv):
    conv.stride = (*conv.stride[:-1], 2)


def attach_another_padding(conv):
    conv.padding = (*conv.padding[:-1], 2)


def attach_another_dilation(conv):
    conv.dilation = (*conv.dilation[:-1], 2)


ATTACHMENTS = {
    name.removeprefix("attach_").replace("_", " "): attach
    for name, attach in list(globals().items())
    if name.startswith("attach_")
}
attachments = pytest.mark.parametrize("attach", ATTACHMENTS.values(), ids=ATTACHMENTS)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@kinds
@attachments
def test_what_is_attached_does_what_it_does_in_pytorchs(kind, attach):
    ours, theirs, shape = KINDS[kind]
    pair_of = ours(4, 3, padding=1), theirs(4, 4, 3, padding=1, groups=4)
    pair_of[1].load_state_dict(pair_of[0].state_dict())
    for module in pair_of:
        torch.manual_seed(3)
        attach(module)
    for _ in range(2):
        x = torch.randn(shape)
        assert_alike(*(run(module, x) for module in pair_of))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@kinds
@attachments
def test_what_was_attached_before_a_replacement_still_does_what_it_did(kind, attach):
    _, theirs, shape = KINDS[kind]
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(nn.Sequential(theirs(4, 4, 3, padding=1, groups=4)))
        attach(models[-1][0])
    model, replaced = models
    report = replace_depthwise_convs(replaced)
    parametrised = parametrize.is_parametrized(model[0])
    assert report.replaced == (() if parametrised else ("0",))
    assert [(name, "parametris" in reason) for name, reason in report.skipped] == [("0", True)] * parametrised
    for _ in range(2):
        x = torch.randn(shape)
        assert_alike(run(replaced, x), run(model, x))


def test_a_batch_norm_folds_into_it_as_into_pytorchs():
    conv, norm = DepthwiseConv2d(4, 3, padding=1).eval(), nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.running_mean)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)))


# In the rest of PyTorch


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPOSED = (
    {"padding": 1},
    {"padding": "same", "stride": 2, "activation": "relu"},
    {"padding": 1, "padding_mode": "reflect"},
)
composed = pytest.mark.parametrize("options", COMPOSED, ids=str)


@pytest.mark.usefixtures("fresh_compiler")
@kinds
@composed
def test_it_compiles_into_one_graph(kind, options):
    module, _ = both(kind, **options)
    x = torch.randn(KINDS[kind][2])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = run(module, x)
    actual = run(compiled, x)
    assert_alike({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected)


@kinds
def test_only_an_input_of_its_channels_is_accepted(kind):
    module = (DepthwiseConv1d if kind == "1d" else DepthwiseConv2d)(6, 3, padding=1)
    sizes = (9,) if kind == "1d" else (9, 8)
    for shape in ((2, 2, *sizes), (2, *sizes), (2, 3, *sizes), (2, 12, *sizes)):
        with pytest.raises(ValueError, match=r"x: expected \(N, 6, (H, W|L)\) or \(6, (H, W|L)\), got"):
            module(torch.randn(shape))


@kinds
@pytest.mark.parametrize("mode", ("zeros", "reflect", "replicate", "circular"))
def test_padding_changed_later_does_what_it_does_in_pytorchs(kind, mode):
    """PyTorch settles at construction how far a padding with other than zeros reaches."""
    ours_class, theirs_class = {
        "1d": (DepthwiseConv1d, nn.Conv1d),
    }.get(kind, (DepthwiseConv2d, nn.Conv2d))
    theirs = theirs_class(4, 4, 3, padding=1, groups=4, padding_mode=mode)
    converted, adopted = copy.deepcopy(theirs), ours_class.from_conv(theirs)
    fused_sepconv.replace_depthwise_convs(converted)
    ours = ours_class(4, 3, padding=1, padding_mode=mode)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, *(() if kind == "1d" else (8,)))
    for padding in ((2,) if kind == "1d" else (2, 0), 0, "valid"):
        for module in (theirs, converted, adopted, ours):
            module.padding = theirs_class(4, 4, 3, padding=padding).padding
        for module in (converted, adopted, ours):
            torch.testing.assert_close(module(x), theirs(x))


@kinds
@composed
def test_it_exports(kind, options):
    module, _ = both(kind, **options)
    x = torch.randn(KINDS[kind][2])
    program = torch.export.export(module, (x,))
    assert any("fused_sepconv.depthwise_conv2d" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


@kinds
@composed
def test_torch_fx_traces_it_as_one_call(kind, options):
    module, _ = both(kind, **options)
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert sum(node.target is depthwise_conv2d for node in traced.graph.nodes) == 1
    x = torch.randn(KINDS[kind][2])
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.parametrize("low", (torch.float16, torch.bfloat16), ids=str)
def test_it_trains_under_autocast(low):
    module = DepthwiseConv2d(4, 3, padding=1, dtype=torch.float32)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=low):
        y = module(x)
    y.float().square().mean().backward()
    assert y.dtype == low and module.weight.grad.dtype == torch.float32


# explain


def test_explain_plans_a_call_and_every_layer_of_a_model():
    x = torch.empty(2, 64, 12, 12, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(64, 1, 7, 7, dtype=torch.bfloat16, device="meta")
    call = fused_sepconv.explain(depthwise_conv2d, x, weight, padding=3, device="H200")
    assert call.forward.problem.kernel == (7, 7) and call.forward.problem.direction == "forward"
    assert call.backward.problem.direction == "backward"
    assert "reference" in str(call)
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


def test_a_replaced_network_trains_to_the_same_losses():
    torch.manual_seed(4)
    networks = [Network()]
    networks.append(copy.deepcopy(networks[0]))
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9) for network in networks]
    replace_depthwise_convs(networks[1])  # the optimiser keeps its parameters
    x, wanted = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    losses = [[], []]
    for found, network, optimizer in zip(losses, networks, optimizers, strict=True):
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), wanted)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_the_report_says_what_was_left_and_why():
    parametrised = nn.Conv2d(4, 4, 3, groups=4)
    parametrizations.weight_norm(parametrised)
    patched = nn.Conv2d(4, 4, 3, groups=4)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 8, (3, 1), groups=4),
            "one channel": nn.Conv2d(1, 8, 3),
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "parametrised": parametrised,
            "patched": patched,
            "subclass": Same(4, 4, 3, groups=4),
            "volume": nn.Conv3d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose2d(4, 4, 3, groups=4),
            "complex": nn.Conv2d(4, 4, 3, groups=4, dtype=torch.complex64),
            "separable": SeparableConv2d(4, 5, 3),
            "ours": DepthwiseConv2d(4, 3),
        }
    )
    report = replace_depthwise_convs(model)
    assert report.replaced == ("plain",)
    reasons = dict(report.skipped)
    assert reasons.keys() == {
        "parametrised", "patched", "subclass", "volume", "transposed", "complex", "separable.depthwise"
    }  # fmt: skip
    for name, word in (
        ("parametrised", "parametrised"), ("patched", "forward"), ("subclass", "Same"), ("volume", "Conv3d"),
        ("transposed", "ConvTranspose2d"), ("complex", "complex64"), ("separable.depthwise", "SeparableConv2d"),
    ):  # fmt: skip
        assert word in reasons[name], name
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


@pytest.mark.parametrize("kernel", ((1, 5), (5, 1)), ids=str)
def test_a_pair_is_a_height_and_a_width(kernel):
    module = DepthwiseConv2d(4, kernel, stride=(2, 1), padding=(1, 0))
    conv = nn.Conv2d(4, 4, kernel, stride=(2, 1), padding=(1, 0), groups=4)
    conv.load_state_dict(module.state_dict())
    assert pair(module.kernel_size) == kernel
    x = torch.randn(1, 4, 8, 6)
    torch.testing.assert_close(module(x), conv(x))
