"""Memory layout: the output follows x's memory format alone, a gradient has its input's strides, and what fake and
meta tensors promise is what real ones have."""

from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_sepconv import SeparableConv2d, separable_conv2d
from tests.support.calls import backward_op, function_of, op_arguments, saved_output
from tests.support.cases import SMALL, XCEPTION_REDUCED, Case, both, depthwise, named

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
FORMATS = (CONTIGUOUS, CHANNELS_LAST)

IMAGES = named(
    "plain", "all six tensors", "depth multiplier 2", "same, stride 2, even size", "four different sides", "silu after",
    "every dimension: one over", "everything",
)  # fmt: skip


def strides(tensor):
    """The strides that mean something: those of dimensions that have more than one element."""
    if tensor.numel() == 0:
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def made(case, target, memory_format, weights_format=CONTIGUOUS, dtype=torch.float32):
    tensors = {name: tensor.to(target.device, dtype) for name, tensor in case.tensors().items()}
    for name, tensor in tensors.items():
        if tensor.dim() == 4:
            wanted = weights_format if name.endswith("weight") else memory_format
            # empty_like and copy_: .contiguous would leave a tensor whose strides could be read either way
            tensors[name] = torch.empty_like(tensor, memory_format=wanted).copy_(tensor)
    return tensors


@pytest.mark.gradients
@pytest.mark.cases(both(IMAGES))
def test_the_output_follows_x_and_a_gradient_has_the_strides_of_its_input(target, case):
    for memory_format, weights_format in product(FORMATS, repeat=2):
        tensors = made(case, target, memory_format, weights_format)
        other = FORMATS[memory_format is CONTIGUOUS]
        if case.residual and weights_format is CONTIGUOUS:
            tensors["residual"] = tensors["residual"].contiguous(memory_format=other)
        for tensor in tensors.values():
            tensor.requires_grad_()
        y = function_of(case)(**tensors, **case.options)
        assert y.is_contiguous(memory_format=memory_format) and not y.is_contiguous(memory_format=other)
        # Half of the eight have every pair: those where the third format says whether the first two are alike.
        arriving = CONTIGUOUS if memory_format is weights_format else CHANNELS_LAST
        grad_output = torch.randn_like(y).contiguous(memory_format=arriving)
        found = torch.autograd.grad(y, list(tensors.values()), grad_output)
        for name, gradient in zip(tensors, found, strict=True):
            # With no activation after it, the residual's gradient is the arriving one itself, as in any addition.
            model = grad_output if name == "residual" and case.activation is None else tensors[name]
            assert strides(gradient) == strides(model), (name, memory_format, weights_format, arriving)


def test_the_output_is_dense(target):
    for case in both((*SMALL, *XCEPTION_REDUCED)):
        for memory_format in FORMATS if case.N else (CONTIGUOUS,):
            y = function_of(case)(**made(case, target, memory_format), **case.options)
            assert y.is_contiguous(memory_format=memory_format), case


@pytest.mark.parametrize("padding", (1, "same", ((0, 1), (2, 0))), ids=str)
def test_a_channels_last_network_stays_channels_last(padding):
    layers = [SeparableConv2d(8, 8, 3, padding=padding, activation="relu") for _ in range(3)]
    network = torch.nn.Sequential(*layers).to(memory_format=CHANNELS_LAST)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    y = network(x)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=CHANNELS_LAST)
    for parameter in network.parameters():
        assert strides(parameter.grad) == strides(parameter)


# What fake tensors promise


LAYOUTS = {
    "nchw": lambda t: t,
    "nhwc": lambda t: torch.empty_like(t, memory_format=CHANNELS_LAST).copy_(t) if t.dim() == 4 else t,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "sliced nhwc": lambda t: (
        torch.cat([t, t], 1).contiguous(memory_format=CHANNELS_LAST)[:, : t.shape[1]] if t.dim() == 4 else t
    ),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "batch innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded wholly": lambda t: t.new_ones(()).expand(t.shape),
}

FAKED = (
    *IMAGES,
    *named(
        "one channel", "one channel to many", "1x1 image", "1x1 image and kernel", "one row", "one column", "batch 5",
        "batch 0", "unbatched", "unbatched, everything", "same, stride 3", "windows in the padding alone",
    ),
    Case("one of everything", 1, 1, 1, 1, 1),
    Case("one image", 1, 4, 5, 5, 3, residual=True),
)  # fmt: skip


def alike(promised, real, where):
    for a, b in zip(promised, real, strict=True):
        assert (a.shape, a.dtype, strides(a), a.storage_offset()) == (
            b.shape, b.dtype, strides(b), b.storage_offset()
        ), where  # fmt: skip


def meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def promises(target, call, tensors):
    """What fake tensors, where they can be had, and meta tensors like these come to."""
    if target.device == "cpu":
        with FakeTensorMode() as mode:
            yield call({name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
    yield call({name: meta(tensor) for name, tensor in tensors.items()})


@pytest.mark.gradients
@pytest.mark.cases((*FAKED, *depthwise(FAKED[len(IMAGES) :])), full=depthwise(IMAGES))
def test_fake_and_meta_calls_promise_what_real_ones_give(target, case):
    """Each layout of the inputs with one dtype and one layout of the gradient, which another case has with another."""
    mask = [name in case.tensors() for name in case.inputs]
    first = sum(map(ord, case.name))
    for number, layout in enumerate(LAYOUTS if case.N != 0 else ["nchw"], first):
        dtype = target.dtypes[number % len(target.dtypes)]
        arriving = ARRIVALS[number % len(ARRIVALS)] if case.N else "nchw"
        where = layout, arriving, dtype

        def forward(tensors):
            return [function_of(case)(**tensors, **case.options)]

        def backward(tensors):
            inputs = (tensors.get(name) for name in case.inputs)
            options = op_arguments(case, target.backend)
            return backward_op(case)(tensors["grad_output"], *inputs, tensors.get("saved"), *options, mask)

        tensors = {name: LAYOUTS[layout](t.to(target.device, dtype)) for name, t in case.tensors().items()}
        (y,) = forward(tensors)
        for promised in promises(target, forward, tensors):
            alike(promised, [y], where)
        if case.N is None:  # the op has images alone
            continue
        saved = saved_output(case, y)
        own = {"grad_output": LAYOUTS[arriving](torch.randn_like(y)), **({} if saved is None else {"saved": saved})}
        real = backward({**tensors, **own})
        for promised in promises(target, backward, {**tensors, **own}):
            alike(promised, real, where)
        for name, gradient in zip(case.inputs, real, strict=True):
            assert gradient.shape == (tensors[name].shape if name in tensors else (0,)), where


ARRIVALS = ("nchw", "nhwc", "sliced", "expanded wholly")


@pytest.mark.cases(both(named("everything", "same, stride 2, even size", "relu thrice")))
def test_meta_tensors_go_forward_and_back(case):
    tensors = {name: tensor.to("meta").requires_grad_() for name, tensor in case.tensors().items()}
    y = function_of(case)(**tensors, **case.options)
    assert y.shape == case.output_shape and y.device.type == "meta"
    y.sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad.shape == tensor.shape and strides(tensor.grad) == strides(tensor), name


def test_a_fake_call_checks_its_arguments_too():
    with FakeTensorMode(), pytest.raises(ValueError, match="pointwise_weight"):
        separable_conv2d(torch.empty(1, 4, 5, 5), torch.empty(4, 1, 3, 3), torch.empty(5, 3, 1, 1))
