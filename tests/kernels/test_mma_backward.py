"""The tensor-core gradient of the pointwise weight, run on the CPU, and the backward that is made with it.

Right in every case and under every cut, by the rules, and reading just what the plan says.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv.families.mma import backward as mma_backward
from fused_sepconv.families.mma import backward_weight as mma_weight
from fused_sepconv.families.mma import launch as mma_launch
from fused_sepconv.ops.problems import ALL_KERNELS
from fused_sepconv.planning.devices import DEVICES, Device
from fused_sepconv.planning.plan import plan
from fused_sepconv.planning.problem import Candidate, MmaWeightTiling, Problem
from fused_sepconv.tensors.activations import ACTIVATIONS
from tests.kernels.test_mma_forward import eights, inputs
from tests.planning.test_plan import problem
from tests.support.cases import CASES, SMALL, XCEPTION, Case, two_convolutions
from tests.support.closeness import assert_gradient_as_close_as_eager
from tests.support.emulation import in_every_schedule, planned_for
from tests.support.tf32 import to_tf32

FEW = dataclasses.replace(DEVICES["H200"], sms=3)  # several parts, and several tiles for each

FAMILY = "mma"


# What only this kernel has: warps' tiles and slabs that are just filled or have one vector over, warps that share the
# pixels, tiles that begin inside a row of cells, every kind in phases and with each sort of activation.
OWN = (
    Case("a warp's tile, just filled", 1, 64, 5, 7, 64, bias=True),
    Case("a warp's tile and a vector", 1, 72, 5, 7, 72, pre_activation="relu", depthwise_bias=True),
    Case("a block's tile, and a vector of features", 1, 128, 5, 9, 264, bias=True),
    Case("two tiles of channels", 1, 264, 3, 4, 8, depthwise_bias=True),
    Case("many tiles a part", 9, 40, 21, 30, 16, pre_activation="relu", bias=True),
    Case("tiles that begin inside a row", 2, 8, 19, 19, 8, bias=True),
    Case("3x3, stride 2", 2, 40, 19, 14, 24, stride=2, mid_activation="relu", bias=True),
    Case("5x5", 1, 40, 9, 14, 24, kernel=5, padding=2, pre_activation="relu"),
    Case("7x7, stride 2", 1, 40, 13, 14, 24, kernel=7, padding=3, stride=2),
    Case("4x2, stride 3", 1, 24, 14, 17, 8, kernel=(4, 2), stride=3, pre_activation="silu", mid_activation="gelu"),
    Case("stride 2, dilation 3", 1, 8, 19, 22, 8, stride=2, dilation=3, padding=3, bias=True),
    Case("stride 2, dilation 4", 1, 8, 19, 22, 8, stride=2, dilation=4, padding=((4, 1), (0, 3))),
    Case("dilation 2", 1, 8, 11, 13, 8, dilation=2, padding=2, depthwise_bias=True, mid_activation="silu"),
    Case("strides and dilations", 1, 8, 13, 19, 8, padding=((1, 2), (3, 0)), stride=(2, 1), dilation=(3, 4)),
    Case("a row and a column", 2, 8, 9, 11, 8, kernel=(3, 1), padding=((1, 0), (0, 2)), stride=(1, 2)),
    Case("depth multiplier 5", 1, 16, 6, 6, 16, multiplier=5, pre_activation="relu"),
    Case("depth multiplier 3", 1, 24, 6, 7, 16, multiplier=3, mid_activation="relu6", depthwise_bias=True),
    Case("no padding", 2, 16, 9, 8, 16, padding=0, bias=True),
)
SERVED = (*(eights(case) for case in CASES if case not in XCEPTION and case.N != 0), *OWN)
LIGHT = tuple(case for case in SERVED if case.multiplications < 300_000)
NARROW = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def in_nhwc(case: Case, stored: torch.dtype = torch.bfloat16) -> Problem:
    return dataclasses.replace(problem(case, "backward", stored), layout="nhwc", aligned=True, tf32=True)


def step_of(case: Case, stored: torch.dtype, device: Device = FEW) -> Candidate:
    step = mma_weight.best(in_nhwc(case, stored), device, ALL_KERNELS)
    assert not step.refusal
    return step


def grad_z_of(case: Case, stored: torch.dtype) -> Tensor:
    shape = case.output_shape if case.N is not None else (1, *case.output_shape)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return values.to(stored).contiguous(memory_format=torch.channels_last)


def batched(case: Case, stored: torch.dtype) -> dict[str, Tensor]:
    return inputs(dataclasses.replace(case, N=1) if case.N is None else case, stored)


def by_kernel(case: Case, stored: torch.dtype, step: Candidate, grad_z: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients of the pointwise weight and, where the case has it, of the bias."""
    tensors = batched(case, stored)
    everything = tuple(tensors.get(name) for name in case.inputs)
    grad_z = grad_z_of(case, stored) if grad_z is None else grad_z
    run = mma_launch.PointwiseWeightGradient(step, in_nhwc(case, stored), everything, want_bias=case.bias)
    weight, bias = run(grad_z, everything)
    return {"pointwise_weight": weight, "bias": bias} if case.bias else {"pointwise_weight": weight}


