"""A bad call is refused before anything runs, with the name of the argument that is at fault.

TypeError: a thing of the wrong kind (not a tensor, not a number, a dtype that does not belong). ValueError: the right
kind with a wrong value, shape or device.
"""

import math
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import fused_sepconv
from fused_sepconv import DepthwiseConv1d, DepthwiseConv2d, SeparableConv2d, depthwise_conv2d, separable_conv2d

pytestmark = pytest.mark.quick

GOOD = {
    "x": torch.randn(2, 4, 6, 6), "depthwise_weight": torch.randn(8, 1, 3, 3),
    "pointwise_weight": torch.randn(5, 8, 1, 1), "bias": torch.randn(5), "stride": 1, "padding": 1, "dilation": 1,
    "depthwise_bias": torch.randn(8), "residual": torch.randn(2, 5, 6, 6),
}  # fmt: skip
NAN = math.nan
EITHER = (TypeError, ValueError)
TENSORS = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")


def rows(exception, argument, *values, **others):
    """(exception, the argument that the message must name, changes to the good call): each value in its place."""
    return [(exception, argument, {argument: value, **others}) for value in values]


def shapes(argument, *several, **others):
    return rows(ValueError, argument, *(torch.randn(shape) for shape in several), **others)


BAD = [
    # what is no tensor, of a dtype or layout that is not supported, of another dtype or on another device than x
    *(
        row
        for name in TENSORS
        for good in [GOOD[name]]
        for row in (
            *rows(TypeError, name, 3.0, [[1.0]], good.numpy(), good.int(), good.to(torch.complex64)),
            *(rows(TypeError, name, good.double(), good.half()) if name != "x" else ()),
            *(rows(ValueError, name, good.to("meta")) if name != "x" else ()),
        )
    ),
    *rows(TypeError, "x", None, GOOD["x"].bool(), GOOD["x"].to(torch.float8_e4m3fn), "image", torch.float32),
    *rows(TypeError, "depthwise_weight", None),
    *rows(TypeError, "pointwise_weight", None),
    *rows(TypeError, "bias", True, GOOD["bias"].bfloat16()),
    *rows(TypeError, "residual", "add"),
    *(row for name in ("x", "depthwise_weight", "residual") for row in rows(EITHER, name, GOOD[name].to_sparse())),
    # shapes
    *shapes("x", (), (6,), (6, 6), (1, 2, 4, 6, 6), (2, 0, 6, 6), (2, 4, 0, 6), (2, 4, 6, 0)),
    (ValueError, "depthwise_weight", {"x": torch.randn(2, 3, 6, 6)}),
    (ValueError, "depthwise_weight", {"x": torch.randn(2, 16, 6, 6)}),
    *shapes("depthwise_weight", (8, 3, 3), (8, 1, 1, 3, 3), (8, 4, 3, 3), (6, 1, 3, 3)),
    *shapes("depthwise_weight", (0, 1, 3, 3), (8, 1, 0, 3), (8, 1, 3, 0)),
    *shapes("pointwise_weight", (5, 8), (5, 8, 1), (5, 8, 3, 3), (5, 8, 1, 2), (5, 4, 1, 1), (8, 5, 1, 1)),
    *shapes("bias", (8,), (1,), (), (5, 1)),
    *shapes("depthwise_bias", (4,), (1, 8)),
    *shapes("residual", (2, 5, 6, 5), (2, 4, 6, 6), (1, 5, 6, 6), (2, 5, 1, 1), (5, 6, 6), ()),
    (ValueError, "residual", {"x": torch.randn(4, 6, 6)}),
    *shapes("residual", (1, 5, 6, 6), x=torch.randn(4, 6, 6)),
    # a kernel that finds no place: the message speaks of the image and its kernel
    *shapes("x", (2, 4, 2, 6), padding=0, residual=None),
    *shapes("x", (2, 4, 6, 2), padding="valid", residual=None),
    (ValueError, "x", {"dilation": 4, "residual": None}),
    *rows(ValueError, "dilation", 2**40, residual=None),
    # strides, dilations and paddings; then numbers that no 64-bit size can hold
    *(
        row
        for name in ("stride", "dilation")
        for row in (
            *rows(TypeError, name, None, 1.0, NAN, True, "1", 1 + 0j, {1: 1}),
            *rows(TypeError, name, (1, 1.0), (NAN, 1), (True, 1), ("1", "1"), (None, 1)),
            *rows(EITHER, name, ((1, 1), (1, 1)), torch.tensor([1.0, 1.0])),
            *rows(ValueError, name, 0, -1, (1, 0), (-2, 1), (), (1,), (1, 1, 1), [1, 1, 1, 1]),
        )
    ),
    *rows(TypeError, "padding", None, 1.0, NAN, True, (1, 1.0), (1, None), ("same", "same")),
    *rows(TypeError, "padding", ((1, 1), (1, "1")), ((1, 1), (NAN, 1)), ((1, 1), (True, 1))),
    *rows(ValueError, "padding", -1, (1, -1), ((1, 1), (1, -1)), (), (1,), (1, 1, 1), (1, 1, 1, 1)),
    *rows(ValueError, "padding", ((1, 1),), ((1, 1), (1, 1, 1)), ((1, 1), (1,)), "full", "SAME", ""),
    *rows(ValueError, "padding", 2**64, 2**62, residual=None),
    *rows(ValueError, "stride", 2**64, residual=None),
    *(
        row
        for name in ("pre_activation", "mid_activation", "activation")
        for row in (
            *rows(ValueError, name, "tanh", "ReLU", "", "none"),
            *rows(TypeError, name, 1, NAN, True, torch.relu, nn.ReLU(), ["relu"]),
        )
    ),
]

