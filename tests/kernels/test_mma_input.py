"""The tensor-core gradients of x and of the depthwise weight and bias, run on the CPU: right in every case, by the
rules, the same in every order, and reading just what the plan says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv.families.mma import backward as mma_backward
from fused_sepconv.families.mma import backward_input as mma_input
from fused_sepconv.families.mma import launch as mma_launch
from fused_sepconv.ops import launching
from fused_sepconv.ops.problems import ALL_KERNELS
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.problem import Candidate, MmaInputTiling, Problem
from tests.kernels.test_mma_forward import eights
from tests.planning.test_plan import problem
from tests.support.cases import CASES, XCEPTION, Case, depthwise_convolution
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import in_every_schedule, planned_for

SMALL_DEVICE = dataclasses.replace(DEVICES["H200"], name="3 SMs", sms=3)  # so that a block has several tiles
EVERYTHING = (True, True, True)


# Tails in every dimension, paddings that leave x without dT and dT without x, phases that end early, images smaller
# than a row of zeros, more rows than a tile has positions.
OWN = (
    Case("one pixel", 1, 8, 1, 1, 8, depthwise_bias=True),
    Case("a row", 2, 8, 1, 9, 24, depthwise_bias=True),
    Case("a column", 2, 8, 9, 1, 16),
    Case("a vector of channels past 64", 1, 72, 5, 7, 40, pre_activation="relu", depthwise_bias=True),
    Case("a chunk less a vector, three slabs less a vector", 1, 56, 9, 8, 40),
    Case("many small images", 21, 8, 4, 3, 16, pre_activation="relu", depthwise_bias=True),
    Case("several tiles", 1, 16, 33, 31, 16, pre_activation="relu", depthwise_bias=True),
    Case("a wide image", 1, 8, 7, 150, 16, depthwise_bias=True),
    Case("no padding", 2, 16, 8, 9, 16, padding=0, depthwise_bias=True),
    Case("more padding than taps", 1, 8, 6, 5, 16, padding=((4, 3), (2, 5)), depthwise_bias=True),
    Case("padding on one side", 2, 8, 9, 7, 16, padding=((2, 0), (0, 2)), pre_activation="relu", depthwise_bias=True),
    Case("padding on the other", 2, 8, 9, 7, 16, padding=((0, 2), (2, 0)), depthwise_bias=True),
    Case("dilation", 1, 8, 13, 11, 16, padding=(2, 3), dilation=(2, 3), pre_activation="relu", depthwise_bias=True),
    Case("dilation past the image", 1, 8, 5, 6, 8, padding=4, dilation=4, depthwise_bias=True),
    Case("dilation and odd padding", 2, 8, 12, 9, 16, padding=((1, 5), (3, 0)), dilation=(3, 2), depthwise_bias=True),
    Case("strips", 1, 8, 15, 52, 24, padding=((0, 3), (4, 1)), pre_activation="relu", depthwise_bias=True),
    *(
        Case(f"pre-activation {name}", 1, 16, 7, 6, 16, pre_activation=name, depthwise_bias=True)
        for name in ("relu6", "elu", "silu", "hardswish", "gelu")
    ),
)


def served(case: Case) -> bool:
    if case.dilation == 12:
        return False  # PyTorch 2.13 by itself crashes in this backward, now and then
    return (case.kernel, case.stride, case.multiplier, case.mid_activation) == (3, 1, 1, None) and case.N is not None


SERVED = (*(eights(case) for case in CASES if served(case) and case.N and case not in XCEPTION), *OWN)


def planned(case: Case, dtype: torch.dtype, device=SMALL_DEVICE) -> tuple[Problem, Candidate]:
    """The problem, and the step in the cut that the plan chooses."""
    whole = dataclasses.replace(problem(case, "backward", dtype), layout="nhwc", aligned=True)
    return whole, mma_input.step(whole, device, ALL_KERNELS)


def cuts(case: Case, dtype: torch.dtype) -> Iterator[Candidate]:
    """The planned cut, and with fewer stages itself, the one with the most strips, and the one with the most parts."""
    whole, candidate = planned(case, dtype)
    yield candidate
    found = mma_input.cuts(whole, SMALL_DEVICE)
    others = (found[0], max(found, key=lambda cut: cut.strips), max(found, key=lambda cut: cut.parts))
    for stages, cut in zip((2, 3, 4), others, strict=True):
        cut = dataclasses.replace(cut, stages=stages)
        tiling = MmaInputTiling(cut.strips, cut.part, cut.parts, cut.stages)
        yield dataclasses.replace(candidate, tiling=tiling, shared_bytes=cut.shared_bytes)


def inputs(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The case's tensors, and a gradient of the pointwise convolution's result."""
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors().items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    noise = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return tensors, noise.to(dtype).contiguous(memory_format=torch.channels_last)


def ours(case: Case, dtype: torch.dtype, candidate: Candidate, mask: tuple = EVERYTHING) -> list[Tensor | None]:
    tensors, grad_z = inputs(case, dtype)
    return run(case, tensors, grad_z, candidate, mask)


