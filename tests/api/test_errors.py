"""A bad call is refused before anything runs, with the name of the argument that is at fault.

TypeError: a thing of the wrong kind (not a tensor, not a number, a dtype that does not belong). ValueError: the right
kind with a wrong value, shape or device.
"""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import fused_sepconv
from fused_sepconv import DepthwiseConv1d, DepthwiseConv2d, SeparableConv2d, depthwise_conv2d, separable_conv2d

pytestmark = pytest.mark.quick

GOOD = {
    "x": torch.randn(2, 4, 6, 6),
    "depthwise_weight": torch.randn(8, 1, 3, 3),
    "pointwise_weight": torch.randn(5, 8, 1, 1),
    "bias": torch.randn(5),
    "stride": 1,
    "padding": 1,
    "dilation": 1,
    "depthwise_bias": torch.randn(8),
    "residual": torch.randn(2, 5, 6, 6),
}

NAN = math.nan


def bad(exception, argument, **changes):
    """One change to the good call; ``argument`` is the name that the message must have."""
    what = ", ".join(f"{name}={describe(value)}" for name, value in changes.items())
    return pytest.param(exception, argument, changes, id=f"{argument}: {what}")


def rows(exception, argument, *values):
    """Each value in the argument's place."""
    return [bad(exception, argument, **{argument: value}) for value in values]


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype} {value.device} {value.layout}".replace("torch.", "")
    return f"array{value.shape}" if isinstance(value, np.ndarray) else repr(value)[:40]


EITHER = (TypeError, ValueError)
JAGGED = torch.nested.nested_tensor([torch.randn(4, 6, 6), torch.randn(4, 6, 6)], layout=torch.jagged)
TENSORS = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")

TENSOR_KINDS = [
    row
    for name in TENSORS
    for good in [GOOD[name]]
    for row in rows(TypeError, name, 3.0, [[1.0]], good.numpy(), good.int(), good.to(torch.complex64))
] + [
    *rows(TypeError, "x", None, GOOD["x"].bool(), GOOD["x"].to(torch.float8_e4m3fn), "image", torch.float32),
    *rows(TypeError, "depthwise_weight", None),
    *rows(TypeError, "pointwise_weight", None),
    *rows(TypeError, "bias", True),
    *rows(TypeError, "residual", "add"),
    *rows(EITHER, "x", GOOD["x"].to_sparse(), JAGGED),
    *rows(EITHER, "depthwise_weight", GOOD["depthwise_weight"].to_sparse()),
    *rows(EITHER, "residual", GOOD["residual"].to_sparse()),
    # dtypes that do not agree
    *rows(TypeError, "depthwise_weight", GOOD["depthwise_weight"].double()),
    *rows(TypeError, "pointwise_weight", GOOD["pointwise_weight"].half()),
    *rows(TypeError, "bias", GOOD["bias"].bfloat16()),
    *rows(TypeError, "depthwise_bias", GOOD["depthwise_bias"].double()),
    *rows(TypeError, "residual", GOOD["residual"].half()),
]

# An argument of the right kind on another device than x.
DEVICES = [row for name in TENSORS[1:] for row in rows(ValueError, name, GOOD[name].to("meta"))]


def shapes(argument, *several):
    return rows(ValueError, argument, *(torch.randn(shape) for shape in several))


SHAPES = [
    *shapes("x", (), (6,), (6, 6), (1, 2, 4, 6, 6), (2, 0, 6, 6), (2, 4, 0, 6), (2, 4, 6, 0)),
    bad(ValueError, "depthwise_weight", x=torch.randn(2, 3, 6, 6)),
    bad(ValueError, "depthwise_weight", x=torch.randn(2, 16, 6, 6)),
    *shapes("depthwise_weight", (8, 3, 3), (8, 1, 1, 3, 3), (8, 4, 3, 3), (6, 1, 3, 3)),
    *shapes("depthwise_weight", (0, 1, 3, 3), (8, 1, 0, 3), (8, 1, 3, 0)),
    *shapes("pointwise_weight", (5, 8), (5, 8, 1), (5, 8, 3, 3), (5, 8, 1, 2), (5, 4, 1, 1), (8, 5, 1, 1)),
    *shapes("bias", (8,), (1,), (), (5, 1)),
    *shapes("depthwise_bias", (4,), (1, 8)),
    *shapes("residual", (2, 5, 6, 5), (2, 4, 6, 6), (1, 5, 6, 6), (2, 5, 1, 1), (5, 6, 6), ()),
    bad(ValueError, "residual", x=torch.randn(4, 6, 6)),
    bad(ValueError, "residual", x=torch.randn(4, 6, 6), residual=torch.randn(1, 5, 6, 6)),
    # a kernel that finds no place: the message speaks of the image and its kernel
    bad(ValueError, "x", x=torch.randn(2, 4, 2, 6), padding=0, residual=None),
    bad(ValueError, "x", dilation=4, residual=None),
    bad(ValueError, "dilation", dilation=2**40, residual=None),
    bad(ValueError, "x", padding="valid", x=torch.randn(2, 4, 6, 2), residual=None),
]