# What `depthwise_conv2d` calls the arguments that it shares.
DEPTHWISE = {
    "depthwise_weight": "weight", "depthwise_bias": "bias", "mid_activation": "activation",
    **{name: name for name in ("x", "stride", "padding", "dilation", "pre_activation")},
}  # fmt: skip
GOOD_CALLS = {
    "separable_conv2d": GOOD,
    "depthwise_conv2d": {DEPTHWISE[name]: value for name, value in GOOD.items() if name in DEPTHWISE},
}


def bad_calls():
    """{(function, argument): [(exception, changes)]}, those of `depthwise_conv2d` taken from the other's."""
    found = defaultdict(list)
    for exception, argument, changes in BAD:
        found["separable_conv2d", argument].append((exception, changes))
        changes = {name: value for name, value in changes.items() if not (name == "residual" and value is None)}
        if {argument, *changes} <= DEPTHWISE.keys():
            renamed = {DEPTHWISE[name]: value for name, value in changes.items()}
            found["depthwise_conv2d", DEPTHWISE[argument]].append((exception, renamed))
    return found


CALLS = bad_calls()


def names(argument):
    """The argument's own name, or one of several, not as part of another's: "bias" is not in "depthwise_bias"."""
    return rf"(?<![\w.])({argument})(?!\w)"


def describe(changes):
    """The changes to a good call, for a message."""
    return {n: tuple(v.shape) if isinstance(v, torch.Tensor | np.ndarray) else v for n, v in changes.items()}


def assert_refused(exception, argument, changes, call):
    try:
        call(**changes)
    except Exception as error:
        assert isinstance(error, exception), f"{describe(changes)}: {error!r}"
        assert re.search(names(argument), str(error)), f"{describe(changes)}: {error}"
    else:
        raise AssertionError(f"{describe(changes)} was taken")


def calling(module, function):
    return lambda **changes: getattr(module, function)(**{**GOOD_CALLS[function], **changes})


@pytest.mark.parametrize(("function", "argument"), CALLS)
def test_a_bad_call_is_refused_by_the_name_of_its_argument(function, argument):
    """After a good one: what its checks left behind does not let a bad one through."""
    assert calling(fused_sepconv, function)().shape == (2, 5 if function == "separable_conv2d" else 8, 6, 6)
    for exception, changes in CALLS[function, argument]:
        assert_refused(exception, argument, changes, calling(fused_sepconv, function))
    exception, changes = CALLS[function, argument][-1]
    with fused_sepconv.use_backend("reference"):
        assert_refused(exception, argument, changes, calling(fused_sepconv, function))