def by_definition(case: Case, tensors: dict[str, Tensor], grad_z: Tensor, tf32: bool = False) -> dict[str, Tensor]:
    """The same from the depthwise result of PyTorch's convolution, in the tensors' dtype; the operands may be TF32."""
    channels = case.K
    identity = torch.eye(channels, dtype=grad_z.dtype).view(channels, channels, 1, 1)
    names = ("stride", "padding", "dilation", "pre_activation", "mid_activation")
    t = two_convolutions(
        tensors["x"],
        tensors["depthwise_weight"],
        identity,
        depthwise_bias=tensors.get("depthwise_bias"),
        **{name: case.options[name] for name in names},
    )
    rounded = to_tf32 if tf32 else lambda tensor: tensor
    weight = torch.ops.aten.convolution_backward(
        rounded(grad_z), rounded(t), torch.empty_like(tensors["pointwise_weight"]), None,
        (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False),
    )[1]  # fmt: skip
    return {"pointwise_weight": weight, "bias": grad_z.sum((0, 2, 3))} if case.bias else {"pointwise_weight": weight}


def assert_right(case: Case, stored: torch.dtype, step: Candidate | None = None) -> None:
    ours = by_kernel(case, stored, step or step_of(case, stored))
    tensors, grad_z = batched(case, stored), grad_z_of(case, stored)
    eager = by_definition(case, tensors, grad_z, tf32=stored == torch.float32)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    for name, oracle in by_definition(case, exact, grad_z.double()).items():
        assert_gradient_as_close_as_eager(ours[name], eager[name], oracle, name=f"{case.name}: {name}")


@pytest.mark.checked_on(OWN)
@pytest.mark.cases(LIGHT)
def test_the_gradient_is_as_close_as_eagers(native, case):
    assert_right(case, torch.bfloat16)


@pytest.mark.checked_on(OWN[:4])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["float16", "tf32"])
@pytest.mark.cases(tuple(case for case in OWN if case in LIGHT))
def test_and_in_the_other_dtypes(native, case, stored):
    assert_right(case, stored)


@pytest.mark.cases(tuple(case for case in SERVED if case not in LIGHT))
def test_larger_cases_too(plain, case):
    assert_right(case, torch.bfloat16)