PAIRS = [
    row
    for name in ("stride", "dilation")
    for row in (
        *rows(TypeError, name, None, 1.0, NAN, True, "1", 1 + 0j, (1, 1.0), (NAN, 1), (True, 1), ("1", "1"), (None, 1)),
        *rows(TypeError, name, {1: 1}),
        *rows(EITHER, name, ((1, 1), (1, 1)), torch.tensor([1.0, 1.0])),
        *rows(ValueError, name, 0, -1, (1, 0), (-2, 1), (), (1,), (1, 1, 1), [1, 1, 1, 1]),
    )
]

PADDINGS = [
    *rows(TypeError, "padding", None, 1.0, NAN, True, (1, 1.0), (1, None), ("same", "same")),
    *rows(TypeError, "padding", ((1, 1), (1, "1")), ((1, 1), (NAN, 1)), ((1, 1), (True, 1))),
    *rows(ValueError, "padding", -1, (1, -1), ((1, 1), (1, -1)), (), (1,), (1, 1, 1), (1, 1, 1, 1)),
    *rows(ValueError, "padding", ((1, 1),), ((1, 1), (1, 1, 1)), ((1, 1), (1,)), "full", "SAME", ""),
    # numbers that no 64-bit size can hold
    bad(ValueError, "padding", padding=2**64, residual=None),
    bad(ValueError, "padding", padding=2**62, residual=None),
    bad(ValueError, "stride", stride=2**64, residual=None),
]

ACTIVATIONS = [
    row
    for name in ("pre_activation", "mid_activation", "activation")
    for row in (
        *rows(ValueError, name, "tanh", "ReLU", "", "none"),
        *rows(TypeError, name, 1, NAN, True, torch.relu, nn.ReLU(), ["relu"]),
    )
]

# What `depthwise_conv2d` calls the arguments that it shares.
DEPTHWISE = {
    "depthwise_weight": "weight",
    "depthwise_bias": "bias",
    "mid_activation": "activation",
    **{name: name for name in ("x", "stride", "padding", "dilation", "pre_activation")},
}


def depthwise_half(row):
    """A row's change to the good call of `depthwise_conv2d`; none where it has no such argument."""
    exception, argument, changes = row.values
    changes = {name: value for name, value in changes.items() if not (name == "residual" and value is None)}
    if not {argument, *changes} <= DEPTHWISE.keys():
        return []
    return [bad(exception, DEPTHWISE[argument], **{DEPTHWISE[name]: value for name, value in changes.items()})]


GOOD_CALLS = {
    "separable_conv2d": GOOD,
    "depthwise_conv2d": {DEPTHWISE[name]: value for name, value in GOOD.items() if name in DEPTHWISE},
}
SEPARABLE_CALLS = (*TENSOR_KINDS, *DEVICES, *SHAPES, *PAIRS, *PADDINGS, *ACTIVATIONS)
DEPTHWISE_CALLS = [half for row in SEPARABLE_CALLS for half in depthwise_half(row)]
CALLS = [
    pytest.param(function, *row.values, id=f"{function}: {row.id}")
    for function, calls in (("separable_conv2d", SEPARABLE_CALLS), ("depthwise_conv2d", DEPTHWISE_CALLS))
    for row in calls
]


def names(argument):
    """The argument's own name, not as part of another's: "bias" is not in "depthwise_bias"."""
    return rf"(?<![\w.]){re.escape(argument)}(?!\w)"


def call(module, function, **changes):
    return getattr(module, function)(**{**GOOD_CALLS[function], **changes})


@pytest.mark.parametrize(("function", "channels"), (("separable_conv2d", 5), ("depthwise_conv2d", 8)))
def test_the_good_call_is_good(function, channels):
    assert call(fused_sepconv, function).shape == (2, channels, 6, 6)


