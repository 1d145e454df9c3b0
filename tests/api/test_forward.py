"""What the functions compute: act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual),
and act(depthwise(pre_act(x)) + bias), with the gradients of either."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import fused_sepconv
from fused_sepconv import separable_conv2d
from tests.support.calls import forward_arguments, forward_op, function_of, leaves, recording, value_and_gradients
from tests.support.cases import (
    CASES,
    FEATURES,
    SMALL,
    TAILS,
    XCEPTION,
    XCEPTION_REDUCED,
    Case,
    both,
    depthwise,
    four_sides,
    named,
    pair,
    same_padding,
    two_convolutions,
)
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager


def rounded(tensors, dtype, device="cpu"):
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}


@pytest.mark.gradients
@pytest.mark.cases(both((*SMALL, *TAILS, *XCEPTION_REDUCED)), quick=FEATURES, full=both(XCEPTION))
def test_every_case_and_its_gradients_are_as_close_to_the_oracle_as_eager(target, dtype, case):
    """Ours against eager PyTorch in ``dtype`` on the target, and both against the oracle of the same rounded inputs."""
    grad_output = torch.randn(case.output_shape, dtype=torch.float64).to(dtype)
    inputs = leaves(case, dtype, target.device)
    exact = {name: tensor.detach().to("cpu", torch.float64).requires_grad_() for name, tensor in inputs.items()}
    eager, oracle = (
        value_and_gradients(case.definition, tensors, case.options, grad_output) for tensors in (inputs, exact)
    )
    for x in target.in_each_layout(inputs["x"]):
        here = {**inputs, "x": x}
        ours = value_and_gradients(function_of(case), here, case.options, grad_output)
        assert ours.keys() == eager.keys()
        assert_as_close_as_eager(ours.pop("y"), eager["y"], oracle["y"])
        for name, gradient in ours.items():
            assert_gradient_as_close_as_eager(gradient, eager[name], oracle[name], name=f"gradient of {name}")
        with torch.no_grad():  # which goes another way
            assert_as_close_as_eager(function_of(case)(**here, **case.options), eager["y"], oracle["y"])


RELU = {None: lambda v: v, "relu": lambda v: max(v, 0.0)}


def depthwise_by_hand(case, x, weight, bias, pre, post):
    """post(depthwise(pre(x)) + bias), from loops and numbers alone."""
    (kh, kw), (sh, sw), (dh, dw) = pair(case.kernel), pair(case.stride), pair(case.dilation)
    top, _, left, _ = four_sides(case.padding, (case.H, case.W), (kh, kw), (sh, sw), (dh, dw))
    y = np.zeros((case.N, case.K, *case.output_size))
    for n, k, p, q in np.ndindex(*y.shape):
        value = 0.0 if bias is None else bias[k]
        for i, j in np.ndindex(kh, kw):
            h, w = p * sh + i * dh - top, q * sw + j * dw - left
            if 0 <= h < case.H and 0 <= w < case.W:
                value += pre(x[n, k // case.multiplier, h, w]) * weight[k, 0, i, j]
        y[n, k, p, q] = post(value)
    return y


def by_hand(case, tensors):
    """The definition from loops and numbers alone (no activations but relu)."""
    x, depthwise_weight, *rest = (tensors[name].numpy() if name in tensors else None for name in case.inputs)
    pre, *others = (RELU[getattr(case, name)] for name in case.activations)
    if case.operator == "depthwise_conv2d":
        return torch.from_numpy(depthwise_by_hand(case, x, depthwise_weight, *rest, pre, *others))
    (mid, post), (pointwise_weight, bias, depthwise_bias, residual) = others, rest
    between = depthwise_by_hand(case, x, depthwise_weight, depthwise_bias, pre, mid)
    y = np.zeros(case.output_shape)
    for n, f, p, q in np.ndindex(*y.shape):
        value = float(pointwise_weight[f, :, 0, 0] @ between[n, :, p, q])
        value += 0.0 if bias is None else bias[f]
        value += 0.0 if residual is None else residual[n, f, p, q]
        y[n, f, p, q] = post(value)
    return torch.from_numpy(y)


BY_HAND = named(
    "plain", "all six tensors", "residual before the activation", "depth multiplier 3", "stride 3",
    "dilation and stride", "four different sides", "same, stride 2, even size", "same, stride 2, dilation 2",
    "kernel larger than the image", "windows in the padding alone", "padding far beyond the kernel", "relu thrice",
)  # fmt: skip


@pytest.mark.cases(both(BY_HAND))
def test_the_definition_and_ours_are_what_loops_over_numbers_give(target, case):
    tensors = case.tensors()
    expected = by_hand(case, tensors)
    torch.testing.assert_close(case.definition(**tensors, **case.options), expected, rtol=1e-12, atol=1e-12)
    actual = function_of(case)(**rounded(tensors, torch.float64, target.device), **case.options)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_the_cases_reach_what_their_names_say():
    for case in CASES:
        y = two_convolutions(**case.tensors(), **case.options) if case.multiplications < 1e7 else None
        assert y is None or y.shape == case.output_shape, case.name
        if y is not None and case.activation in ("relu", "relu6") and y.numel() > 30:
            assert (y == 0).any(), f"{case.name}: nothing below the lower bend"
        if y is not None and case.activation == "relu6":
            assert (y == 6).any(), f"{case.name}: nothing above the upper bend"
    assert len(XCEPTION) == len(XCEPTION_REDUCED) == 10
    assert {(c.pre_activation, c.mid_activation, c.activation)[i] for c in CASES for i in range(3)} == {
        None, "relu", "relu6", "elu", "silu", "hardswish", "gelu",
    }  # fmt: skip


# Sizes, padding and the forms that they may be given in


@pytest.mark.parametrize("stride", (1, 2, 3, 4))
def test_same_padding_is_tensorflows_for_every_size(stride):
    sizes = ((1, 2), (3, 4), (5, 6), (7, 8), (10, 9))
    for kernel, dilation, (height, width) in itertools.product((1, 2, 3, 4, 5), (1, 2), sizes):
        depthwise_weight = torch.randn(2, 1, kernel, kernel, dtype=torch.float64)
        pointwise_weight = torch.randn(3, 2, 1, 1, dtype=torch.float64)
        x = torch.randn(1, 2, height, width, dtype=torch.float64)
        y = separable_conv2d(x, depthwise_weight, pointwise_weight, None, stride, "same", dilation)
        assert y.shape == (1, 3, math.ceil(height / stride), math.ceil(width / stride))
        sides = (same_padding(height, kernel, stride, dilation), same_padding(width, kernel, stride, dilation))
        explicit = separable_conv2d(x, depthwise_weight, pointwise_weight, None, stride, sides, dilation)
        assert torch.equal(y, explicit)


def test_same_padding_is_pytorchs_where_the_stride_is_1():
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    for kernel, dilation in itertools.product((1, 2, 3, 4, (2, 5)), (1, 2, 3)):
        depthwise_weight = torch.randn(2, 1, *pair(kernel), dtype=torch.float64)
        pointwise_weight = torch.randn(3, 2, 1, 1, dtype=torch.float64)
        expected = torch.conv2d(x, depthwise_weight, padding="same", dilation=dilation, groups=2)
        expected = torch.conv2d(expected, pointwise_weight)
        actual = separable_conv2d(x, depthwise_weight, pointwise_weight, padding="same", dilation=dilation)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "forms",
    (
        (1, (1, 1), [1, 1], ((1, 1), (1, 1)), [[1, 1], [1, 1]], "same"),
        (0, (0, 0), ((0, 0), (0, 0)), "valid"),
        ((1, 2), [1, 2], ((1, 1), (2, 2))),
        ((0, 1), ((0, 0), (1, 1)), torch.Size((0, 1))),
    ),
    ids=str,
)
@pytest.mark.cases(both(named("plain")))
def test_the_forms_of_padding_say_the_same(case, forms):
    tensors = case.tensors()
    first, *others = [function_of(case)(**tensors, padding=form) for form in forms]
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("option", ("stride", "dilation"))
@pytest.mark.cases(both(named("odd sizes")))
def test_one_number_stands_for_two(case, option):
    tensors = case.tensors()
    for number in (1, 2):
        expected = case.definition(**tensors, padding=2, **{option: number})
        for form in (number, (number, number), [number, number], torch.Size((number, number))):
            actual = function_of(case)(**tensors, padding=2, **{option: form})
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_every_side_pads_its_own_side():
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    depthwise_weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    pointwise_weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = separable_conv2d(x, depthwise_weight, pointwise_weight, padding=((1, 2), (3, 0)))
    expected = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    expected[0, 0, 1:3, 3:5] = 1
    assert torch.equal(y, expected)


@pytest.mark.cases(both(named("everything")))
def test_the_arguments_have_the_order_and_the_defaults_that_the_contract_gives_them(case):
    tensors = {name: tensor for name, tensor in case.tensors().items() if name not in ("depthwise_bias", "residual")}
    function, values = function_of(case), list(tensors.values())
    options = {"stride": 2, "padding": (1, 2), "dilation": (2, 1)}
    for actual, expected in (
        (function(*values, *options.values()), case.definition(**tensors, **options)),
        (function(*map(torch.nn.Parameter, values)), case.definition(**tensors)),
        (function(*values[:-1]), case.definition(*values[:-1])),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    function(*values, 1, 0, 1)
    with pytest.raises(TypeError):
        function(*values, 1, 0, 1, None)


def test_a_depthwise_convolution_is_the_grouped_convolution_of_the_same_arguments():
    (case,) = depthwise(named("depth multiplier 3"))
    x, weight, bias = case.tensors().values()
    expected = torch.conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2), groups=case.C)
    actual = fused_sepconv.depthwise_conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Inputs of every make


MAKES = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "rows apart": lambda t: padded_rows(t),
    "at an odd offset": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "every other": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
}


def padded_rows(t):
    """The same values with NaN between the rows: a read past the end of a row shows."""
    wider = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    wider[..., : t.shape[-1]] = t
    return wider[..., : t.shape[-1]]


@pytest.mark.dtypes(torch.float32, torch.float16)
@pytest.mark.cases(both(named("everything", "every dimension: one over", "unbatched, everything")))
def test_strides_and_offsets_do_not_change_the_result(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    eager = case.definition(**tensors, **case.options)
    oracle = case.definition(**rounded(tensors, torch.float64), **case.options)
    for name, make in MAKES.items():
        made = {key: make(tensor) for key, tensor in tensors.items()}
        assert all(torch.equal(made[key], tensor) for key, tensor in tensors.items())
        assert_as_close_as_eager(function_of(case)(**made, **case.options), eager, oracle, name=name)


@pytest.mark.cases(both((Case("expanded", 3, 4, 5, 5, 6, padding=1, residual=True),)))
def test_expanded_inputs_are_read_as_what_they_say(target, case):
    tensors = rounded(case.tensors(), torch.float64, target.device)
    tensors["x"] = tensors["x"][:1, :1, :, :1].expand(3, 4, 5, 5)
    if "residual" in tensors:
        tensors["residual"] = torch.ones(1, dtype=torch.float64, device=target.device).expand(3, 6, 5, 5)
    ours = function_of(case)(**tensors, **case.options)
    expected = case.definition(**{name: t.contiguous() for name, t in tensors.items()}, **case.options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


ONCE_MORE = named(
    "everything", "1x1 image and kernel", "1x1 kernel", "residual", "relu thrice", "silu after", "elu after", "batch 0",
    "every dimension: one over", "728->728@19 reduced", "four different sides",
)  # fmt: skip


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.cases(both(ONCE_MORE))
def test_a_call_leaves_its_inputs_as_they_were_and_its_result_is_new_and_the_same_again(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    before = {name: (tensor.clone(), tensor._version) for name, tensor in tensors.items()}
    y = function_of(case)(**tensors, **case.options)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name][0]) and tensor._version == before[name][1], name
        assert not y.numel() or y.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr(), name
    assert not y._is_view()
    assert torch.equal(y, function_of(case)(**tensors, **case.options))
    assert torch.equal(y, forward_op(case)(*forward_arguments(case, tensors, target.backend)))


@pytest.mark.cases(both((Case("independent", 4, 5, 6, 7, 6, padding=1),)))
def test_images_of_a_batch_do_not_see_each_other(target, case):
    tensors = rounded(case.tensors(), torch.float64, target.device)
    together = function_of(case)(**tensors, **case.options)
    for n in range(4):
        alone = function_of(case)(**{**tensors, "x": tensors["x"][n]}, **case.options)
        torch.testing.assert_close(together[n], alone, rtol=1e-12, atol=1e-12)
    tensors["x"][2] = float("nan")
    others = function_of(case)(**tensors, **case.options)[[0, 1, 3]]
    torch.testing.assert_close(others, together[[0, 1, 3]], rtol=1e-12, atol=1e-12)


@pytest.mark.cases(both((Case("not finite", 1, 2, 9, 9, 3, padding=1),)))
def test_what_is_not_finite_reaches_every_output_that_sees_it_and_no_other(target, case):
    for activation, value in itertools.product((None, "relu", "elu"), (float("nan"), float("inf"))):
        case = replace(case, pre_activation=activation, activation=activation)
        tensors = {name: t.abs() for name, t in rounded(case.tensors(), torch.float32, target.device).items()}
        tensors["x"][0, 1, 4, 6] = value
        y = function_of(case)(**tensors, **case.options)
        expected = torch.zeros(case.output_shape, dtype=torch.bool, device=target.device)
        seeing = slice(None) if case.operator == "separable_conv2d" else slice(1, None)  # the outputs of channel 1
        expected[:, seeing, 3:6, 5:8] = True
        assert torch.equal(~torch.isfinite(y), expected), (activation, value)


@pytest.mark.dtypes(torch.float16)
def test_float16_does_not_overflow_where_the_result_fits(target, dtype):
    """Accumulation is float32 or wider: 4096 products of 16 by 16 pass 65504 on the way, and cancel."""
    x = torch.full((1, 4096, 1, 1), 16.0, dtype=dtype, device=target.device)
    depthwise_weight = torch.ones(4096, 1, 1, 1, dtype=dtype, device=target.device)
    pointwise_weight = torch.full((2, 4096, 1, 1), 16.0, dtype=dtype, device=target.device)
    pointwise_weight[:, 2048:] = -16.0
    y = separable_conv2d(x, depthwise_weight, pointwise_weight)
    assert torch.equal(y, torch.zeros_like(y))


# The backend, and the op


@pytest.mark.cases(both(named("plain")))
def test_use_backend_gives_back_what_it_found(case):
    def backend():
        seen = []
        with recording(case, seen):
            function_of(case)(**case.tensors())
        ((_, backend),) = seen
        return backend

    assert backend() == "auto"
    with fused_sepconv.use_backend("reference"):
        assert backend() == "reference"
        with fused_sepconv.use_backend("auto"):
            assert backend() == "auto"
        assert backend() == "reference"
        with pytest.raises(KeyError), fused_sepconv.use_backend("auto"):
            raise KeyError
        assert backend() == "reference"
    assert backend() == "auto"


@pytest.mark.cases(both(named("everything")))
def test_the_reference_backend_gives_what_auto_gives_on_the_cpu(case):
    tensors = case.tensors()
    with fused_sepconv.use_backend("reference"):
        reference = function_of(case)(**tensors, **case.options)
    assert torch.equal(reference, function_of(case)(**tensors, **case.options))


def test_fused_refuses_what_no_kernel_serves_and_says_why_and_no_peer_is_imported():
    """A CPU tensor, in an interpreter that has no emulated kernels."""
    script = """