def test_both_functions_have_bad_calls_of_every_argument():
    assert sum(len(rows) for (function, _), rows in CALLS.items() if function == "depthwise_conv2d") > 100
    assert {argument for function, argument in CALLS if function == "depthwise_conv2d"} == set(DEPTHWISE.values())
    jagged = torch.nested.nested_tensor([torch.randn(4, 6, 6), torch.randn(4, 6, 6)], layout=torch.jagged)
    for function in GOOD_CALLS:
        assert_refused(EITHER, "x", {"x": jagged}, calling(fused_sepconv, function))


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
    with pytest.raises(EITHER) as caught:
        separable_conv2d(**{**GOOD, **changes})
    assert got in str(caught.value) and expected in str(caught.value)


def test_a_missing_weight_is_a_missing_argument():
    with pytest.raises(TypeError, match="pointwise_weight"):
        separable_conv2d(GOOD["x"], GOOD["depthwise_weight"])
    with pytest.raises(TypeError, match="weight"):
        depthwise_conv2d(GOOD["x"])


@pytest.mark.parametrize("backend", ("cuda", "", "FUSED", None, 3))
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises(EITHER, match="backend"), fused_sepconv.use_backend(backend):
        pass
    assert separable_conv2d(**GOOD).shape == (2, 5, 6, 6)


NUMBERS = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "backend": "auto"}
PLACES = {
    "separable_conv2d": ("pre_activation", "mid_activation", "activation"),
    "depthwise_conv2d": ("pre_activation", "activation"),
}
SHARED_NONSENSE = (
    *({"x": x} for x in (torch.randn(6), torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6).int())),
    *({"stride": [0, 1]}, {"stride": [1, 1, 1]}, {"dilation": [1, 0]}, {"padding": [1, 1]}),
    *({"activation": "tanh"}, {"backend": "cuda"}, {"bias": torch.randn(7)}),
)
NONSENSE = {
    "separable_conv2d": (
        *SHARED_NONSENSE,
        {"padding": [1, 1, 1, -1]},  # which leaves another size than the residual's
        *({"depthwise_weight": torch.randn(shape)} for shape in ((8, 1, 3), (8, 1, 9, 9))),
        *({"pointwise_weight": torch.randn(shape)} for shape in ((5, 8, 3, 3), (5, 4, 1, 1))),
        {"depthwise_bias": torch.randn(7)},
        *({"residual": residual} for residual in (torch.randn(2, 5, 5, 5), torch.randn(2, 5, 6, 6).double())),
    ),
    "depthwise_conv2d": (
        *SHARED_NONSENSE,
        *({"weight": torch.randn(shape)} for shape in ((8, 1, 3), (8, 1, 9, 9), (8, 2, 3, 3))),
        {"weight": torch.randn(8, 1, 3, 3).double()},
    ),
}


@pytest.mark.parametrize("function", NONSENSE)
def test_the_op_called_directly_refuses_nonsense_too(function):
    good = {**GOOD_CALLS[function], **NUMBERS, **dict.fromkeys(PLACES[function])}
    op = getattr(torch.ops.fused_sepconv, function)
    op(**good)
    for changes in NONSENSE[function]:
        try:
            op(**{**good, **changes})
        except (ValueError, TypeError, RuntimeError, LookupError):
            continue
        raise AssertionError(f"{describe(changes)} was taken")


# The modules