def test_the_bad_calls_of_one_function_are_also_bad_calls_of_the_other():
    assert len(DEPTHWISE_CALLS) > 100
    assert {row.values[1] for row in DEPTHWISE_CALLS} == set(DEPTHWISE.values())


@pytest.mark.parametrize(("function", "exception", "argument", "changes"), CALLS)
def test_a_bad_call_is_refused_by_the_name_of_its_argument(function, exception, argument, changes):
    """Also after a good one: what its checks left behind does not let a bad one through."""
    for _ in range(2):
        with pytest.raises(exception, match=names(argument)):
            call(fused_sepconv, function, **changes)
        call(fused_sepconv, function)


def test_the_reference_refuses_the_same():
    for row in CALLS[::5]:
        function, exception, argument, changes = row.values
        with pytest.raises(exception, match=names(argument)):
            call(fused_sepconv.families.pytorch.convolutions, function, **changes)


@pytest.mark.parametrize(
    ("changes", "got", "expected"),
    (
        ({"bias": torch.randn(7)}, "7", "5"),
        ({"pointwise_weight": torch.randn(5, 6, 1, 1)}, "6", "8"),
        ({"depthwise_weight": torch.randn(6, 1, 3, 3)}, "6", "4"),
        ({"residual": torch.randn(2, 5, 9, 6)}, "9", "6"),
        ({"stride": 0}, "0", "1"),
        ({"padding": "full"}, "full", "same"),
        ({"activation": "tanh"}, "tanh", "hardswish"),
        ({"residual": GOOD["residual"].half()}, "float16", "float32"),
        ({"bias": GOOD["bias"].to("meta")}, "meta", "cpu"),
        ({"x": 3.5}, "float", "Tensor"),
    ),
)
def test_the_message_says_what_it_got_and_what_was_expected(changes, got, expected):
    with pytest.raises((TypeError, ValueError)) as caught:
        separable_conv2d(**{**GOOD, **changes})
    assert got in str(caught.value) and expected in str(caught.value)


def test_a_missing_weight_is_a_missing_argument():
    with pytest.raises(TypeError, match="pointwise_weight"):
        separable_conv2d(GOOD["x"], GOOD["depthwise_weight"])
    with pytest.raises(TypeError, match="weight"):
        depthwise_conv2d(GOOD["x"])


@pytest.mark.parametrize("backend", ("cuda", "", "FUSED", None, 3))
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises((ValueError, TypeError), match="backend"), fused_sepconv.use_backend(backend):
        pass
    assert separable_conv2d(**GOOD).shape == (2, 5, 6, 6)


def op(function, **changes):
    activations = {"pre_activation": None, "mid_activation": None, "activation": None}
    if function == "depthwise_conv2d":
        del activations["mid_activation"]
    arguments = {
        **GOOD_CALLS[function],
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        **activations,
        "backend": "auto",
        **changes,
    }
    return getattr(torch.ops.fused_sepconv, function)(**arguments)


SHARED_NONSENSE = (
    {"x": torch.randn(6)},
    {"x": torch.randn(2, 3, 6, 6)},
    {"x": torch.randn(2, 4, 6, 6).int()},
    {"stride": [0, 1]},
    {"stride": [1, 1, 1]},
    {"dilation": [1, 0]},
    {"padding": [1, 1]},
    {"activation": "tanh"},
    {"backend": "cuda"},
)
NONSENSE = {
    "separable_conv2d": (
        *SHARED_NONSENSE,
        {"padding": [1, 1, 1, -1]},  # which leaves another size than the residual's
        {"depthwise_weight": torch.randn(8, 1, 3)},
        {"depthwise_weight": torch.randn(8, 1, 9, 9)},
        {"pointwise_weight": torch.randn(5, 8, 3, 3)},
        {"pointwise_weight": torch.randn(5, 4, 1, 1)},
        {"bias": torch.randn(7)},
        {"depthwise_bias": torch.randn(7)},
        {"residual": torch.randn(2, 5, 5, 5)},
        {"residual": torch.randn(2, 5, 6, 6).double()},
    ),
    "depthwise_conv2d": (
        *SHARED_NONSENSE,
        {"weight": torch.randn(8, 1, 3)},
        {"weight": torch.randn(8, 1, 9, 9)},
        {"weight": torch.randn(8, 2, 3, 3)},
        {"weight": torch.randn(8, 1, 3, 3).double()},
        {"bias": torch.randn(7)},
    ),
}


