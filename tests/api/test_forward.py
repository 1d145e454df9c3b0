"""The forward is the definition: act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual).

Of ``depthwise_conv2d``: act(depthwise(pre_act(x)) + bias).
"""

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
from tests.support.calls import forward_arguments, forward_op, function_of
from tests.support.cases import (
    CASES,
    FEATURES,
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
from tests.support.closeness import assert_as_close_as_eager


def rounded(tensors, dtype, device="cpu"):
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}


@pytest.mark.cases(both(CASES), quick=FEATURES)
def test_every_case_is_as_close_to_the_oracle_as_eager(target, dtype, case):
    """Ours against eager PyTorch in ``dtype`` on the target, and both against the oracle of the same rounded inputs."""
    inputs = rounded(case.tensors(), dtype, target.device)
    eager = case.definition(**inputs, **case.options)
    oracle = case.definition(**rounded(inputs, torch.float64), **case.options)
    for x in target.in_each_layout(inputs["x"]):
        assert_as_close_as_eager(function_of(case)(**{**inputs, "x": x}, **case.options), eager, oracle)


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
    "plain",
    "all six tensors",
    "residual before the activation",
    "depth multiplier 3",
    "stride 3",
    "dilation and stride",
    "four different sides",
    "same, stride 2, even size",
    "same, stride 2, dilation 2",
    "kernel larger than the image",
    "windows in the padding alone",
    "padding far beyond the kernel",
    "relu thrice",
)


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
def test_the_arguments_have_the_order_that_the_contract_gives_them(case):
    tensors = {name: tensor for name, tensor in case.tensors().items() if name not in ("depthwise_bias", "residual")}
    by_name = case.definition(**tensors, stride=2, padding=(1, 2), dilation=(2, 1))
    in_order = function_of(case)(*tensors.values(), 2, (1, 2), (2, 1))
    torch.testing.assert_close(in_order, by_name, rtol=1e-12, atol=1e-12)


@pytest.mark.cases(both(named("plain")))
def test_what_the_contract_makes_keyword_only_is_keyword_only(case):
    function_of(case)(*case.tensors().values(), None, 1, 0, 1)
    with pytest.raises(TypeError):
        function_of(case)(*case.tensors().values(), None, 1, 0, 1, None)


def test_the_defaults_are_no_padding_stride_1_and_nothing_else():
    tensors = named("plain")[0].tensors()
    expected = torch.conv2d(tensors["x"], tensors["depthwise_weight"], groups=3)
    expected = torch.conv2d(expected, tensors["pointwise_weight"])
    torch.testing.assert_close(separable_conv2d(**tensors), expected, rtol=1e-12, atol=1e-12)


def test_a_depthwise_convolution_is_the_grouped_convolution_of_the_same_arguments():
    (case,) = depthwise(named("depth multiplier 3"))
    x, weight, bias = case.tensors().values()
    expected = torch.conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2), groups=case.C)
    actual = fused_sepconv.depthwise_conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    plain = torch.conv2d(x, weight, groups=case.C)
    torch.testing.assert_close(fused_sepconv.depthwise_conv2d(x, weight), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.cases(both(named("all six tensors")))
def test_parameters_are_accepted_for_tensors(case):
    tensors = case.tensors()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    y = function_of(case)(**parameters, padding=1)
    torch.testing.assert_close(y, case.definition(**tensors, padding=1), rtol=1e-12, atol=1e-12)


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


@pytest.mark.cases(
    both(named("everything", "1x1 image and kernel", "relu thrice", "silu after", "elu after", "batch 0"))
)
def test_the_inputs_stay_as_they_were(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    function_of(case)(**tensors, **case.options)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor._version == versions[name], name


@pytest.mark.cases(both(named("1x1 image and kernel", "residual", "1x1 kernel")))
def test_the_result_is_a_tensor_of_its_own(target, case):
    tensors = rounded(case.tensors(), torch.float64, target.device)
    y = function_of(case)(**tensors, **case.options)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert y.untyped_storage().data_ptr() not in storages
    assert not y._is_view()


@pytest.mark.cases(both(named("every dimension: one over", "728->728@19 reduced", "everything")))
def test_the_same_call_gives_the_same_bits(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    first, second = (function_of(case)(**tensors, **case.options) for _ in range(2))
    assert torch.equal(first, second)


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


# The backend


@pytest.mark.cases(both(named("plain")))
def test_use_backend_gives_back_what_it_found(case):
    def backend():
        return recorded_backend(case)

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


def recorded_backend(case):
    """The backend that a call made now hands to the op."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is forward_op(case).default:
                names = [argument.name for argument in func._schema.arguments]
                seen.append({**dict(zip(names, args, strict=False)), **(kwargs or {})}["backend"])
            return func(*args, **(kwargs or {}))

    tensors = case.tensors()
    with Record():
        function_of(case)(**tensors)
    (backend,) = seen
    return backend


@pytest.mark.cases(both(named("everything")))
def test_the_reference_backend_gives_what_auto_gives_on_the_cpu(case):
    tensors = case.tensors()
    with fused_sepconv.use_backend("reference"):
        reference = function_of(case)(**tensors, **case.options)
    assert torch.equal(reference, function_of(case)(**tensors, **case.options))


@pytest.mark.parametrize(
    "call",
    (
        "separable_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), torch.zeros(2, 2, 1, 1))",
        "depthwise_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3))",
    ),
)
def test_fused_refuses_what_no_kernel_serves_and_says_why(call):
    """A CPU tensor, in an interpreter that has no emulated kernels."""
    script = f"""
import torch, fused_sepconv
with fused_sepconv.use_backend("fused"):
    fused_sepconv.{call}
"""
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_SEPCONV_NATIVE"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert "fused" in run.stderr.splitlines()[-1] and "cpu" in run.stderr.splitlines()[-1].lower(), run.stderr


# The op


SCHEMAS = {
    "separable_conv2d": [
        ("x", "Tensor"),
        ("depthwise_weight", "Tensor"),
        ("pointwise_weight", "Tensor"),
        ("bias", "Optional[Tensor]"),
        ("depthwise_bias", "Optional[Tensor]"),
        ("residual", "Optional[Tensor]"),
        ("stride", "List[int]"),
        ("padding", "List[int]"),
        ("dilation", "List[int]"),
        ("pre_activation", "Optional[str]"),
        ("mid_activation", "Optional[str]"),
        ("activation", "Optional[str]"),
        ("backend", "str"),
    ],
    "depthwise_conv2d": [
        ("x", "Tensor"),
        ("weight", "Tensor"),
        ("bias", "Optional[Tensor]"),
        ("stride", "List[int]"),
        ("padding", "List[int]"),
        ("dilation", "List[int]"),
        ("pre_activation", "Optional[str]"),
        ("activation", "Optional[str]"),
        ("backend", "str"),
    ],
}


@pytest.mark.parametrize(("operator", "expected"), SCHEMAS.items(), ids=SCHEMAS)
def test_the_op_takes_what_the_contract_says(operator, expected):
    schema = getattr(torch.ops.fused_sepconv, operator).default._schema
    assert [(argument.name, str(argument.type)) for argument in schema.arguments] == expected
    assert "SymInt[2] stride" in str(schema) and "SymInt[4] padding" in str(schema)
    assert "SymInt[2] dilation" in str(schema)
    assert not schema.is_mutable


@pytest.mark.cases(both(named("everything", "four different sides", "batch 0", "relu6 after")))
def test_the_op_called_directly_gives_the_same(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    y = forward_op(case)(*forward_arguments(case, tensors, target.backend))
    assert torch.equal(y, function_of(case)(**tensors, **case.options))
