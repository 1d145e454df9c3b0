"""SeparableConv2d is the pair of convolutions that it replaces, in all that a user can do to it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from fused_sepconv import SeparableConv2d
from tests.support.cases import ACTIVATIONS, four_sides, pair
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager


class TorchPair(nn.Module):
    """What people write today: a depthwise convolution, a pointwise one, and what goes round them."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, *, bias=True,
                 depth_multiplier=1, depthwise_bias=False, padding_mode="zeros", pre_activation=None,
                 mid_activation=None, activation=None, dtype=None):  # fmt: skip
        super().__init__()
        between = in_channels * depth_multiplier
        self.padding, self.padding_mode = padding, padding_mode
        self.activations = tuple(ACTIVATIONS[name] for name in (pre_activation, mid_activation, activation))
        self.depthwise = nn.Conv2d(
            in_channels, between, kernel_size, stride, 0, dilation, in_channels, depthwise_bias, dtype=dtype
        )
        self.pointwise = nn.Conv2d(between, out_channels, 1, bias=bias, dtype=dtype)

    def forward(self, x, residual=None):
        pre, mid, post = self.activations
        conv = self.depthwise
        sides = four_sides(self.padding, tuple(x.shape[-2:]), conv.kernel_size, conv.stride, conv.dilation)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(pre(x), (sides[2], sides[3], sides[0], sides[1]), mode=mode) if any(sides) else pre(x)
        y = self.pointwise(mid(conv(x)))
        return post(y if residual is None else y + residual)


def both(*arguments, **options):
    """Ours and the torch pair, with the same parameters."""
    ours, theirs = SeparableConv2d(*arguments, **options), TorchPair(*arguments, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run(module, x, **extra):
    """Result and every gradient of one forward and backward, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x, **extra)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_alike(ours, theirs, x, rtol=1e-10, **extra):
    actual, expected = run(ours, x, **extra), run(theirs, x, **extra)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(actual[name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def double():
    """Modules are made in float64, where alike means alike."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def image(*shape):
    return torch.randn(*(shape or (2, 4, 7, 6)))


# The same as the pair


OPTIONS = {
    "plain": {},
    "padding": {"padding": 1},
    "no bias": {"bias": False},
    "depthwise bias": {"depthwise_bias": True},
    "depth multiplier": {"depth_multiplier": 3, "padding": 1},
    "stride and dilation": {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)},
    "same": {"padding": "same"},
    "same with a stride": {"padding": "same", "stride": 2},
    "same with two strides": {"padding": "same", "stride": (3, 2)},
    "valid": {"padding": "valid", "stride": 2},
    "four sides": {"padding": ((1, 2), (0, 3))},
    "activations": {"padding": 1, "pre_activation": "relu", "mid_activation": "silu", "activation": "relu6"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect on four sides": {"padding": ((2, 1), (0, 3)), "padding_mode": "reflect"},
    "replicate, same with a stride": {"padding": "same", "stride": 2, "padding_mode": "replicate"},
    "circular with everything": {
        "padding": (2, 1), "stride": (1, 2), "padding_mode": "circular", "pre_activation": "elu",
        "depthwise_bias": True, "mid_activation": "gelu", "activation": "relu", "depth_multiplier": 2,
    },
    "reflect without padding": {"padding_mode": "reflect"},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_computes_what_the_pair_computes(options):
    assert_alike(*both(4, 5, 3, **options), image())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_unbatched_image_gives_an_unbatched_result(options):
    assert_alike(*both(4, 5, 3, **options), image(4, 7, 6))


@pytest.mark.parametrize("kernel_size", (1, 2, 5, (1, 3), (4, 3)), ids=str)
def test_every_kernel_size(kernel_size):
    assert_alike(*both(4, 5, kernel_size, padding=2), image())


@pytest.mark.parametrize("padding", (0, 1, "same"))
def test_a_residual_is_added_before_the_activation(padding):
    ours, theirs = both(4, 4, 3, padding=padding, activation="relu")
    x = image()
    residual = torch.randn_like(theirs(x))
    assert_alike(ours, theirs, x, residual=residual)
    assert torch.equal(ours(x, residual), ours(x, residual=residual))
    torch.testing.assert_close(ours(x[0], residual[0]), theirs(x, residual)[0])


def test_the_residual_gets_its_gradient():
    ours, theirs = both(4, 4, 3, padding=1, activation="silu")
    x = image()
    found = []
    for module in (ours, theirs):
        residual = x.clone().requires_grad_()
        found += torch.autograd.grad(module(x, residual).square().sum(), residual)
    torch.testing.assert_close(*found)


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32, torch.float16, torch.bfloat16)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_it_may_be_moved_to_another_dtype_and_memory_format(target, dtype, memory_format):
    ours, theirs = both(16, 24, 3, padding=1, activation="relu")
    x = image(2, 16, 9, 9).to(dtype)
    oracle = run(copy.deepcopy(theirs).to(dtype).double(), x.double())
    moved = [m.to(target.device, dtype, memory_format=memory_format) for m in (ours, theirs)]
    assert {p.dtype for p in moved[0].parameters()} == {dtype}
    x = x.to(target.device).contiguous(memory_format=memory_format)
    actual, expected = (run(module, x) for module in moved)
    assert actual["y"].is_contiguous(memory_format=memory_format)
    assert_as_close_as_eager(actual.pop("y"), expected.pop("y"), oracle.pop("y"))
    for name, gradient in actual.items():
        assert_gradient_as_close_as_eager(gradient, expected[name], oracle[name], name=name)


def test_half_float_and_double_are_shorthands():
    module = SeparableConv2d(4, 5, 3)
    for method, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        getattr(module, method)()
        assert module(image().to(dtype)).dtype == dtype


def test_device_and_dtype_go_to_the_parameters():
    module = SeparableConv2d(4, 5, 3, depthwise_bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(2, 4, 6, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 4, 4)


# What it is made of


def test_its_state_dict_has_the_keys_of_two_convolutions():
    assert list(SeparableConv2d(4, 5, 3).state_dict()) == ["depthwise.weight", "pointwise.weight", "pointwise.bias"]
    assert list(SeparableConv2d(4, 5, 3, bias=False).state_dict()) == ["depthwise.weight", "pointwise.weight"]
    assert set(SeparableConv2d(4, 5, 3, depthwise_bias=True).state_dict()) == {
        "depthwise.weight",
        "depthwise.bias",
        "pointwise.weight",
        "pointwise.bias",
    }


def test_its_parameters_have_the_shapes_of_two_convolutions():
    module = SeparableConv2d(4, 5, (3, 2), depth_multiplier=2, depthwise_bias=True)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "depthwise.weight": (8, 1, 3, 2),
        "depthwise.bias": (8,),
        "pointwise.weight": (5, 8, 1, 1),
        "pointwise.bias": (5,),
    }


def test_its_children_are_two_plain_convolutions():
    module = SeparableConv2d(4, 5, 3)
    assert dict(module.named_children()).keys() == {"depthwise", "pointwise"}
    assert {type(child) for child in module.children()} == {nn.Conv2d}
    assert module.depthwise.groups == 4


def test_an_initialiser_that_knows_convolutions_finds_them():
    def initialise(module):
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.5)

    module = SeparableConv2d(4, 5, 3, bias=False).apply(initialise)
    assert {p.unique().item() for p in module.parameters()} == {0.5}
    assert torch.equal(module(torch.ones(1, 4, 3, 3)), torch.full((1, 5, 1, 1), 9.0))


