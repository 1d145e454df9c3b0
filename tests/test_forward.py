"""The forward is the definition: act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual)."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import fused_sepconv
from fused_sepconv import separable_conv2d
from tests.cases import (
    CASES,
    SMALL,
    TAILS,
    XCEPTION,
    XCEPTION_REDUCED,
    Case,
    four_sides,
    named,
    pair,
    same_padding,
    two_convolutions,
)
from tests.closeness import assert_as_close_as_eager


def rounded(tensors, dtype, device="cpu"):
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}


def check_forward(tensors, options, target, dtype):
    """Ours against eager PyTorch in ``dtype`` on the target, and both against the oracle of the same rounded inputs."""
    inputs = rounded(tensors, dtype, target.device)
    ours = separable_conv2d(**inputs, **options)
    eager = two_convolutions(**inputs, **options)
    oracle = two_convolutions(**rounded(inputs, torch.float64), **options)
    assert_as_close_as_eager(ours, eager, oracle)


@pytest.mark.cases(CASES)
def test_every_case_is_as_close_to_the_oracle_as_eager(target, dtype, case):
    check_forward(case.tensors(), case.options, target, dtype)


@pytest.mark.cases((*SMALL, *TAILS, *XCEPTION_REDUCED))
def test_the_reference_is_the_definition(case):
    tensors = case.tensors()
    expected = two_convolutions(**tensors, **case.options)
    actual = fused_sepconv.reference.separable_conv2d(**tensors, **case.options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def by_hand(case, tensors):
    """One image of the definition, from loops and numbers alone (no activations but relu)."""
    relu = {None: lambda v: v, "relu": lambda v: max(v, 0.0)}
    pre, mid, post = relu[case.pre_activation], relu[case.mid_activation], relu[case.activation]
    a = {name: tensor.numpy() for name, tensor in tensors.items()}
    x = a["x"]
    (kh, kw), (sh, sw), (dh, dw) = pair(case.kernel), pair(case.stride), pair(case.dilation)
    top, _, left, _ = four_sides(case.padding, (case.H, case.W), (kh, kw), (sh, sw), (dh, dw))
    y = np.zeros(case.output_shape)
    for n in range(case.N):
        for p in range(case.output_size[0]):
            for q in range(case.output_size[1]):
                between = np.zeros(case.K)
                for k in range(case.K):
                    for i in range(kh):
                        for j in range(kw):
                            h, w = p * sh + i * dh - top, q * sw + j * dw - left
                            if 0 <= h < case.H and 0 <= w < case.W:
                                channel = k // case.multiplier
                                between[k] += pre(x[n, channel, h, w]) * a["depthwise_weight"][k, 0, i, j]
                    between[k] = mid(between[k] + (a["depthwise_bias"][k] if case.depthwise_bias else 0.0))
                for f in range(case.F):
                    value = float(a["pointwise_weight"][f, :, 0, 0] @ between)
                    value += a["bias"][f] if case.bias else 0.0
                    value += a["residual"][n, f, p, q] if case.residual else 0.0
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


@pytest.mark.cases(BY_HAND)
def test_the_definition_and_ours_are_what_loops_over_numbers_give(target, case):
    tensors = case.tensors()
    expected = by_hand(case, tensors)
    torch.testing.assert_close(two_convolutions(**tensors, **case.options), expected, rtol=1e-12, atol=1e-12)
    ours = separable_conv2d(**rounded(tensors, torch.float64, target.device), **case.options)
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("kernel", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("dilation", (1, 2))
@pytest.mark.parametrize("stride", (1, 2, 3, 4))
def test_same_padding_is_tensorflows_for_every_size(stride, dilation, kernel):
    depthwise_weight = torch.randn(2, 1, kernel, kernel, dtype=torch.float64)
    pointwise_weight = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    for height, width in ((1, 2), (3, 4), (5, 6), (7, 8), (10, 9)):
        x = torch.randn(1, 2, height, width, dtype=torch.float64)
        y = separable_conv2d(x, depthwise_weight, pointwise_weight, None, stride, "same", dilation)
        assert y.shape == (1, 3, math.ceil(height / stride), math.ceil(width / stride))
        sides = (same_padding(height, kernel, stride, dilation), same_padding(width, kernel, stride, dilation))
        explicit = separable_conv2d(x, depthwise_weight, pointwise_weight, None, stride, sides, dilation)
        assert torch.equal(y, explicit)


@pytest.mark.parametrize("kernel", (1, 2, 3, 4, (2, 5)))
@pytest.mark.parametrize("dilation", (1, 2, 3))
def test_same_padding_is_pytorchs_where_the_stride_is_1(kernel, dilation):
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
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
def test_the_forms_of_padding_say_the_same(forms):
    tensors = named("plain")[0].tensors()
    first, *others = [separable_conv2d(**tensors, padding=form) for form in forms]
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("option", ("stride", "dilation"))
def test_one_number_stands_for_two(option):
    tensors = named("odd sizes")[0].tensors()
    for number in (1, 2):
        expected = two_convolutions(**tensors, padding=2, **{option: number})
        for form in (number, (number, number), [number, number], torch.Size((number, number))):
            actual = separable_conv2d(**tensors, padding=2, **{option: form})
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_every_side_pads_its_own_side():
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    depthwise_weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    pointwise_weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = separable_conv2d(x, depthwise_weight, pointwise_weight, padding=((1, 2), (3, 0)))
    expected = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    expected[0, 0, 1:3, 3:5] = 1
    assert torch.equal(y, expected)


def test_the_arguments_have_the_order_that_the_contract_gives_them():
    tensors = named("everything")[0].tensors()
    by_name = two_convolutions(
        tensors["x"], tensors["depthwise_weight"], tensors["pointwise_weight"], bias=tensors["bias"], stride=2,
        padding=(1, 2), dilation=(2, 1),
    )  # fmt: skip
    in_order = separable_conv2d(
        tensors["x"], tensors["depthwise_weight"], tensors["pointwise_weight"], tensors["bias"], 2, (1, 2), (2, 1)
    )
    torch.testing.assert_close(in_order, by_name, rtol=1e-12, atol=1e-12)


def test_what_the_contract_makes_keyword_only_is_keyword_only():
    tensors = named("plain")[0].tensors()
    with pytest.raises(TypeError):
        separable_conv2d(*tensors.values(), None, 1, 0, 1, None)


def test_the_defaults_are_no_padding_stride_1_and_nothing_else():
    tensors = named("plain")[0].tensors()
    expected = torch.conv2d(tensors["x"], tensors["depthwise_weight"], groups=3)
    expected = torch.conv2d(expected, tensors["pointwise_weight"])
    torch.testing.assert_close(separable_conv2d(**tensors), expected, rtol=1e-12, atol=1e-12)


def test_parameters_are_accepted_for_tensors():
    tensors = named("all six tensors")[0].tensors()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    y = separable_conv2d(**parameters, padding=1)
    torch.testing.assert_close(y, two_convolutions(**tensors, padding=1), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.cases(named("everything", "every dimension: one over", "unbatched, everything"))
def test_strides_and_offsets_do_not_change_the_result(target, dtype, case, make):
    tensors = rounded(case.tensors(), dtype, target.device)
    made = {name: MAKES[make](tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(made[name], tensor)
    check = {name: tensor.to("cpu", torch.float64) for name, tensor in tensors.items()}
    ours = separable_conv2d(**made, **case.options)
    eager = two_convolutions(**tensors, **case.options)
    assert_as_close_as_eager(ours, eager, two_convolutions(**check, **case.options))


def test_expanded_inputs_are_read_as_what_they_say(target):
    case = Case("expanded", 3, 4, 5, 5, 6, padding=1)
    tensors = rounded(case.tensors(), torch.float64, target.device)
    tensors["x"] = tensors["x"][:1, :1, :, :1].expand(3, 4, 5, 5)
    tensors["residual"] = torch.ones(1, dtype=torch.float64, device=target.device).expand(3, 6, 5, 5)
    ours = separable_conv2d(**tensors, **case.options)
    expected = two_convolutions(**{name: t.contiguous() for name, t in tensors.items()}, **case.options)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.cases(named("everything", "1x1 image and kernel", "relu thrice", "silu after", "elu after", "batch 0"))
def test_the_inputs_stay_as_they_were(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    separable_conv2d(**tensors, **case.options)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor._version == versions[name], name


@pytest.mark.cases(named("1x1 image and kernel", "residual", "1x1 kernel"))
def test_the_result_is_a_tensor_of_its_own(target, case):
    tensors = rounded(case.tensors(), torch.float64, target.device)
    y = separable_conv2d(**tensors, **case.options)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert y.untyped_storage().data_ptr() not in storages
    assert not y._is_view()


@pytest.mark.cases(named("every dimension: one over", "728->728@19 reduced", "everything"))
def test_the_same_call_gives_the_same_bits(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    first, second = (separable_conv2d(**tensors, **case.options) for _ in range(2))
    assert torch.equal(first, second)


def test_images_of_a_batch_do_not_see_each_other(target):
    case = Case("independent", 4, 5, 6, 7, 6, padding=1)
    tensors = rounded(case.tensors(), torch.float64, target.device)
    together = separable_conv2d(**tensors, **case.options)
    for n in range(4):
        alone = separable_conv2d(**{**tensors, "x": tensors["x"][n]}, **case.options)
        torch.testing.assert_close(together[n], alone, rtol=1e-12, atol=1e-12)
    tensors["x"][2] = float("nan")
    others = separable_conv2d(**tensors, **case.options)[[0, 1, 3]]
    torch.testing.assert_close(others, together[[0, 1, 3]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("activation", (None, "relu", "elu"))
def test_what_is_not_finite_reaches_every_output_that_sees_it_and_no_other(target, activation, value):
    case = Case("not finite", 1, 2, 9, 9, 3, padding=1, pre_activation=activation, activation=activation)
    tensors = {name: t.abs() for name, t in rounded(case.tensors(), torch.float32, target.device).items()}
    tensors["x"][0, 1, 4, 6] = value
    y = separable_conv2d(**tensors, **case.options)
    expected = torch.zeros(9, 9, dtype=torch.bool, device=target.device)
    expected[3:6, 5:8] = True
    assert torch.equal(~torch.isfinite(y), expected.expand(1, 3, 9, 9))


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


def test_use_backend_gives_back_what_it_found():
    backend = recorded_backend
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


def recorded_backend():
    """The backend that a call made now hands to the op."""
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.fused_sepconv.separable_conv2d.default:
                names = [argument.name for argument in func._schema.arguments]
                seen.append({**dict(zip(names, args, strict=False)), **(kwargs or {})}["backend"])
            return func(*args, **(kwargs or {}))

    tensors = named("plain")[0].tensors()
    with Record():
        separable_conv2d(**tensors)
    (backend,) = seen
    return backend


def test_the_reference_backend_gives_what_auto_gives_on_the_cpu():
    case = named("everything")[0]
    tensors = case.tensors()
    with fused_sepconv.use_backend("reference"):
        reference = separable_conv2d(**tensors, **case.options)
    assert torch.equal(reference, separable_conv2d(**tensors, **case.options))


def test_fused_refuses_what_no_kernel_serves_and_says_why():
    """A CPU tensor, in an interpreter that has no emulated kernels."""
    script = """