def run(case: Case, tensors: dict, grad_z: Tensor, candidate: Candidate, mask: tuple) -> list[Tensor | None]:
    whole, _ = planned(case, grad_z.dtype)
    mask = (*mask[:2], mask[2] and case.depthwise_bias)
    everything = tuple(tensors.get(name) for name in case.inputs)
    return list(mma_launch.InputGradients(candidate, whole, everything, mask)(grad_z, everything))


def theirs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The same of PyTorch's own operators: a product, and the depthwise convolution's backward."""
    tensors, grad_z = inputs(case, dtype)
    grad_t = torch.einsum("nfhw,fk->nkhw", grad_z, tensors["pointwise_weight"].flatten(1))
    names = ("x", "depthwise_weight", "depthwise_bias")
    leaves = [tensors[name].detach().requires_grad_() for name in names if name in tensors]
    options = {name: case.options[name] for name in ("stride", "padding", "dilation", "pre_activation")}
    return list(torch.autograd.grad(depthwise_convolution(*leaves, **options), leaves, grad_t))


def assert_right(case: Case, dtype: torch.dtype, results: list[Tensor | None]) -> None:
    eager, exact = theirs(case, dtype), theirs(case, torch.float64)
    found = [result for result in results if result is not None]
    for name, mine, other, right in zip(("x", "depthwise_weight", "depthwise_bias"), found, eager, exact, strict=False):
        close = assert_as_close_as_eager if name == "x" else assert_gradient_as_close_as_eager
        close(mine, other, right, name=f"{case}: the gradient of {name}")


@pytest.mark.checked_on(OWN)
@pytest.mark.cases(SERVED)
def test_the_gradients_are_as_close_as_eagers_in_every_cut(native, case):
    for candidate in cuts(case, torch.bfloat16):
        assert_right(case, torch.bfloat16, ours(case, torch.bfloat16, candidate))


@pytest.mark.cases(OWN)
def test_and_in_float16(plain, case):
    assert_right(case, torch.float16, ours(case, torch.float16, planned(case, torch.float16)[1]))


@pytest.mark.checked_on(OWN[3:-5])
@pytest.mark.cases(OWN)
def test_every_schedule_gives_the_same_bits(native, case):
    for candidate in itertools.islice(cuts(case, torch.bfloat16), 2):
        in_every_schedule(native, lambda candidate=candidate: ours(case, torch.bfloat16, candidate))


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_a_gradient_is_the_same_when_it_is_the_only_one_asked_for(native, mask):
    case = next(case for case in OWN if case.name == "several tiles")
    _, candidate = planned(case, torch.bfloat16)
    everything, alone = ours(case, torch.bfloat16, candidate), ours(case, torch.bfloat16, candidate, mask)
    for wanted, one, of_all in zip(mask, alone, everything, strict=True):
        assert torch.equal(one, of_all) if wanted else one is None


def test_an_empty_batch_has_no_gradient(plain):
    case = Case("empty", 0, 8, 5, 5, 8, depthwise_bias=True)
    grad_x, *sums = ours(case, torch.bfloat16, planned(case, torch.bfloat16)[1])
    assert grad_x.shape == (0, 8, 5, 5)
    assert all(not total.any() for total in sums)


@pytest.mark.quick
def test_every_instance_is_executed(plain):
    plain.reset_counters()
    for dtype in (torch.bfloat16, torch.float16):
        ours(OWN[0], dtype, planned(OWN[0], dtype)[1])
    assert set(mma_input.INSTANCES) <= set(plain.executed())


def test_what_the_kernel_can_not_read_is_copied(native):
    case = next(case for case in OWN if case.name == "a row")
    _, candidate = planned(case, torch.float16)
    tensors, grad_z = inputs(case, torch.float16)
    expected = run(case, tensors, grad_z, candidate, EVERYTHING)
    weight = tensors["pointwise_weight"]
    storage = torch.zeros(weight.numel() + 1, dtype=weight.dtype)
    gaps = torch.zeros(2, 1, 9, 24, dtype=torch.float16).permute(0, 3, 1, 2)[:, :8]
    others = [
        (tensors, grad_z.contiguous()),  # NCHW
        ({**tensors, "pointwise_weight": storage.as_strided(weight.shape, weight.stride(), 1).copy_(weight)}, grad_z),
        ({**tensors, "x": gaps.copy_(tensors["x"])}, grad_z),
    ]
    for changed, gradient in others:
        found = run(case, changed, gradient, candidate, EVERYTHING)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_nan_and_infinity_pass_where_relus_do(native):
    case = Case("relu", 1, 8, 5, 4, 8, pre_activation="relu")
    tensors, grad_z = inputs(case, torch.bfloat16)
    tensors["x"][0, 0, 1, 1] = math.nan
    tensors["x"][0, 1, 2, 2] = math.inf
    tensors["x"][0, 2, 3, 3] = -math.inf
    grad_z[0, 0, 0, 0] = math.nan
    grad_x, _, _ = run(case, tensors, grad_z, planned(case, torch.bfloat16)[1], EVERYTHING)
    clean, right = inputs(case, torch.bfloat16)
    right = run(case, clean, right, planned(case, torch.bfloat16)[1], EVERYTHING)[0]
    reached = torch.zeros(5, 4, dtype=torch.bool)
    reached[:2, :2] = True  # from the pixel of grad_z that is NaN
    passes = ~(tensors["x"] <= 0)
    assert torch.equal(grad_x.isnan(), passes & reached)
    changed = (tensors["x"] != clean["x"]) | reached
    assert torch.equal(grad_x[~changed], right[~changed])


LAYERS = tuple({case.H: dataclasses.replace(case, N=1) for case in XCEPTION}.values())


@pytest.mark.cases([case for case in LAYERS if case.H < 40], full=LAYERS)
def test_a_layer_reads_and_writes_what_the_plan_says(checked, case):
    """Of each size of images. One chunk of channels and a vector of the next, and few features: the rest would be the
    same once more."""
    case = dataclasses.replace(case, C=72, F=40)
    _, candidate = planned(case, torch.bfloat16)
    checked.reset_counters()
    grad_x, *_ = ours(case, torch.bfloat16, candidate)
    counters = checked.counters()
    read = {name: n for name, n in counters["bytes_read"].items() if n and name != "partials"}
    written = {name: n for name, n in counters["bytes_written"].items() if n and name != "out"}
    assert set(written) == {"grad_x", "partial_weight"}  # nothing of the gradient between the convolutions
    assert read["x"] == written["grad_x"] == grad_x.numel() * 2
    assert sum(read.values()) + sum(written.values()) == candidate.requested_bytes
    assert counters["shared_bytes"][candidate.name] == candidate.shared_bytes
    print(f"{case}: {candidate.note}; grad_z is read {read['grad_z'] / 2 / (case.F * case.H * case.W * 2):.3f} times")


@pytest.mark.cases(XCEPTION)
def test_at_batch_64_little_is_computed_or_read_twice(case):
    whole = dataclasses.replace(
        problem(case, "backward", torch.bfloat16), N=64, layout="nhwc", aligned=True, residual=False
    )
    for name in ("A100", "H200"):
        candidate = mma_input.step(whole, DEVICES[name], ALL_KERNELS)
        floor = whole.y_bytes + 2 * whole.x_bytes
        assert floor <= candidate.bytes <= 1.15 * floor


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": "float32"}, "float16 and bfloat16"),
        ({"kernel": (5, 5)}, "3x3"),
        ({"stride": (2, 2)}, "stride 1"),
        ({"multiplier": 2}, "depth multiplier"),
        ({"mid_activation": "relu"}, "mid-activation"),
        ({"C": 12}, "12 channels of x"),
        ({"F": 20}, "20 channels of y"),
        ({"aligned": False}, "aligned"),
        ({"N": 2**27}, "32-bit offsets"),
    ],
    ids=str,
)
def test_what_can_not_run_has_its_reason(change, reason):
    whole, _ = planned(OWN[5], torch.bfloat16)
    assert not mma_input.step(whole, DEVICES["H200"], ALL_KERNELS).refusal
    refused = mma_input.step(dataclasses.replace(whole, **change), DEVICES["H200"], ALL_KERNELS)
    assert reason in refused.refusal


# The whole backward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_backward_runs_it_and_writes_nothing_between_the_convolutions(checked, activation):
    case = dataclasses.replace(OWN[5], activation=activation)
    whole, _ = planned(case, torch.bfloat16)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(case, torch.bfloat16)[0].items()}
    with launching.preferring("mma"), planned_for(3):
        y = fused_sepconv.separable_conv2d(**tensors, **case.options)
        checked.reset_counters()
        found = torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))
    ran = checked.executed()
    assert ran["mma_backward_input_3x3_bfloat16"] == 1
    assert not any(name.startswith(("depthwise", "simt")) for name in ran)
    written = {name for name, count in checked.counters()["bytes_written"].items() if count}
    assert written == {"grad_x", "partial_weight", "partial_bias", "out"}
    grad_z = torch.ones_like(y) if activation is None else (y > 0).to(y.dtype)
    expected = run(case, tensors, grad_z, mma_input.step(whole, SMALL_DEVICE, ALL_KERNELS), EVERYTHING)
    assert torch.equal(found[0], expected[0])
    for mine, other in zip(found[1::2], expected[1:], strict=True):  # between them the pointwise weight
        torch.testing.assert_close(mine, other)


def test_the_plan_has_both_ways_to_x_and_says_why_not():
    call = planned(OWN[5], torch.bfloat16)[0]
    fused, unfused = mma_backward.candidates(call, DEVICES["H200"], ALL_KERNELS)
    assert fused.steps[-1].name in mma_input.INSTANCES
    assert unfused.steps[-1].name not in mma_input.INSTANCES
    assert fused.bytes < unfused.bytes  # by the gradient between the convolutions, out and in again
    (unfused,) = mma_backward.candidates(
        dataclasses.replace(call, stride=(2, 2), out_h=2, out_w=2), DEVICES["H200"], ALL_KERNELS
    )
    assert "is for stride 1" in unfused.note