def test_it_starts_from_the_weights_that_two_convolutions_start_from():
    torch.manual_seed(5)
    ours = SeparableConv2d(4, 5, 3, depthwise_bias=True)
    torch.manual_seed(5)
    depthwise, pointwise = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1)
    for child, conv in ((ours.depthwise, depthwise), (ours.pointwise, pointwise)):
        assert torch.equal(child.weight, conv.weight) and torch.equal(child.bias, conv.bias)


def test_a_checkpoint_of_two_convolutions_loads():
    _, theirs = both(4, 5, 3, padding="same", stride=2)
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    fresh = SeparableConv2d(4, 5, 3, padding="same", stride=2)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_alike(fresh, theirs, image())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("how", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("copy", "pickle"))
def test_a_copy_is_the_same_and_its_own(options, how):
    module = SeparableConv2d(4, 5, 3, **options)
    module(image())
    copied = how(module)
    x = image()
    assert torch.equal(copied(x), module(x))
    with torch.no_grad():
        copied.depthwise.weight.zero_()
        copied.pointwise.weight.zero_()
    assert not torch.equal(copied(x), module(x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_its_text_says_what_its_children_do_not(options):
    text = repr(SeparableConv2d(4, 5, 3, **options))
    assert text.startswith("SeparableConv2d(") and "(depthwise): Conv2d(4," in text and "(pointwise): Conv2d(" in text
    for name in ("pre_activation", "mid_activation", "activation"):
        if name in options:
            assert f"{name}={options[name]}" in text.replace("'", "").replace('"', ""), text
    if options.get("padding_mode", "zeros") != "zeros":
        assert options["padding_mode"] in text
    if "same" in str(options.get("padding")):
        assert "same" in text


# Adopted convolutions


def test_adopted_convolutions_share_their_parameters():
    depthwise = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
    pointwise = nn.Conv2d(8, 5, 1)
    module = SeparableConv2d.from_convs(depthwise, pointwise)
    assert module.depthwise.weight is depthwise.weight and module.depthwise.bias is depthwise.bias
    assert module.pointwise.weight is pointwise.weight and module.pointwise.bias is pointwise.bias
    x = image()
    torch.testing.assert_close(module(x), pointwise(depthwise(x)))
    with torch.no_grad():
        depthwise.weight.mul_(2)
    torch.testing.assert_close(module(x), pointwise(depthwise(x)))
    module(x).sum().backward()
    assert depthwise.weight.grad is not None and pointwise.bias.grad is not None


@pytest.mark.parametrize(
    "options",
    (
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "replicate"},
        {"stride": (1, 2), "dilation": (2, 1), "bias": False},
    ),
    ids=str,
)
def test_adopted_convolutions_keep_their_options(options):
    depthwise, pointwise = nn.Conv2d(4, 4, 3, groups=4, **options), nn.Conv2d(4, 5, 1, bias=False)
    module = SeparableConv2d.from_convs(depthwise, pointwise, pre_activation="relu", activation="gelu")
    x = image()
    torch.testing.assert_close(module(x), F.gelu(pointwise(depthwise(F.relu(x)))))


def test_an_even_kernel_under_same_is_adopted_as_pytorch_pads_it():
    depthwise, pointwise = nn.Conv2d(4, 4, (2, 4), padding="same", groups=4), nn.Conv2d(4, 5, 1)
    x = image()
    torch.testing.assert_close(SeparableConv2d.from_convs(depthwise, pointwise)(x), pointwise(depthwise(x)))


# What users attach to the children


def attach_forward_hook(module):
    module.depthwise.register_forward_hook(lambda child, args, output: output * 2)


def attach_forward_hook_to_the_pointwise(module):
    module.pointwise.register_forward_hook(lambda child, args, output: output + 1)


def attach_forward_pre_hook(module):
    module.pointwise.register_forward_pre_hook(lambda child, args: (args[0].clamp(max=0.5),))


def attach_forward_hook_with_kwargs(module):
    module.depthwise.register_forward_hook(lambda child, args, kwargs, output: -output, with_kwargs=True)


def attach_full_backward_hook(module):
    module.depthwise.register_full_backward_hook(lambda child, grad_input, grad_output: (grad_input[0] * 3,))


def attach_full_backward_pre_hook(module):
    module.pointwise.register_full_backward_pre_hook(lambda child, grad_output: (grad_output[0] * 3,))


def attach_prune_unstructured(module):
    prune.l1_unstructured(module.depthwise, "weight", amount=0.4)


def attach_prune_structured(module):
    prune.ln_structured(module.pointwise, "weight", amount=2, n=2, dim=0)


def attach_prune_both(module):
    prune.l1_unstructured(module.depthwise, "weight", amount=0.4)
    prune.l1_unstructured(module.pointwise, "weight", amount=0.5)
    prune.l1_unstructured(module.pointwise, "bias", amount=2)


def attach_prune_made_permanent(module):
    prune.l1_unstructured(module.depthwise, "weight", amount=0.4)
    prune.remove(module.depthwise, "weight")


def attach_weight_norm(module):
    parametrizations.weight_norm(module.pointwise)


def attach_old_weight_norm(module):
    torch.nn.utils.weight_norm(module.depthwise)


def attach_spectral_norm(module):
    parametrizations.spectral_norm(module.depthwise)
    parametrizations.spectral_norm(module.pointwise)


def attach_old_spectral_norm(module):
    torch.nn.utils.spectral_norm(module.pointwise)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def attach_own_parametrization(module):
    parametrize.register_parametrization(module.depthwise, "weight", Doubled())


class Standardized(nn.Conv2d):
    """A child of another class: the weights are made to have mean 0 before they are used."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def attach_another_class(module):
    old = module.pointwise
    module.pointwise = Standardized(old.in_channels, old.out_channels, 1)
    module.pointwise.load_state_dict(old.state_dict())


class Wrapped(nn.Module):
    """A low-rank adapter, as fine-tuning libraries put round a convolution."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.extra = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
        nn.init.constant_(self.extra.weight, 0.25)

    def forward(self, x):
        return self.conv(x) + self.extra(x)


def attach_adapter(module):
    module.pointwise = Wrapped(module.pointwise)


def attach_own_forward(module):
    original = module.depthwise.forward
    module.depthwise.forward = lambda x: original(x) * 0.5


def attach_new_parameter(module):
    module.depthwise.weight = nn.Parameter(torch.full_like(module.depthwise.weight, 0.1))


def attach_bias_taken_away(module):
    module.pointwise.bias = None


def attach_bias_put_on(module):
    module.depthwise.bias = nn.Parameter(torch.linspace(-1, 1, module.depthwise.out_channels))


def attach_frozen_child(module):
    module.depthwise.requires_grad_(False)


def attach_pointwise_of_another_width(module):
    torch.manual_seed(11)
    module.pointwise = nn.Conv2d(module.depthwise.out_channels, 9, 1)


def attach_pointwise_with_a_stride(module):
    torch.manual_seed(11)
    module.pointwise = nn.Conv2d(module.depthwise.out_channels, 5, 1, stride=2)


def attach_identity_for_the_pointwise(module):
    module.pointwise = nn.Identity()


ATTACHMENTS = {
    name.removeprefix("attach_").replace("_", " "): attach
    for name, attach in list(globals().items())
    if name.startswith("attach_")
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("attach", ATTACHMENTS.values(), ids=ATTACHMENTS)
@pytest.mark.parametrize("options", ("padding", "same with a stride", "reflect", "activations", "four sides"))
def test_what_is_attached_to_a_child_does_what_it_does_in_the_pair(attach, options):
    pairs = both(4, 5, 3, **OPTIONS[options])
    for module in pairs:
        torch.manual_seed(3)
        attach(module)
    for _ in range(2):
        assert_alike(*pairs, image())


@pytest.mark.parametrize("child", ("depthwise", "pointwise"))
def test_a_hook_sees_what_its_child_reads_and_gives(child):
    pairs = both(4, 5, 3, padding=1, mid_activation="silu")
    seen = []
    for module in pairs:
        getattr(module, child).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    x = image()
    for module in pairs:
        module(x)
    (ours_in, ours_out), (theirs_in, theirs_out) = seen
    if child == "pointwise":
        torch.testing.assert_close(ours_in, theirs_in)
    torch.testing.assert_close(ours_out, theirs_out)


def test_a_backward_hook_sees_the_gradients_of_its_child():
    pairs = both(4, 5, 3, padding=1, pre_activation="gelu", activation="elu")
    seen = []
    for module in pairs:
        module.pointwise.register_full_backward_hook(lambda _, to, arriving: seen.append((to[0], arriving[0])))
    assert_alike(*pairs, image())
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_hook_taken_off_again_leaves_no_trace():
    ours, theirs = both(4, 5, 3, padding=1)
    handle = ours.depthwise.register_forward_hook(lambda child, args, output: output * 2)
    x = image()
    assert not torch.allclose(ours(x), theirs(x))
    handle.remove()
    assert_alike(ours, theirs, x)


def test_hooks_on_the_module_itself_work():
    ours, theirs = both(4, 5, 3, padding=1)
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda _, args, output: output + 1)
        module.register_full_backward_hook(lambda _, grad_in, grad_out: tuple(g * 5 for g in grad_in if g is not None))
    assert_alike(ours, theirs, image())


def test_a_pruned_module_trains_like_the_pruned_pair():
    pairs = both(4, 5, 3, padding=1)
    x = image()
    for module in pairs:
        attach_prune_both(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        assert (module.depthwise.weight == 0).sum() == round(0.4 * 36)
    assert_alike(*pairs, x)


CHANGES = {
    "stride": ("depthwise", "stride", (2, 3)),
    "dilation": ("depthwise", "dilation", (2, 1)),
    "padding": ("depthwise", "padding", (2, 0)),
}


@pytest.mark.parametrize(("child", "attribute", "value"), CHANGES.values(), ids=CHANGES)
def test_a_childs_attribute_changed_later_takes_effect(child, attribute, value):
    """As when a segmentation network turns strides into dilations after loading."""
    module = SeparableConv2d(4, 5, 3, padding=1)
    x = image()
    module(x)
    setattr(getattr(module, child), attribute, value)
    torch.testing.assert_close(module(x), module.pointwise(module.depthwise(x)))


@pytest.mark.parametrize("mode", ("reflect", "replicate", "circular"))
def test_padding_changed_later_under_another_padding_mode_does_what_it_does_to_the_child(mode):
    """PyTorch settles at construction how far such a padding reaches."""
    module = SeparableConv2d(4, 5, 3, padding=1, padding_mode=mode)
    x = image()
    module.depthwise.padding = (2, 0)
    torch.testing.assert_close(module(x), module.pointwise(module.depthwise(x)))


@pytest.mark.parametrize("shape", ((2, 2, 7, 6), (2, 7, 6), (2, 3, 7, 6), (2, 12, 7, 6)), ids=str)
def test_only_an_image_of_its_channels_is_accepted(shape):
    """A function takes 6 filters on 2 or 3 channels for a depth multiplier; a module knows its channels."""
    module = SeparableConv2d(6, 4, 3, padding=1)
    with pytest.raises(ValueError, match=r"x: expected \(N, 6, H, W\) or \(6, H, W\), got"):
        module(image(*shape))
    module = SeparableConv2d(6, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"x: expected \(N, 6, H, W\)"):
        module(image(*shape))


class Own(torch.Tensor):
    """A tensor whose constructors are its own affair."""

    def new_empty(self, *_, **__):
        raise AssertionError("new_empty of a subclass was called")

    new_zeros = new_empty


@pytest.mark.parametrize("wanted", ("x", "depthwise.weight"))
def test_a_subclass_with_constructors_of_its_own_goes_forward_and_back(wanted):
    ours, theirs = both(4, 5, 3, padding=1, activation="silu")
    found = []
    for module in (ours, theirs):
        module.requires_grad_(False)
        x = image_of_ones().as_subclass(Own)
        leaf = x.requires_grad_() if wanted == "x" else module.depthwise.weight.requires_grad_()
        y = module(x)
        y.sum().backward()
        found.append((y, leaf.grad))
    for actual, expected in zip(*found, strict=True):
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def image_of_ones():
    return torch.ones(2, 4, 7, 6)


@pytest.mark.parametrize("place", ("pre_activation", "mid_activation", "activation"))
def test_silu_runs_pytorchs_own_derivative_where_nothing_differentiates_it_again(place):
    module = SeparableConv2d(4, 5, 3, padding=1, **{place: "silu"})
    y = module(image().requires_grad_()).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward()
    names = {event.name for event in profile.events()}
    assert "aten::silu_backward" in names and "aten::sigmoid" not in names
    x = image().requires_grad_()
    assert torch.autograd.gradgradcheck(module, (x[:1, :, :3, :3],))


# What it costs, to those who count


COUNTED = ({}, {"padding": 1}, {"stride": 2, "padding": "same", "depth_multiplier": 2})


@pytest.mark.parametrize("options", COUNTED, ids=str)
def test_its_operations_are_counted_by_the_formula_of_the_op(options):
    """Counting watches every module through global hooks: that alone must not send the call another way."""
    module = SeparableConv2d(4, 5, 3, **options)
    x = image().requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    n, f, p, q = y.shape
    k = 4 * options.get("depth_multiplier", 1)
    expected = 2 * n * p * q * (k * 9 + k * f)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * expected


def test_only_the_gradients_that_are_asked_for_are_counted():
    """A frozen pair still sends the gradient through to x, and nothing else: half of the whole backward."""
    module = SeparableConv2d(4, 5, 3, padding=1).requires_grad_(False)
    y = module(image().requires_grad_())
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    n, f, p, q = y.shape
    assert backward.get_total_flops() == 2 * n * p * q * (4 * 9 + 4 * f)


# Its place in a network


def test_it_serves_in_a_sequential_with_batch_norm():
    torch.manual_seed(1)
    layers = [both(4, 8, 3, padding=1, bias=False), both(8, 6, 3, stride=2, padding="same")]
    networks = [nn.Sequential(one, nn.BatchNorm2d(8), nn.ReLU(), two) for one, two in zip(*layers, strict=True)]
    assert_alike(*networks, image())


def test_one_module_used_twice_gathers_both_gradients():
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x), x)

    ours, theirs = both(4, 4, 3, padding=1, activation="silu")
    assert_alike(Twice(ours), Twice(theirs), image())


def test_a_subclass_may_override_forward():
    class Scaled(SeparableConv2d):
        def forward(self, x, residual=None):
            return 2 * super().forward(x, residual)

    torch.manual_seed(2)
    scaled = Scaled(4, 5, 3)
    plain = SeparableConv2d(4, 5, 3)
    plain.load_state_dict(scaled.state_dict())
    x = image()
    torch.testing.assert_close(scaled(x), 2 * plain(x))


def test_a_pair_is_a_height_and_a_width():
    module = SeparableConv2d(4, 5, (3, 1), stride=(2, 1), padding=(1, 0))
    assert module(image(1, 4, 8, 6)).shape == (1, 5, 4, 6)
    assert pair(module.depthwise.kernel_size) == (3, 1)
