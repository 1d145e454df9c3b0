"""The tensor-core kernels, run on the CPU: right in every case, by the rules, and reading just what the plan says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_sepconv
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.ops import launching
from fused_sepconv.planning.problem import Candidate
from tests.planning.test_plan import MIDDLE, problem
from tests.support.cases import CASES, SMALL, XCEPTION, Case, two_convolutions
from tests.support.closeness import assert_as_close_as_eager
from tests.support.emulation import emulated_kernels, in_every_schedule, planned_for
from tests.support.tf32 import pointwise_in_tf32

FAMILY = "mma"


def eights(case: Case) -> Case:
    """The case with as many channels as 16-byte accesses need."""
    return dataclasses.replace(case, C=math.ceil(case.C / 8) * 8, F=math.ceil(case.F / 8) * 8)


# What only these kernels have: tiles by halves and quarters, slabs of channels and tiles of features that are just
# filled or have one vector over, more tiles than blocks, every kernel size in both strides.
OWN = (
    Case("a slab of channels, just filled", 1, 32, 5, 7, 16),
    Case("two slabs and a vector", 1, 72, 5, 7, 16, pre_activation="relu", bias=True),
    Case("128 features, and one vector more", 1, 8, 5, 7, 136, bias=True, residual=True, activation="relu"),
    Case("two tiles of features", 2, 16, 9, 9, 256, depthwise_bias=True),
    Case("256 features, and one vector more", 1, 8, 5, 7, 264, bias=True, residual=True, activation="silu"),
    Case("half a slab, and one vector more", 1, 40, 5, 7, 16, mid_activation="silu", depthwise_bias=True),
    Case("more channels than threads", 1, 264, 3, 4, 8, depthwise_bias=True),
    Case("many tiles a block", 9, 40, 21, 30, 16, pre_activation="relu"),
    *(
        Case(f"{k}x{k}, stride {s}", 1, 40, 9, 14, 24, kernel=k, stride=s, padding=k // 2, mid_activation="relu")
        for k in (3, 5, 7)
        for s in (1, 2)
    ),
    Case("more pieces of taps than threads", 1, 8, 6, 7, 8, kernel=9, padding=4, depthwise_bias=True),
    Case("4x2, stride 3", 1, 24, 14, 17, 8, kernel=(4, 2), stride=3, pre_activation="relu"),
    Case("stride 2, dilation 3", 1, 8, 19, 22, 8, stride=2, dilation=3, padding=3),
    Case("stride 2, dilation 4", 1, 8, 19, 22, 8, stride=2, dilation=4, padding=4),
    Case("strides and dilations", 1, 8, 13, 19, 8, padding=((1, 2), (3, 0)), stride=(2, 1), dilation=(3, 4)),
    Case("a row and a column", 2, 8, 9, 11, 8, kernel=(3, 1), padding=((1, 0), (0, 2)), stride=(1, 2)),
    Case("depth multiplier 5", 1, 16, 6, 6, 16, multiplier=5, pre_activation="relu"),
)
SERVED = (*(eights(case) for case in CASES if case.N and case not in XCEPTION and case.H * case.W > 1), *OWN)
LIGHT = tuple(case for case in SERVED if case.multiplications < 400_000)


def in_every_tile(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    """The cases, each with every shape of tiles that its kernel is compiled for."""
    kinds = {case: mma_forward.kind_of(problem(case, "forward", torch.bfloat16)) for case in cases}
    return pytest.mark.parametrize(
        "served, tile",
        [
            pytest.param(case, tile, id=f"{case.name}-{tile}")
            for case in cases
            for tile in mma_forward.SHAPES[kinds[case]]
        ],
    )


def inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors().items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    return tensors


def planned(case: Case, stored: torch.dtype) -> Candidate:
    """What the plan, as it is in force, has for the family."""
    call = dataclasses.replace(problem(case, "forward", stored), layout="nhwc", aligned=True, tf32=True)
    return launching.plan_for(call, torch.device("cpu")).choose("fused", "mma")


def assert_right(native: ModuleType, case: Case, stored: torch.dtype, tile: mma_forward.Shape) -> None:
    """The result is, and the kernel and its shared memory are those of the plan."""
    tensors = inputs(case, stored)
    native.reset_counters()
    with planned_for(3, tile=tile):  # several blocks, and several tiles for each
        candidate = planned(case, stored)
        y = fused_sepconv.separable_conv2d(**tensors, **case.options)
    assert candidate.name.startswith("mma_forward") and str(tile) in candidate.name
    assert native.counters()["shared_bytes"] == {candidate.name: candidate.shared_bytes}
    pointwise = pointwise_in_tf32 if stored == torch.float32 else F.conv2d
    eager = two_convolutions(**tensors, **case.options, pointwise=pointwise)
    assert_as_close_as_eager(y, eager, two_convolutions(**case.tensors(), **case.options), name=case.name)


@pytest.mark.checked_on(OWN)
@in_every_tile(LIGHT)
def test_the_result_is_as_close_as_eagers(native, served, tile):
    assert_right(native, served, torch.bfloat16, tile)


@pytest.mark.checked_on(OWN[:6])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["float16", "tf32"])
@in_every_tile(tuple(case for case in OWN if case in LIGHT))
def test_and_in_the_other_dtypes(native, served, stored, tile):
    assert_right(native, served, stored, tile)


@pytest.mark.cases(tuple(case for case in SERVED if case not in LIGHT))
def test_larger_cases_too(case):
    tensors = inputs(case, torch.bfloat16)
    with emulated_kernels(False), launching.preferring("mma"), planned_for(3):
        y = fused_sepconv.separable_conv2d(**tensors, **case.options)
    eager, oracle = two_convolutions(**tensors, **case.options), two_convolutions(**case.tensors(), **case.options)
    assert_as_close_as_eager(y, eager, oracle, name=case.name)


@pytest.mark.checked_on([case for case in OWN if case in LIGHT])
@in_every_tile(OWN)
def test_every_schedule_gives_the_same_bits(native, served, tile):
    tensors = inputs(served, torch.bfloat16)
    with planned_for(2, tile=tile):
        in_every_schedule(native, lambda: [fused_sepconv.separable_conv2d(**tensors, **served.options)])


@pytest.mark.checked_on(())
def test_every_instance_is_executed_and_its_matrices_are_loaded_without_bank_conflicts(native):
    native.reset_counters()
    dtypes, tiles = (torch.bfloat16, torch.float16, torch.float32), (mma_forward.WIDE, mma_forward.NARROW)
    cases = {mma_forward.kind_of(problem(case, "forward", torch.bfloat16)): case for case in OWN if case in LIGHT}
    for case, dtype, tile in itertools.product(cases.values(), dtypes, tiles):
        with planned_for(3, tile=tile):
            fused_sepconv.separable_conv2d(**inputs(case, dtype), **case.options)
    assert set(native.executed()) == set(mma_forward.INSTANCES)
    assert not any(native.counters()["bank_conflicts"].values())


def test_nan_and_infinity_pass_through_the_pre_activation(native):
    case = Case("relu", 1, 8, 4, 4, 8, kernel=1, padding=0, pre_activation="relu")
    tensors = inputs(case, torch.bfloat16)
    tensors["x"][0, 0, 1, 1] = math.nan
    tensors["x"][0, 1, 2, 2] = math.inf
    tensors["x"][0, 2, 3, 3] = -math.inf
    y = fused_sepconv.separable_conv2d(**tensors, **case.options)
    torch.testing.assert_close(y, two_convolutions(**tensors, **case.options), equal_nan=True, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("which", ["pointwise_weight", "bias", "residual"])
def test_what_is_not_aligned_is_copied(native, which):
    case = next(case for case in OWN if case.bias and case.residual)
    tensors = inputs(case, torch.float16)
    tensors["residual"] = tensors["residual"].contiguous(memory_format=torch.channels_last)
    expected = fused_sepconv.separable_conv2d(**tensors, **case.options)
    storage = torch.zeros(tensors[which].numel() + 1, dtype=torch.float16)
    view = storage.as_strided(tensors[which].shape, tensors[which].stride(), 1).copy_(tensors[which])
    assert torch.equal(fused_sepconv.separable_conv2d(**{**tensors, which: view}, **case.options), expected)


LAYERS = tuple(dataclasses.replace(case, N=1) for case in XCEPTION)


@pytest.mark.cases(LAYERS[-2:-1], full=LAYERS)
def test_a_layer_reads_what_the_plan_says_and_writes_the_output_alone(checked, case):
    tensors = inputs(case, torch.bfloat16)
    with planned_for(2):  # as many tiles a block as at a batch of 64 on a whole device
        candidate = planned(case, torch.bfloat16)
        checked.reset_counters()
        y = fused_sepconv.separable_conv2d(**tensors, **case.options)
    counters = checked.counters()
    read, written = counters["bytes_read"], {name: n for name, n in counters["bytes_written"].items() if n}
    assert written == {"y": y.numel() * 2}
    assert sum(read.values()) + written["y"] == candidate.requested_bytes
    once = read["x"] / (tensors["x"].numel() * 2)
    print(f"{case}: {candidate.note}; x is read {once:.2f} times in all")
    assert once / math.ceil(case.F / 128) <= mma_forward.MOST_HALO
    assert counters["shared_bytes"] == {candidate.name: candidate.shared_bytes}


def test_what_can_not_run_has_its_reason():
    for case in SMALL:
        call = dataclasses.replace(problem(case, "forward", torch.bfloat16), layout="nhwc", aligned=True)
        (candidate,) = mma_forward.candidates(call, launching.DEVICES["H200"], fused_sepconv.ops.problems.ALL_KERNELS)
        assert bool(candidate.refusal) == (call.C % 8 != 0 or call.F % 8 != 0), case


@pytest.mark.parametrize("larger, reason", [({"N": 2**28}, "32 bits"), ({"H": 2**17, "W": 2**17}, "32-bit offsets")])
def test_what_its_integers_can_not_number_is_refused(larger, reason):
    call = dataclasses.replace(MIDDLE, **larger)
    (candidate,) = mma_forward.candidates(call, launching.DEVICES["H200"], fused_sepconv.ops.problems.ALL_KERNELS)
    assert reason in candidate.refusal