MODULES = {
    SeparableConv2d: {"in_channels": 4, "out_channels": 5, "kernel_size": 3},
    DepthwiseConv2d: {"in_channels": 4, "kernel_size": 3},
    DepthwiseConv1d: {"in_channels": 4, "kernel_size": 3},
}
BAD_MODULES = (
    *rows(TypeError, "in_channels", 4.0, None, True),
    *rows(ValueError, "in_channels", 0, -4),
    *rows(TypeError, "kernel_size", 3.0, None, (3, "3")),
    *rows(ValueError, "kernel_size", 0, (3, -1)),
    *rows(EITHER, "kernel_size", (3, 3, 3)),
    *rows(TypeError, "stride", NAN),
    *rows(ValueError, "stride", 0),
    *rows(EITHER, "stride", (1, 1, 1)),
    *rows(TypeError, "padding", None, 0.5),
    *rows(ValueError, "padding", -1, "full", (1, 1, 1), ((1, 1), (1, 1), (1, 1))),
    *rows(TypeError, "dilation", True),
    *rows(ValueError, "dilation", 0, (0, 1)),
    *rows(TypeError, "depth_multiplier", 1.5, None),
    *rows(ValueError, "depth_multiplier", 0, -1),
    *rows(ValueError, "padding_mode", "mirror"),
    *rows(EITHER, "padding_mode", None),
    *rows(ValueError, "pre_activation", "tanh"),
    *rows(ValueError, "activation", "softmax"),
    *rows(TypeError, "activation", nn.ReLU()),
)
OF_A_PAIR = (
    *rows(TypeError, "out_channels", "5", NAN),
    *rows(ValueError, "out_channels", 0),
    *rows(ValueError, "mid_activation", "RELU"),
)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_bad_module_is_refused_when_it_is_made(kind):
    kind(**MODULES[kind])
    for exception, argument, changes in (*BAD_MODULES, *(OF_A_PAIR if kind is SeparableConv2d else ())):
        # In one dimension a pair is one number too many, whatever is in it.
        loose = kind is DepthwiseConv1d and any(isinstance(value, tuple) for value in changes.values())
        assert_refused(EITHER if loose else exception, argument, {**MODULES[kind], **changes}, kind)


def zeros(*shapes, **options):
    return [(EITHER, "x|depthwise_weight|weight", torch.zeros(shape, **options)) for shape in shapes]


@pytest.mark.parametrize("mode", ("zeros", "reflect"))
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_a_bad_input_to_a_module_is_refused(kind, mode):
    size = (5,) if kind is DepthwiseConv1d else (5, 5)
    for exception, argument, x in (
        *((TypeError, "x", x) for x in (None, [1.0], np.zeros((1, 4, *size), np.float32))),
        *zeros(size, (1, 3, *size), (1, 4, 2, *size[1:]), (1, 4, 1, *size)),
        *zeros((1, 4, *size), dtype=torch.float64),
        *zeros((1, 4, *size), device="meta"),
    ):
        assert_refused(exception, argument, {"x": x}, lambda x: kind(**MODULES[kind], padding_mode=mode)(x))


def test_a_reflection_wider_than_the_image_is_refused():
    with pytest.raises(ValueError, match="padding"):
        SeparableConv2d(4, 5, 3, padding=3, padding_mode="reflect")(torch.randn(1, 4, 3, 3))


def conv(in_channels=4, out_channels=8, kernel_size=3, kind=nn.Conv2d, **options):
    return kind(in_channels, out_channels, kernel_size, **options)


NO_DEPTHWISE = (None, torch.randn(8, 1, 3, 3), conv(kind=nn.Conv1d, groups=4), conv(), conv(groups=2))
NO_POINTWISE = (
    *(None, nn.Linear(8, 5), conv(8, 5, 3), conv(4, 5, 1), conv(8, 8, 1, groups=8), conv(8, 5, 1, stride=2)),
    conv(8, 5, 1, padding=1),
)


def test_what_is_no_such_convolution_is_not_adopted():
    for other in NO_DEPTHWISE:
        assert_refused(EITHER, "depthwise", {"d": other}, lambda d: SeparableConv2d.from_convs(d, conv(8, 5, 1)))
        assert_refused(EITHER, "conv", {"conv": other}, DepthwiseConv2d.from_conv)
    for other in NO_POINTWISE:
        assert_refused(EITHER, "pointwise", {"p": other}, lambda p: SeparableConv2d.from_convs(conv(groups=4), p))
    for other in (conv(groups=4), conv(kind=nn.Conv1d)):
        assert_refused(EITHER, "conv", {"conv": other}, DepthwiseConv1d.from_conv)


def test_what_is_no_model_has_nothing_replaced_or_explained():
    for model in (None, [nn.Conv2d(4, 4, 3, groups=4)], torch.zeros(3)):
        assert_refused(TypeError, "model", {"model": model}, fused_sepconv.replace_depthwise_convs)
    with pytest.raises(TypeError, match=names("target")):
        fused_sepconv.explain(torch.relu, GOOD["x"])