import torch, fused_sepconv
with fused_sepconv.use_backend("fused"):
    fused_sepconv.separable_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), torch.zeros(2, 2, 1, 1))
"""
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_SEPCONV_NATIVE"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert "fused" in run.stderr.splitlines()[-1] and "cpu" in run.stderr.splitlines()[-1].lower(), run.stderr


# The op


def test_the_op_takes_what_the_contract_says():
    schema = torch.ops.fused_sepconv.separable_conv2d.default._schema
    assert [(argument.name, str(argument.type)) for argument in schema.arguments] == [
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
    ]
    assert "SymInt[2] stride" in str(schema) and "SymInt[4] padding" in str(schema)
    assert "SymInt[2] dilation" in str(schema)
    assert not schema.is_mutable


@pytest.mark.cases(named("everything", "four different sides", "batch 0", "relu6 after"))
def test_the_op_called_directly_gives_the_same(target, dtype, case):
    tensors = rounded(case.tensors(), dtype, target.device)
    kernel, stride, dilation = pair(case.kernel), pair(case.stride), pair(case.dilation)
    sides = four_sides(case.padding, (case.H, case.W), kernel, stride, dilation)
    y = torch.ops.fused_sepconv.separable_conv2d(
        *(tensors.get(name) for name in ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias")),
        tensors.get("residual"), stride, sides, dilation, case.pre_activation, case.mid_activation, case.activation,
        target.backend,
    )  # fmt: skip
    assert torch.equal(y, separable_conv2d(**tensors, **case.options))
