"""The plan: every legal problem has one, every candidate has a cost or a reason, and what it says can be checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import typing
from pathlib import Path

import pytest
import torch

import fused_sepconv
from fused_sepconv.families.simt import plan as simt
from fused_sepconv.ops.arguments import Arguments
from fused_sepconv.ops.problems import ALL_KERNELS, problem_of
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import plan
from fused_sepconv.planning.problem import AnyTiling, Kernels, Problem
from tests.support.cases import CASES, Case, four_sides, pair
from tests.support.emulation import emulated_kernels

pytestmark = pytest.mark.quick

H200 = DEVICES["H200"]
NO_KERNELS = Kernels(frozenset(), "there are none")


def problem(case: Case, direction: str = "forward", dtype: torch.dtype = torch.float32) -> Problem:
    tensors = {name: tensor.to("meta", dtype) for name, tensor in case.tensors().items()}
    if case.N is None:
        tensors["x"] = tensors["x"].unsqueeze(0)
    stride, dilation = pair(case.stride), pair(case.dilation)
    sides = four_sides(case.padding, (case.H, case.W), pair(case.kernel), stride, dilation)
    arguments = Arguments(stride, sides, dilation, case.pre_activation, case.mid_activation, case.activation)
    return problem_of(direction, tuple(tensors.get(name) for name in case.inputs), arguments)


MIDDLE = Problem(
    direction="forward", N=64, C=728, H=19, W=19, F=728, multiplier=1, kernel=(3, 3), stride=(1, 1),
    padding=(1, 1, 1, 1), dilation=(1, 1), out_h=19, out_w=19, dtype="bfloat16", layout="nhwc",
)  # fmt: skip


def test_every_case_has_a_plan_in_both_directions():
    for case, direction in itertools.product(CASES, ("forward", "backward")):
        made = plan(problem(case, direction), H200, ALL_KERNELS)
        assert not made.chosen.refusal
        assert all(c.refusal or c.predicted_seconds > 0 for c in made.candidates)
        assert made.choose("fused").family != "pytorch"
        assert made.choose("fused", "simt").family == "simt"
        assert made.choose("reference").family == "pytorch"
        assert made.chosen.name in str(made)


def test_every_candidate_that_can_run_says_what_bounds_it():
    ways = itertools.product(CASES[::4], ("forward", "backward"), (torch.bfloat16, torch.float32))
    for case, direction, dtype in ways:
        made = plan(dataclasses.replace(problem(case, direction, dtype), layout="nhwc", tf32=True), H200, ALL_KERNELS)
        assert all(bool(candidate.bound) != bool(candidate.refusal) for candidate in made.candidates)
        chosen, *others = str(made).splitlines()[1:]
        assert f"bound by {made.chosen.bound}" in chosen
        for line, candidate in zip(others, made.candidates[1:], strict=True):
            ratio = candidate.predicted_seconds / made.chosen.predicted_seconds
            assert candidate.refusal or f"{ratio:.2f} times as long: bound by {candidate.bound}" in line


def test_without_kernels_the_reference_serves_and_the_reason_is_told():
    for case in CASES:
        made = plan(problem(case), H200, NO_KERNELS)
        assert made.chosen.family == "pytorch", case
        assert "there are none" in str(made), case
        with pytest.raises(RuntimeError, match="there are none"):
            made.choose("fused")


def test_a_fused_forward_moves_each_tensor_once():
    candidate = plan(MIDDLE, H200, ALL_KERNELS).choose("fused", "simt")
    pixels = 64 * 19 * 19
    assert candidate.bytes == 2 * (pixels * 728 + pixels * 728 + 728 * (9 + 728))
    # The depthwise part is done again for each of the 12 slabs of 64 features.
    assert candidate.flops == 2 * pixels * 728 * 12 * (64 + 9)
    assert candidate.blocks == 361 * 12


def test_the_reference_moves_the_depthwise_result_out_and_in_again():
    candidate = plan(MIDDLE, H200, ALL_KERNELS).choose("reference")
    image = 2 * 64 * 19 * 19 * 728
    assert candidate.bytes == 4 * image + 2 * 728 * (9 + 728)


def test_the_reference_backward_computes_the_forward_again_where_it_was_not_saved():
    backward = dataclasses.replace(MIDDLE, direction="backward")
    image, weights = 2 * 64 * 19 * 19 * 728, 2 * 728 * (9 + 728)
    saved = plan(dataclasses.replace(backward, saved=True), H200, ALL_KERNELS).choose("reference")
    assert saved.bytes == 8 * image + 2 * weights  # four kernels, two images each
    again = plan(backward, H200, ALL_KERNELS).choose("reference")
    assert again.bytes == 10 * image + 2 * weights + 2 * 728 * 9
    assert saved.flops == 2 * (backward.pointwise_flops + backward.depthwise_flops)
    assert again.flops == saved.flops + backward.depthwise_flops
    with_relus = dataclasses.replace(
        backward, pre_activation="relu", mid_activation="relu", activation="relu", saved=True
    )
    # Three images for each gradient; and two, as relu(x) is computed again.
    assert plan(with_relus, H200, ALL_KERNELS).choose("reference").bytes == saved.bytes + (3 * 3 + 2) * image


def test_the_parts_of_a_split_sum_cover_every_pixel_once():
    for case in CASES:
        call = problem(case, "backward")
        candidate = plan(call, H200, ALL_KERNELS).choose("fused", "simt")
        for splits in (candidate.depthwise_splits, candidate.pointwise_splits):
            assert splits.parts * splits.pixels_per_part >= call.pixels, case
            assert (splits.parts - 1) * splits.pixels_per_part < max(call.pixels, 1), case


def test_small_problems_still_fill_the_device_with_parts():
    splits = plan(dataclasses.replace(MIDDLE, direction="backward", C=64, F=64), H200, ALL_KERNELS).choose(
        "fused", "simt"
    )
    assert splits.pointwise_splits.parts > 50


def test_a_problem_too_large_for_a_grid_goes_to_the_reference():
    huge = dataclasses.replace(MIDDLE, N=2**31, H=4000, W=4000, out_h=4000, out_w=4000)
    made = plan(huge, H200, ALL_KERNELS)
    assert made.chosen.family == "pytorch"
    assert "grid" in str(made)


def test_a_large_problem_that_fits_is_not_refused():
    large = dataclasses.replace(MIDDLE, N=22_000, C=2048, F=2048, H=10, W=10, out_h=10, out_w=10)
    for direction in ("forward", "backward"):
        made = plan(dataclasses.replace(large, direction=direction), H200, ALL_KERNELS)
        assert made.choose("fused", "simt").blocks < 2**31


def test_a_dimension_past_32_bits_goes_to_the_reference():
    wide = dataclasses.replace(MIDDLE, N=1, C=1, F=1, H=1, W=2**31, out_h=1, out_w=2**31)
    assert plan(wide, H200, ALL_KERNELS).chosen.family == "pytorch"


def test_a_missing_instance_is_named():
    name = "simt_forward_bfloat16_nhwc"
    made = plan(MIDDLE, H200, Kernels(ALL_KERNELS.instances - {name}))
    assert name in str(made)
    assert made.choose("fused", "simt").family != "simt"


def test_shared_memory_is_checked_against_the_device():
    made = plan(MIDDLE, dataclasses.replace(H200, shared_bytes=1024), ALL_KERNELS)
    assert made.choose("fused", "simt").family != "simt"
    assert "shared memory" in str(made)


def test_an_instance_leaves_room_for_the_blocks_the_plan_counts_on():
    for instance in simt.INSTANCES.values():
        assert 2 * instance.shared_bytes <= min(device.shared_bytes for device in DEVICES.values())


@pytest.mark.parametrize("kind", typing.get_args(AnyTiling), ids=lambda kind: kind.__name__)
def test_a_tiling_has_its_structs_fields_in_their_order(kind: type):
    """Its values are handed over in that order."""
    text = (Path(__file__).parents[2] / "csrc/params.h").read_text()
    body = re.search(rf"struct {kind.__name__} {{(.*?)\n}};", text, re.DOTALL)[1]
    declared = re.findall(r"int32_t ([\w, ]+);", re.sub(r"//.*", "", body))
    names = [name.strip() for line in declared for name in line.split(",")]
    assert names == [field.name for field in dataclasses.fields(kind)][: len(names)]
    # The parts of a sum are `BackwardParams`'s own.
    assert [field.name for field in dataclasses.fields(kind)][len(names) :] in ([], ["parts"])


def test_plans_are_made_once():
    assert plan(MIDDLE, H200, ALL_KERNELS) is plan(dataclasses.replace(MIDDLE), H200, ALL_KERNELS)


# explain --------------------------------------------------------------------------------------------------------------


def meta_call() -> tuple[torch.Tensor, ...]:
    return (
        torch.empty(8, 728, 19, 19, device="meta"),
        torch.empty(728, 1, 3, 3, device="meta"),
        torch.empty(728, 728, 1, 1, device="meta"),
    )


def test_explain_predicts_for_a_device_that_is_not_here():
    explanation = fused_sepconv.explain(*meta_call(), padding=1, device="H200")
    assert explanation.forward.problem.direction == "forward"
    assert explanation.backward.problem.direction == "backward"
    assert "H200" in str(explanation)
    assert "predicted" in str(explanation)
    assert explanation.as_dict()["forward"]["problem"]["F"] == 728


def test_explain_predicts_nothing_for_a_device_without_figures():
    text = str(fused_sepconv.explain(*(torch.empty(t.shape) for t in meta_call()), padding=1))
    assert "predicted" not in text
    assert "pytorch" in text


def test_explain_as_data_is_json():
    text = json.dumps(fused_sepconv.explain(*(torch.empty(t.shape) for t in meta_call())).as_dict(), allow_nan=False)
    assert "pytorch" in text


def test_explain_checks_its_arguments_as_the_call_does():
    with pytest.raises(ValueError, match="device"):
        fused_sepconv.explain(*meta_call(), device="Z80")
    with pytest.raises(ValueError, match="pointwise_weight"):
        fused_sepconv.explain(meta_call()[0], meta_call()[1], torch.empty(3, 4, 1, 1, device="meta"))


def test_explain_of_a_model_leaves_it_as_it_was():
    model = torch.nn.Sequential(
        fused_sepconv.SeparableConv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        fused_sepconv.SeparableConv2d(8, 4, 3, stride=2, padding="same"),
    )
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explanation = fused_sepconv.explain(model, torch.randn(2, 3, 9, 9), device="H200")
    assert [name for name, _ in explanation.layers] == ["0", "2"]
    assert explanation.forward_seconds == sum(e.forward.chosen.predicted_seconds for _, e in explanation.layers)
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_explain_tells_a_module_whose_children_are_called():
    model = torch.nn.Sequential(fused_sepconv.SeparableConv2d(3, 8, 3))
    model[0].depthwise.register_forward_hook(lambda *_: None)
    explanation = fused_sepconv.explain(model, torch.randn(1, 3, 5, 5))
    assert explanation.layers == ()
    assert explanation.children_called == ("0",)


def test_the_emulation_is_a_place_where_kernels_run():
    case = CASES[0]
    tensors = {name: tensor.float() for name, tensor in case.tensors().items()}
    with emulated_kernels(checked=False):
        explanation = fused_sepconv.explain(tensors.pop("x"), **tensors, **case.options)
        assert explanation.forward.choose("fused").name.startswith("simt_forward")
        assert explanation.forward.chosen.name == "pytorch"  # what "auto" runs on the CPU