@pytest.mark.parametrize(
    ("function", "changes"),
    [(function, changes) for function, rows in NONSENSE.items() for changes in rows],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else ", ".join(f"{name}={describe(argument)}" for name, argument in value.items())
    ),
)
def test_the_op_called_directly_refuses_nonsense_too(function, changes):
    op(function)
    with pytest.raises((ValueError, TypeError, RuntimeError, LookupError)):
        op(function, **changes)


# The module

MODULE = {"in_channels": 4, "out_channels": 5, "kernel_size": 3}


@pytest.mark.parametrize(
    ("exception", "argument", "changes"),
    (
        *rows(TypeError, "in_channels", 4.0, None, True),
        *rows(ValueError, "in_channels", 0, -4),
        *rows(TypeError, "out_channels", "5", NAN),
        *rows(ValueError, "out_channels", 0),
        *rows(TypeError, "kernel_size", 3.0, None, (3, "3")),
        *rows(ValueError, "kernel_size", 0, (3, -1), (3, 3, 3)),
        *rows(TypeError, "stride", NAN),
        *rows(ValueError, "stride", 0, (1, 1, 1)),
        *rows(TypeError, "padding", None, 0.5),
        *rows(ValueError, "padding", -1, "full", ((1, 1), (1, 1), (1, 1))),
        *rows(TypeError, "dilation", True),
        *rows(ValueError, "dilation", (0, 1)),
        *rows(TypeError, "depth_multiplier", 1.5, None),
        *rows(ValueError, "depth_multiplier", 0, -1),
        *rows(ValueError, "padding_mode", "mirror"),
        *rows(EITHER, "padding_mode", None),
        *rows(ValueError, "pre_activation", "tanh"),
        *rows(ValueError, "mid_activation", "RELU"),
        *rows(ValueError, "activation", "softmax"),
        *rows(TypeError, "activation", nn.ReLU()),
    ),
)
def test_a_bad_module_is_refused_when_it_is_made(exception, argument, changes):
    with pytest.raises(exception, match=names(argument)):
        SeparableConv2d(**{**MODULE, **changes})


def test_the_good_module_is_good():
    assert SeparableConv2d(**MODULE)(torch.randn(1, 4, 5, 5)).shape == (1, 5, 3, 3)


@pytest.mark.parametrize(
    ("exception", "argument", "x"),
    (
        (TypeError, "x", None),
        (TypeError, "x", [1.0]),
        (TypeError, "x", np.zeros((1, 4, 5, 5), np.float32)),
        ((ValueError, TypeError), "x|depthwise_weight", torch.zeros(1, 4, 5, 5).double()),
        (ValueError, "x", torch.zeros(5, 5)),
        (ValueError, "x|depthwise_weight", torch.zeros(1, 3, 5, 5)),
        (ValueError, "x", torch.zeros(1, 4, 2, 5)),
        (ValueError, "x|depthwise_weight", torch.zeros(1, 4, 5, 5, device="meta")),
    ),
    ids=lambda value: describe(value) if not isinstance(value, (type, tuple)) else "",
)
@pytest.mark.parametrize("padding_mode", ("zeros", "reflect"))
def test_a_bad_input_to_the_module_is_refused(exception, argument, x, padding_mode):
    module = SeparableConv2d(**MODULE, padding_mode=padding_mode)
    with pytest.raises(exception, match=rf"(?<![\w.])({argument})(?!\w)"):
        module(x)


def test_a_reflection_wider_than_the_image_is_refused():
    module = SeparableConv2d(4, 5, 3, padding=3, padding_mode="reflect")
    with pytest.raises(ValueError, match="padding"):
        module(torch.randn(1, 4, 3, 3))


def conv(in_channels=4, out_channels=8, kernel_size=3, **options):
    return nn.Conv2d(in_channels, out_channels, kernel_size, **options)


@pytest.mark.parametrize(
    ("argument", "depthwise", "pointwise"),
    (
        ("depthwise", None, conv(8, 5, 1)),
        ("depthwise", torch.randn(8, 1, 3, 3), conv(8, 5, 1)),
        ("depthwise", nn.Conv1d(4, 8, 3, groups=4), conv(8, 5, 1)),
        ("depthwise", conv(groups=1), conv(8, 5, 1)),
        ("depthwise", conv(groups=2), conv(8, 5, 1)),
        ("pointwise", conv(groups=4), None),
        ("pointwise", conv(groups=4), nn.Linear(8, 5)),
        ("pointwise", conv(groups=4), conv(8, 5, 3)),
        ("pointwise", conv(groups=4), conv(4, 5, 1)),
        ("pointwise", conv(groups=4), conv(8, 8, 1, groups=8)),
        ("pointwise", conv(groups=4), conv(8, 5, 1, stride=2)),
        ("pointwise", conv(groups=4), conv(8, 5, 1, padding=1)),
    ),
)
def test_two_convolutions_that_are_no_pair_are_not_adopted(argument, depthwise, pointwise):
    with pytest.raises((TypeError, ValueError), match=names(argument)):
        SeparableConv2d.from_convs(depthwise, pointwise)


