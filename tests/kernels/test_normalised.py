"""The depthwise kernels for a normalised tensor, run on the CPU: right, race-free, and no byte read twice."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_sepconv.families.depthwise import nchw, nhwc, normalised
from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.ops import launching
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.problem import NhwcTiling
from tests.accuracy import LAYOUTS, results
from tests.support.cases import ACTIVATIONS, NormalisedCase
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import in_every_schedule, planned_for
from tests.support.normalised import normalised_depthwise, planned, problem_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case(name: str, N: int, C: int, H: int, W: int, **options: object) -> NormalisedCase:
    return NormalisedCase(name, N, C, H, W, C, **options)


# Channels are whole pieces of 16 bytes in every dtype, and in one case more than a chunk.
CASES = (
    case("relu", 2, 72, 9, 14, pre_activation="relu"),
    case("relu, bias, several strips", 1, 8, 11, 46, bias=True, pre_activation="relu"),
    case("no activation", 2, 16, 7, 5, bias=True),
    case("smooth activation", 1, 24, 8, 9, bias=True, pre_activation="silu"),
    case("stride 2", 2, 16, 9, 11, stride=2, bias=True, pre_activation="relu"),
    case("stride 2, rows that no output reads", 1, 8, 8, 12, stride=2, padding=0, pre_activation="relu"),
    case("no padding", 3, 8, 6, 7, padding=0, pre_activation="relu"),
    case("more padding", 1, 8, 5, 6, padding=2, bias=True, pre_activation="relu"),
    case("uneven padding", 1, 8, 6, 5, padding=((0, 2), (1, 0)), bias=True),
    case("5x5", 1, 40, 7, 10, kernel=5, padding=2, bias=True, pre_activation="relu"),
    case("5x5, stride 2", 2, 8, 9, 10, kernel=5, stride=2, padding=1, pre_activation="gelu"),
    case("one pixel", 2, 8, 1, 1, bias=True),
    case("many small images", 40, 8, 3, 3, pre_activation="relu"),
    case("one row", 2, 8, 1, 9, pre_activation="relu6"),
    case("dilation", 1, 16, 9, 8, padding=2, dilation=2, pre_activation="relu"),  # in NHWC alone
)
CHECKED = tuple(each for each in CASES if each.name in ("no activation", "stride 2", "more padding", "one pixel"))
EVERY_ACTIVATION = tuple(case(f"{name}", 1, 8, 6, 5, bias=True, pre_activation=name) for name in ACTIVATIONS)


def inputs(case: NormalisedCase, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors().items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=LAYOUTS[layout])
    return tensors


def in_layout(case: NormalisedCase, layout: str) -> bool:
    return layout == "nhwc" or case.dilation == 1


@pytest.mark.parametrize(
    "sms, widest",
    [
        pytest.param(132, False, id="many blocks"),
        pytest.param(3, False, id="few", marks=pytest.mark.full),
        pytest.param(1, True, id="wide"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.checked_on(CHECKED)
@pytest.mark.cases((*CASES, *EVERY_ACTIVATION), quick=CASES[:1])
def test_every_schedule_gives_the_same_bits_and_the_right_ones(native, case, layout, sms, widest):
    if not in_layout(case, layout):
        assert normalised_refusal(case, layout)
        return
    tensors = inputs(case, torch.float32, layout)
    with planned_for(sms, widest):
        mine = in_every_schedule(native, lambda: results(normalised_depthwise, tensors, case, torch.float32).values())
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    right = results(case.definition, exact, case, torch.float32)
    for name, one in zip(right, mine, strict=True):
        assert_close(one, right[name], name)


def assert_close(mine: Tensor, right: Tensor, name: str) -> None:
    message = functools.partial("{}: {}".format, name)
    torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=4e-6 * float(right.abs().max()), msg=message)


def normalised_refusal(case: NormalisedCase, layout: str) -> str | None:
    tensors = inputs(case, torch.float32, layout)
    options = {name: case.options[name] for name in ("stride", "padding", "dilation", "pre_activation")}
    problem = problem_of(tensors["x"], tensors["weight"], **options)
    return normalised.supports(problem, *launching.device_and_kernels(torch.device("cpu")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.dtypes(*DTYPES)
@pytest.mark.cases(CASES)
def test_as_close_as_eager_in_every_dtype(plain, case, dtype, layout):
    if not in_layout(case, layout):
        return
    tensors = inputs(case, dtype, layout)
    eager = results(case.definition, tensors, case, dtype)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    oracle = results(case.definition, exact, case, dtype)
    with planned_for(3):
        ours = results(normalised_depthwise, tensors, case, dtype)
    for name, mine in ours.items():
        check = assert_as_close_as_eager if name == "y" else assert_gradient_as_close_as_eager
        check(mine, eager[name], oracle[name], name=name)


@pytest.mark.quick
def test_every_instance_is_executed(native):
    native.reset_counters()
    for kernel in depthwise.NORMALISED_KERNELS:
        for stride in (1, 2):
            small = case("one", 1, 8, 5, 5, kernel=kernel, padding=kernel // 2, stride=stride, pre_activation="relu")
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    results(normalised_depthwise, inputs(small, dtype, layout), small, dtype)
    assert {name for name in depthwise.INSTANCES if "normalised" in name} <= set(native.executed())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", None, "silu"])
def test_the_second_sum_is_taken_around_the_mean(plain, layout, activation):
    """x lies 300 standard deviations from zero: the sum of dz * x less mean * sum(dz) would keep two digits."""
    far = case("far", 3, 8, 21, 20, pre_activation=activation)
    tensors = inputs(far, torch.float32, layout)
    x, scale, weight = tensors["x"] + 300, tensors["scale"], tensors["weight"]
    mean = x.double().mean((0, 2, 3))
    shift = (tensors["shift"] - scale * mean).float()
    problem = replace(problem_of(x, weight, 1, 1, 1, activation), direction="backward")
    grad_t = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=LAYOUTS[layout])
    run = normalised.Backward(planned(problem, x), problem, x, weight, None, (False, False))
    grad_weight, grad_bias, dz, sum_dz, sum_dz_xmu = run(grad_t, x, scale, shift, mean.float(), weight)
    assert grad_weight is None and grad_bias is None
    assert dz.stride() == x.stride() and sum_dz.dtype == sum_dz_xmu.dtype == torch.float32
    around = x.double() - mean.float().double().view(-1, 1, 1)
    right = dz.double().sum((0, 2, 3)), (dz.double() * around).sum((0, 2, 3))
    for mine, exact in zip((sum_dz, sum_dz_xmu), right, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_pass_where_they_do_in_pytorch(plain, layout):
    one = case("nan", 1, 8, 6, 6, pre_activation="relu")
    tensors = inputs(one, torch.bfloat16, layout)
    tensors["x"][0, 2, 3, 3], tensors["x"][0, 0, 1, 4] = torch.nan, torch.inf
    ours = normalised_depthwise(**tensors, **one.options)
    right = one.definition(**tensors, **one.options)
    assert right.isnan().any() and torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_0_has_sums_of_0(plain, layout):
    empty = replace(CASES[1], N=0)
    tensors = inputs(empty, torch.float32, layout)
    ours = results(normalised_depthwise, tensors, empty, torch.float32)
    for name, right in results(empty.definition, tensors, empty, torch.float32).items():
        assert ours[name].shape == right.shape and not ours[name].nan_to_num(1.0 if name == "y" else 0.0).any()


def test_a_gradient_of_another_layout_is_read_right(native):
    tensors = inputs(CASES[0], torch.float32, "nhwc")
    x, scale, shift, weight = (tensors[name] for name in ("x", "scale", "shift", "weight"))
    problem = replace(problem_of(x, weight, 1, 1, 1, "relu"), direction="backward")
    run = normalised.Backward(planned(problem, x), problem, x, weight, None, (True, False))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    mean = torch.zeros(x.shape[1])
    first, second = (
        run(each, x, scale, shift, mean, weight) for each in (grad, grad.contiguous(memory_format=torch.channels_last))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


@pytest.mark.parametrize(
    "options, layout, reason",
    [
        ({"kernel": 7, "padding": 3}, "nhwc", "3x3 and 5x5"),
        ({"kernel": (3, 5)}, "nhwc", "not 3x5"),
        ({"multiplier": 2}, "nhwc", "depth multiplier"),
        ({"stride": 3}, "nchw", "stride 1 and 2"),
        ({"stride": 2, "dilation": 2, "padding": 2}, "nhwc", "share no factor"),
        ({"dilation": 2, "padding": 2}, "nchw", "no dilation"),
        ({"C": 6, "F": 6}, "nhwc", "16 bytes"),
    ],
)
def test_what_does_not_run_is_refused_with_its_reason(plain, options, layout, reason):
    small = replace(case("small", 1, 8, 9, 9), **options)
    assert reason in normalised_refusal(small, layout)
    assert normalised_refusal(case("small", 1, 8, 9, 9), layout) is None


def test_a_result_with_an_activation_and_float64_are_refused(plain):
    x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(8, 1, 3, 3)
    here = launching.device_and_kernels(torch.device("cpu"))
    activated = replace(problem_of(x, weight, 1, 1, 1, None), mid_activation="relu")
    assert "activation of the result" in normalised.supports(activated, *here)
    double = problem_of(x.double(), weight.double(), 1, 1, 1, None)
    assert "float64" in normalised.supports(double, *here)


# ---- bytes


IMAGES = ("x", "y", "grad_output", "grad_x")


@pytest.mark.parametrize("sms", [132, 2])
@pytest.mark.cases(CASES)
def test_the_plan_knows_the_bytes_to_the_last(checked, case, sms):
    """And where the cut is the same they are those of the kernel that takes x as it is."""
    tensors = inputs(case, torch.bfloat16, "nhwc")
    x, weight = tensors["x"], tensors["weight"]
    problem = problem_of(x, weight, case.stride, case.padding, case.dilation, case.pre_activation)
    with planned_for(sms):
        for direction in ("forward", "backward"):
            directed = replace(problem, direction=direction, normalised=True)
            candidate = planned(directed, x)
            if not isinstance(candidate.tiling, NhwcTiling):  # one pixel is NCHW as much as NHWC
                continue
            cut = nhwc.Cut(directed, traits_of(candidate.name), candidate.tiling)
            expected = cut.bytes_by_tensor()
            counted = run_counted(checked, directed, candidate, tensors)
            assert {name: expected.get(name, 0) for name in IMAGES} == {name: counted[name] for name in IMAGES}
            assert candidate.bytes == sum(expected.values())
            once = candidate.tiling.parts * case.C * 4
            means = candidate.tiling.warps if direction == "backward" else 0  # each warp reads it
            assert (counted["scale"], counted["shift"], counted["mean"]) == (once, once, means * once)
            plain_problem = replace(directed, normalised=False)
            plain_traits = replace(cut.traits, normalised=False)
            plain = nhwc.Cut(plain_problem, plain_traits, candidate.tiling).bytes_by_tensor()
            assert {name: plain.get(name, 0) for name in IMAGES} == {name: expected.get(name, 0) for name in IMAGES}


def traits_of(name: str) -> nhwc.Traits | nchw.NchwTraits:
    return next(traits for traits in (*depthwise.ALL_TRAITS, *depthwise.PLANE_TRAITS) if traits.name == name)


def run_counted(native, problem, candidate, tensors) -> dict[str, int]:
    x, scale, shift, weight = (tensors[name] for name in ("x", "scale", "shift", "weight"))
    scale, shift, mean = scale.float(), shift.float(), torch.zeros(x.shape[1])
    native.reset_counters()
    if problem.direction == "forward":
        normalised.Forward(candidate, problem, x)(x, scale, shift, weight, None)
    else:
        grad = torch.zeros(problem.N, problem.K, problem.out_h, problem.out_w, dtype=x.dtype)
        grad = grad.contiguous(memory_format=LAYOUTS[problem.layout])
        run = normalised.Backward(candidate, problem, x, weight, None, (True, False))
        run(grad, x, scale, shift, mean, weight)
    counters = native.counters()
    names = (*IMAGES, "scale", "shift", "mean")
    return {name: counters["bytes_read"].get(name, 0) + counters["bytes_written"].get(name, 0) for name in names}


def test_a_middle_flow_layer_moves_no_more_images_than_the_plain_kernels_do():
    """728 channels at 19x19, batch 64, bfloat16, as planned for an H200."""
    x = torch.empty(64, 728, 19, 19, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(728, 1, 3, 3, dtype=torch.bfloat16, device="meta")
    for direction, passes in (("forward", 2), ("backward", 3)):
        plain = replace(problem_of(x, weight, 1, 1, 1, "relu"), direction=direction, aligned=True, layout="nhwc")
        ours = replace(plain, normalised=True)
        kernels = launching.Kernels(frozenset(depthwise.INSTANCES))
        found, before = (depthwise.best(each, DEVICES["H200"], kernels).bytes for each in (ours, plain))
        assert found < 1.02 * before and found < 1.15 * passes * plain.x_bytes