CUTS = Case("cuts", 2, 136, 10, 11, 200, bias=True, depthwise_bias=True)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "tf32"])
@pytest.mark.parametrize("warps", [(4, 2), (2, 4), (2, 2), (1, 8), (4, 1), (1, 4), (2, 1), (1, 1)], ids=str)
def test_every_cut_gives_the_gradient_and_takes_the_shared_memory_that_the_plan_says(plain, warps, stored):
    for stages, runs, columns in ((2, 8, 12), (3, 16, 4), (4, 32, 8)):
        step = step_of(CUTS, stored)
        cut = mma_weight.Cut(in_nhwc(CUTS, stored), FEW, columns, runs // 4, *warps, stages)
        depth = 8 if stored == torch.float32 else 16
        if cut.shared_bytes > FEW.shared_bytes or 8 // (warps[0] * warps[1]) > cut.pixels // depth:
            continue
        tiling = MmaWeightTiling(columns, runs // 4, *warps, stages, parts=2)
        plain.reset_counters()
        assert_right(CUTS, stored, dataclasses.replace(step, tiling=tiling))
        assert plain.counters()["shared_bytes"][step.name] == cut.shared_bytes


@pytest.mark.checked_on([case for case in OWN if case in LIGHT])
@pytest.mark.cases(OWN)
def test_every_schedule_gives_the_same_bits(native, case):
    step = step_of(case, torch.bfloat16)
    in_every_schedule(native, lambda: by_kernel(case, torch.bfloat16, step).values())


@pytest.mark.quick
def test_every_instance_is_executed(plain):
    plain.reset_counters()
    for case, stored in itertools.product(OWN, (torch.bfloat16, torch.float16, torch.float32)):
        if case in LIGHT:
            by_kernel(case, stored, step_of(case, stored))
    assert set(plain.executed()) >= set(mma_weight.INSTANCES)


@pytest.mark.parametrize("hole", [math.nan, math.inf])
@pytest.mark.parametrize("mid_activation", [None, "relu6"])
def test_pixels_that_no_output_reads_do_not_count(native, hole, mid_activation):
    # The outputs fill no cell: those next to them would read the last row and column.
    case = Case("a last row that no window reaches", 1, 8, 8, 8, 8, stride=2, padding=0, mid_activation=mid_activation)
    tensors = batched(case, torch.bfloat16)
    with_hole = tensors["x"].clone(memory_format=torch.channels_last)
    with_hole[:, :, -1], with_hole[..., -1] = hole, hole
    step, call = step_of(case, torch.bfloat16), in_nhwc(case)
    grads = []
    for x in (tensors["x"], with_hole):
        everything = (x, *list(tensors.values())[1:3], None, None, None)
        run = mma_launch.PointwiseWeightGradient(step, call, everything)
        grads.append(run(grad_z_of(case, torch.bfloat16), everything)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("how", ["NCHW", "expanded", "not aligned"])
def test_a_gradient_that_can_not_be_read_in_place_is_copied(plain, how):
    case = OWN[0]
    grad_z = grad_z_of(case, torch.float16)
    if how == "expanded":
        grad_z = grad_z[:, :, :1, :1].clone().expand_as(grad_z)
    given = grad_z
    if how == "NCHW":
        given = grad_z.contiguous()
    elif how == "not aligned":
        given = torch.zeros(grad_z.numel() + 1, dtype=torch.float16).as_strided(grad_z.shape, grad_z.stride(), 1)
        given.copy_(grad_z)
    step = step_of(case, torch.float16)
    copy = grad_z.clone(memory_format=torch.channels_last)
    expected, got = by_kernel(case, torch.float16, step, copy), by_kernel(case, torch.float16, step, given)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# The whole backward ---------------------------------------------------------------------------------------------------

WHOLE = tuple(eights(case) for case in SMALL if case.name in (
    "all six tensors", "1x1 image and kernel", "depth multiplier 3", "stride 2, odd size", "same, stride 2, dilation 2",
    "four different sides", "relu thrice", "silu thrice", "three activations, both biases", "everything", "batch 0",
)) + OWN[:3]  # fmt: skip


@pytest.mark.parametrize("stored", NARROW, ids=NARROW.values())
@pytest.mark.cases(WHOLE)
def test_every_gradient_of_the_backward_is_as_close_as_eagers(plain, case, stored):
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(case, stored).items()}
    grad_output = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad_output = grad_output.to(stored)

    def gradients(function, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        y = function(**tensors, **case.options)
        found = torch.autograd.grad(y, list(tensors.values()), grad_output.to(y.dtype))
        return dict(zip(tensors, found, strict=True))

    plain.reset_counters()
    with planned_for(3):
        ours = gradients(fused_sepconv.separable_conv2d, tensors)
    ran = any(name in mma_weight.INSTANCES for name in plain.executed())
    assert ran == (case.N != 0)
    eager = gradients(two_convolutions, tensors)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    for name, oracle in gradients(two_convolutions, exact).items():
        assert_gradient_as_close_as_eager(ours[name], eager[name], oracle, name=f"{case.name}: {name}")


def test_only_what_is_asked_for_is_computed(plain):
    case = OWN[0]
    tensors = inputs(case, torch.bfloat16)
    tensors["x"].requires_grad_()
    plain.reset_counters()
    fused_sepconv.separable_conv2d(**tensors, **case.options).sum().backward()
    assert not mma_weight.INSTANCES.keys() & plain.executed().keys()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_the_depthwise_result_is_written_only_where_z_is_computed_again(checked, activation):
    case = dataclasses.replace(OWN[0], bias=False, activation=activation)
    tensors = inputs(case, torch.bfloat16)
    y = fused_sepconv.separable_conv2d(**tensors, **case.options)
    tensors["pointwise_weight"].requires_grad_()
    y = fused_sepconv.separable_conv2d(**tensors, **case.options)
    checked.reset_counters()
    y.backward(torch.ones_like(y))
    written = {name for name, count in checked.counters()["bytes_written"].items() if count}
    again = activation is not None and ACTIVATIONS[activation].from_output is None
    assert written == {"partial_weight", "out"} | ({"y"} if again else set())


# The plan -------------------------------------------------------------------------------------------------------------

# The layers with fewer rows, columns and channels: to emulate all of one would take minutes.
LAYERS = tuple(
    dataclasses.replace(
        case, N=1, H=min(case.H, 19), W=min(case.W, 74), C=min(case.C, 136), F=min(case.F, 264), activation=None
    )
    for case in XCEPTION
)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "tf32"])
@pytest.mark.cases([case for case in OWN if case in LIGHT], full=OWN)
def test_the_kernel_moves_what_the_plan_says(checked, case, stored):
    step = step_of(case, stored)
    checked.reset_counters()
    by_kernel(dataclasses.replace(case, bias=False), stored, step)
    assert_bytes(checked, case, step)


@pytest.mark.cases(LAYERS[::3], full=LAYERS)
def test_a_layer_moves_what_the_plan_says(checked, case):
    step = step_of(case, torch.bfloat16)
    checked.reset_counters()
    by_kernel(case, torch.bfloat16, step)
    assert_bytes(checked, case, step)
    print(f"{case}: {step.note}")


def assert_bytes(checked: ModuleType, case: Case, step: Candidate) -> None:
    """The bytes of the kernel, the depthwise bias left out, and of its ordered reduction."""
    counters = checked.counters()
    read, written = counters["bytes_read"], {name: n for name, n in counters["bytes_written"].items() if n}
    parts = step.tiling.parts * case.F * case.K * 4
    assert written.pop("partial_weight") == read.pop("partials") == parts
    assert set(written) == {"out"}
    moved = sum(count for name, count in read.items() if name != "depthwise_bias") + parts
    assert moved == step.requested_bytes
    assert not any(counters["bank_conflicts"].values())
    assert counters["shared_bytes"][step.name] == step.shared_bytes


def test_what_can_not_run_has_its_reason():
    for case in SMALL:
        call = dataclasses.replace(problem(case, "backward", torch.bfloat16), layout="nhwc", aligned=True)
        candidate, *_ = mma_backward.candidates(call, DEVICES["H200"], ALL_KERNELS)
        assert bool(candidate.refusal) == (call.C % 8 != 0 or call.F % 8 != 0), case


def test_what_is_too_large_has_its_reason():
    call = in_nhwc(OWN[0])
    wide = dataclasses.replace(call, H=2**11, W=2**11, out_h=2**11, out_w=2**11, F=2**13)
    for large, why in ((wide, "32-bit places"), (dataclasses.replace(call, N=2**31), "tiles of pixels")):
        assert why in mma_weight.best(large, DEVICES["H200"], ALL_KERNELS).refusal
    assert "shared memory" in mma_weight.best(call, dataclasses.replace(FEW, shared_bytes=4096), ALL_KERNELS).refusal


@pytest.mark.cases(XCEPTION[::4], full=XCEPTION)
def test_the_plan_weighs_it_against_the_others(case):
    for device in DEVICES.values():
        made = plan(dataclasses.replace(in_nhwc(case), N=64), device, ALL_KERNELS)
        families = {candidate.family: candidate for candidate in made.candidates}
        assert not families["mma"].refusal
        assert families["mma"].note in str(made)
        assert families["mma"].steps[0].shared_bytes <= device.shared_bytes
        # It saves the depthwise result's way out and in again, less the partial sums'.
        assert families["mma"].bytes < families["split"].bytes or families["mma"].steps[0].tiling.parts > 1