# The depthwise modules


@pytest.mark.parametrize("kind", (DepthwiseConv2d, DepthwiseConv1d), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("exception", "argument", "changes"),
    (
        *rows(TypeError, "in_channels", 4.0, None),
        *rows(ValueError, "in_channels", 0),
        *rows(TypeError, "kernel_size", 3.0, None),
        *rows(ValueError, "kernel_size", 0),
        *rows(EITHER, "kernel_size", (3, 3, 3)),
        *rows(TypeError, "stride", NAN),
        *rows(ValueError, "stride", 0),
        *rows(EITHER, "stride", (1, 1, 1)),
        *rows(TypeError, "padding", None, 0.5),
        *rows(ValueError, "padding", -1, "full", (1, 1, 1)),
        *rows(TypeError, "dilation", True),
        *rows(ValueError, "dilation", 0),
        *rows(TypeError, "depth_multiplier", 1.5),
        *rows(ValueError, "depth_multiplier", 0),
        *rows(ValueError, "padding_mode", "mirror"),
        *rows(ValueError, "pre_activation", "tanh"),
        *rows(TypeError, "activation", nn.ReLU()),
    ),
)
def test_a_bad_depthwise_module_is_refused_when_it_is_made(kind, exception, argument, changes):
    assert kind(4, 3).in_channels == 4
    with pytest.raises(exception, match=names(argument)):
        kind(**{"in_channels": 4, "kernel_size": 3, **changes})


@pytest.mark.parametrize("padding_mode", ("zeros", "reflect"))
@pytest.mark.parametrize(
    ("exception", "kind", "x"),
    (
        (TypeError, DepthwiseConv2d, None),
        (TypeError, DepthwiseConv2d, np.zeros((1, 4, 5, 5), np.float32)),
        (ValueError, DepthwiseConv2d, torch.zeros(5, 5)),
        (ValueError, DepthwiseConv2d, torch.zeros(1, 3, 5, 5)),
        (ValueError, DepthwiseConv2d, torch.zeros(1, 4, 2, 5)),
        (TypeError, DepthwiseConv1d, None),
        (ValueError, DepthwiseConv1d, torch.zeros(5)),
        (ValueError, DepthwiseConv1d, torch.zeros(1, 4, 5, 5)),
        (ValueError, DepthwiseConv1d, torch.zeros(1, 3, 5)),
        (ValueError, DepthwiseConv1d, torch.zeros(1, 4, 2)),
    ),
    ids=lambda value: describe(value) if not isinstance(value, type) else value.__name__,
)
def test_a_bad_input_to_a_depthwise_module_is_refused(padding_mode, exception, kind, x):
    with pytest.raises(exception, match=r"(?<![\w.])(x|weight)(?!\w)"):
        kind(4, 3, padding_mode=padding_mode)(x)


@pytest.mark.parametrize(
    ("kind", "other"),
    (
        (DepthwiseConv2d, None),
        (DepthwiseConv2d, nn.Conv1d(4, 8, 3, groups=4)),
        (DepthwiseConv2d, conv(groups=2)),
        (DepthwiseConv2d, conv(groups=1)),
        (DepthwiseConv1d, conv(groups=4)),
        (DepthwiseConv1d, nn.Conv1d(4, 8, 3)),
    ),
    ids=str,
)
def test_what_is_no_depthwise_convolution_is_not_adopted(kind, other):
    with pytest.raises((TypeError, ValueError), match=names("conv")):
        kind.from_conv(other)


@pytest.mark.parametrize("model", (None, [nn.Conv2d(4, 4, 3, groups=4)], torch.zeros(3)), ids=str)
def test_what_is_no_model_has_nothing_replaced(model):
    with pytest.raises(TypeError, match=names("model")):
        fused_sepconv.replace_depthwise_convs(model)


def test_explain_refuses_what_it_can_not_explain():
    with pytest.raises(TypeError, match=names("target")):
        fused_sepconv.explain(torch.relu, GOOD["x"])