import sys, torch, fused_sepconv
x, weight = torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3)
with fused_sepconv.use_backend("fused"):
    for call in (lambda: fused_sepconv.depthwise_conv2d(x, weight),
                 lambda: fused_sepconv.separable_conv2d(x, weight, torch.zeros(2, 2, 1, 1))):
        try:
            call()
        except RuntimeError as error:
            print(error)
assert "timm" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_SEPCONV_NATIVE"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert len(lines) == 2 and all("fused" in line and "cpu" in line.lower() for line in lines), run.stderr


NUMBERS = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation"
SCHEMAS = {
    "separable_conv2d": "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? bias, "
    f"Tensor? depthwise_bias, Tensor? residual, {NUMBERS}, str? pre_activation, str? mid_activation, str? activation, "
    "str backend, bool? save_intermediate=None",
    "depthwise_conv2d": f"Tensor x, Tensor weight, Tensor? bias, {NUMBERS}, str? pre_activation, str? activation, "
    "str backend",
}


@pytest.mark.parametrize(("operator", "expected"), SCHEMAS.items(), ids=SCHEMAS)
def test_the_op_takes_what_the_contract_says(operator, expected):
    schema = getattr(torch.ops.fused_sepconv, operator).default._schema
    assert str(schema) == f"fused_sepconv::{operator}({expected}) -> Tensor"
