"""What a module of emulated kernels is asked: many short calls, each with what it should give.

Cases have to be small, as every mutant is built and asked anew. Where a family's kernels only show a line of theirs in
large images or on few SMs, the case or the plan is made such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv import depthwise_execution, launching, tensor_execution
from fused_sepconv.devices import DEVICES, Device
from fused_sepconv.execution import ALL_KERNELS
from fused_sepconv.families import depthwise, tensor, tensor_input, tensor_weight
from fused_sepconv.problem import Candidate, TensorInputTiling
from tests.cases import ACTIVATIONS, Case, depthwise_convolution, named, two_convolutions
from tests.emulation import planned_for
from tests.test_plan import problem

from .scratch import INSTANCES

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
MEMORY_FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One call under one schedule. `run` and `definition` give tensors by name: those of `run` are compared."""

    name: str
    schedule: tuple[str, int]
    run: Callable[[], Tensors]
    definition: Callable[[], Tensors]
    tolerance: float

    def what_is_wrong(self, module: ModuleType) -> str:
        """Empty where nothing is."""
        module.set_schedule(*self.schedule)
        try:
            ours = self.run()
        except module.EmulatorError as error:
            return str(error)
        for name, mine in ours.items():
            exact = self.definition()[name]
            error, scale = float((mine.double() - exact).abs().max()), float(exact.abs().max())
            if not error <= self.tolerance * max(scale, 1.0):
                return f"{name} is {error:.1e} off, of {scale:.1e}"
        return ""


def all_checks(checked: bool) -> Iterator[Check]:
    """Those of every family, in few schedules where every access is looked at."""
    few = (("forward", 1), ("reverse", 1))
    schedules = few if checked else (*few, ("random", 1))
    yield from _of_any_family(schedules)
    yield from _of_the_split_family(few)
    yield from _of_single_gradients(few)
    yield from _of_what_no_output_reads(few)
    yield from _of_the_step_through_the_mid_activation(few)
    yield from _of_the_tensor_family(schedules)
    yield from _of_the_tensor_input(schedules)


Schedules = tuple[tuple[str, int], ...]


def _sms(count: int) -> Device:
    return replace(DEVICES["H200"], sms=count)


# ---- as the plan would run them


# Small cases of the table, the bends of activations, and tiles and splits that are whole or one over. A tile is 64 x 64
# (32 or 4 channels for the depthwise weight), its slabs are 16 deep, and a sum over more than 256 pixels is split.
CASES = (
    *named(
        "everything",
        "four different sides",
        "three activations, both biases",
        "dilation and stride",
        "stride larger than the kernel",
        "kernel larger than the image",
        "5x2 kernel",
        "depth multiplier 3",
        "residual before the activation",
        "plain",
        "relu thrice",
        "relu6 thrice",
        "elu thrice",
        "silu thrice",
        "hardswish thrice",
        "gelu thrice",
    ),
    Case("bends", 1, 2, 4, 4, 3, pre_activation="relu", mid_activation="relu"),
    Case("bends of relu6", 1, 2, 4, 4, 3, pre_activation="relu6"),
    Case("bends of hardswish", 1, 2, 4, 4, 3, pre_activation="hardswish"),
    Case("whole tiles", 1, 64, 8, 8, 64, kernel=1, padding=0),
    Case("one over a tile", 1, 65, 1, 66, 65, kernel=(1, 2), padding=0, bias=True, depthwise_bias=True),
    Case("many channels, few features", 1, 70, 2, 3, 2, kernel=1, padding=0),
    Case("few channels, many features", 1, 2, 2, 3, 70, kernel=1, padding=0),
    Case("a split sum", 1, 4, 17, 17, 3, bias=True, depthwise_bias=True),
    Case("a split sum, whole tiles of channels", 1, 64, 17, 17, 2, kernel=1, padding=0),
    Case("a split sum, whole tiles of features", 1, 2, 17, 17, 64, kernel=1, padding=0),
)


def _of_any_family(schedules: Schedules) -> Iterator[Check]:
    def run(case: Case, dtype: str, layout: str) -> Tensors:
        with fused_sepconv.use_backend("fused"):
            return _forward_and_back(fused_sepconv.separable_conv2d, _leaves(case, dtype, layout), case.options)

    for case, (dtype, layout), schedule in product(CASES, INSTANCES, schedules):
        yield Check(
            f"{case.name}, {dtype}, {layout}, {schedule[0]}",
            schedule,
            partial(run, case, dtype, layout),
            partial(_exact, case, dtype),
            TOLERANCE[dtype],
        )


def _leaves(case: Case, dtype: str, layout: str, want_gradients: bool = True) -> Tensors:
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in _tensors(case).items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=MEMORY_FORMATS[layout])
    return {name: tensor.detach().requires_grad_(want_gradients) for name, tensor in tensors.items()}


@cache
def _tensors(case: Case) -> Tensors:
    tensors = case.tensors()
    if case.name.startswith("bends"):
        corners = [0.0, 3.0, -3.0, 6.0]  # where activations have no derivative
        tensors["x"].view(-1)[: 2 * len(corners)] = tensors["x"].new_tensor(2 * corners)
        tensors["depthwise_weight"][-1] = 0.0  # another channel is 0 throughout after the taps
    return tensors


@cache
def _exact(case: Case, dtype: str) -> Tensors:
    leaves = {name: leaf.detach().double() for name, leaf in _leaves(case, dtype, "nchw").items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return _forward_and_back(two_convolutions, leaves, case.options)


def _forward_and_back(function: Callable[..., Tensor], leaves: Tensors, options: dict) -> Tensors:
    y = function(**leaves, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), _grad_output(y))
    return {"y": y.detach(), **{f"the gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}}


def _grad_output(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)


# ---- the depthwise kernels, as the split family runs them


# Several strips, chunks, groups of rows and parts, a chunk that is not filled, and rows and columns on both sides of
# every edge. On one SM a part goes through several strips.
DEPTHWISE_CASES = (
    Case("two strips of several groups", 2, 40, 9, 45, 2, pre_activation="silu", depthwise_bias=True),
    Case("stride 2", 2, 36, 11, 13, 2, kernel=5, stride=2, padding=((3, 1), (1, 4)), mid_activation="silu"),
    Case("stride 2 and a bias", 1, 8, 9, 13, 2, kernel=5, stride=2, padding=2, depthwise_bias=True),
    Case(
        "dilation", 2, 8, 9, 8, 2, padding=((2, 3), (4, 1)), dilation=(2, 3), depthwise_bias=True, mid_activation="relu"
    ),
    Case("dilation and stride", 2, 8, 12, 11, 2, kernel=5, padding=(3, 2), dilation=3, stride=2, depthwise_bias=True),
    Case("dilation and stride with a common factor", 1, 8, 9, 8, 2, padding=2, dilation=2, stride=2),
    Case("two strides and dilations", 1, 8, 13, 9, 2, padding=(4, 3), dilation=(4, 3), stride=(2, 1)),
    Case("windows in the padding alone", 1, 4, 3, 3, 2, padding=((5, 0), (0, 6)), depthwise_bias=True),
    Case("through the mid-activation", 1, 40, 9, 45, 2, depthwise_bias=True, mid_activation="silu"),
    Case("multiplier", 1, 12, 5, 6, 2, multiplier=3, depthwise_bias=True, mid_activation="gelu"),
    Case("many small images", 7, 8, 3, 2, 2, pre_activation="relu"),
    Case("whole chunks", 1, 64, 5, 6, 2, pre_activation="relu", depthwise_bias=True),
    Case("weights of more channels than shared memory holds", 1, 264, 3, 3, 2, kernel=5, stride=2, padding=2),
    Case("more outputs than threads", 7, 4, 13, 12, 2, pre_activation="silu", mid_activation="silu"),
    Case("parts that end inside strips", 3, 8, 27, 33, 2, pre_activation="relu", depthwise_bias=True),
    Case("stride 2, tiles", 2, 8, 15, 90, 2, kernel=5, stride=2, padding=((2, 2), (3, 1)), depthwise_bias=True),
    Case("multiplier 7", 1, 8, 5, 6, 2, multiplier=7, depthwise_bias=True),
)

# Images so large that the kernels for NCHW cut them into bands, and parts into several of those.
PLANE_CASES = (
    Case("bands and parts", 5, 4, 121, 33, 2, pre_activation="silu", depthwise_bias=True),
    Case("bands, stride 2", 3, 4, 61, 33, 2, kernel=5, stride=2, padding=((2, 1), (4, 3)), mid_activation="relu"),
    Case("parts of several units", 11, 4, 61, 33, 2, pre_activation="silu", depthwise_bias=True),
    Case("bands beyond the image", 1, 4, 3, 33, 2, padding=((70, 70), (1, 1)), depthwise_bias=True),
    Case(
        "bands and a dilation",
        2,
        4,
        75,
        33,
        2,
        padding=((7, 6), (4, 9)),
        dilation=(3, 5),
        pre_activation="silu",
        depthwise_bias=True,
        mid_activation="silu",
    ),
)

PLANS = ((132, False), (1, True), (1, False), (3, False))  # SMs, and whether tiles are the widest

# Besides INSTANCES, what is left of the fast kernels: where a case has none, there are no others in these.
FAST_INSTANCES = (("float32", "nhwc"), ("bfloat16", "nhwc"), ("bfloat16", "nchw"))


def _of_the_split_family(schedules: Schedules) -> Iterator[Check]:
    def run(case: Case, dtype: str, layout: str, sms: int, widest: bool, and_back: bool) -> Tensors:
        leaves = _leaves(case, dtype, layout, want_gradients=and_back)
        with fused_sepconv.use_backend("fused"), launching.preferring("split"), planned_for(sms, widest):
            if and_back:
                return _forward_and_back(fused_sepconv.separable_conv2d, leaves, case.options)
            return {"y": fused_sepconv.separable_conv2d(**leaves, **case.options)}

    for case, (dtype, layout) in product((*DEPTHWISE_CASES, *PLANE_CASES), (*INSTANCES, *FAST_INSTANCES)):
        fast = _fast_directions(case, dtype, layout)
        if (not fast and (dtype, layout) in FAST_INSTANCES) or (case in PLANE_CASES and (layout == "nhwc")):
            continue
        and_back = "backward" in fast or (dtype, layout) in INSTANCES
        for schedule, (sms, widest) in product(schedules, PLANS[:2] if dtype == "bfloat16" else PLANS):
            yield Check(
                f"{case.name}, split, {dtype}, {layout}, {schedule[0]}, {sms} SMs, {widest=}",
                schedule,
                partial(run, case, dtype, layout, sms, widest, and_back),
                partial(_exact, case, dtype),
                TOLERANCE[dtype],
            )


def _fast_directions(case: Case, dtype: str, layout: str) -> list[str]:
    call = replace(problem(case, dtype=getattr(torch, dtype)), layout=layout, aligned=True)
    found = {way: depthwise.best(call.depthwise(way), DEVICES["H200"], ALL_KERNELS) for way in ("forward", "backward")}
    return [direction for direction, candidate in found.items() if candidate.family == "depthwise"]


def _of_single_gradients(schedules: Schedules) -> Iterator[Check]:
    """One gradient, where the others are not asked for."""
    case = Case("alone", 2, 12, 7, 9, 2, pre_activation="silu", depthwise_bias=True)

    def run(name: str, layout: str) -> Tensors:
        leaves = {
            key: leaf.requires_grad_(key == name) for key, leaf in _leaves(case, "float32", layout, False).items()
        }
        with fused_sepconv.use_backend("fused"), launching.preferring("split"):
            y = fused_sepconv.separable_conv2d(**leaves, **case.options)
            return {f"the gradient of {name}": torch.autograd.grad(y, leaves[name], _grad_output(y))[0]}

    names = ("x", "depthwise_weight", "depthwise_bias")
    for name, layout, schedule in product(names, MEMORY_FORMATS, schedules):
        yield Check(
            f"{case.name}, {name}, {layout}, {schedule[0]}",
            schedule,
            partial(run, name, layout),
            partial(_exact, case, "float32"),
            TOLERANCE["float32"],
        )


def _of_what_no_output_reads(schedules: Schedules) -> Iterator[Check]:
    """The last row and column: an output that read them would lie past the end, where no gradient is multiplied."""
    case = Case("unread", 1, 40, 22, 46, 2, kernel=5, stride=2, padding=0, mid_activation="silu")

    def gradient(function: Callable[..., Tensor], leaves: Tensors, unread: float) -> Tensors:
        x = leaves["x"].detach().clone()
        x[:, :, -1], x[:, :, :, -1] = unread, unread
        others = {name: leaf.detach() for name, leaf in leaves.items() if name != "x"}
        y = function(x.requires_grad_(), **others, **case.options)
        return {"the gradient of x": torch.autograd.grad(y, x, torch.ones_like(y))[0]}

    def run(layout: str, sms: int, widest: bool) -> Tensors:
        with fused_sepconv.use_backend("fused"), launching.preferring("split"), planned_for(sms, widest):
            return gradient(fused_sepconv.separable_conv2d, _leaves(case, "float32", layout), torch.nan)

    @cache
    def definition() -> Tensors:
        return gradient(two_convolutions, _leaves(case, "float64", "nchw"), 0.0)

    for layout, schedule, (sms, widest) in product(MEMORY_FORMATS, schedules, PLANS):
        yield Check(
            f"{case.name}, {layout}, {schedule[0]}, {sms} SMs, {widest=}",
            schedule,
            partial(run, layout, sms, widest),
            definition,
            TOLERANCE["float32"],
        )


def _of_the_step_through_the_mid_activation(schedules: Schedules) -> Iterator[Check]:
    """The forward that a backward runs first where its own kernel does not: not in cases as small as these."""

    @cache
    def tensors_of(case: Case, layout: str = "nchw") -> Tensors:
        tensors = {name: leaf.detach() for name, leaf in _leaves(case, "float32", layout).items()}
        grad = torch.randn(_t(case, tensors).shape, generator=torch.Generator().manual_seed(7))
        return {**tensors, "grad": grad}

    def run(case: Case, layout: str, sms: int) -> Tensors:
        call = replace(problem(case), layout=layout, aligned=True).depthwise("forward")
        step, tensors = depthwise.best(call, _sms(sms), ALL_KERNELS), tensors_of(case, layout)
        inputs = tensors["x"], tensors["depthwise_weight"], tensors.get("depthwise_bias")
        return {"the gradient of t": depthwise_execution.forward(step, call, *inputs, tensors["grad"])}

    @cache
    def definition(case: Case) -> Tensors:
        tensors = {name: tensor.double() for name, tensor in tensors_of(case).items()}
        t = _t(case, tensors).requires_grad_()
        (gradient,) = torch.autograd.grad(ACTIVATIONS[case.mid_activation](t), t, tensors["grad"])
        return {"the gradient of t": gradient}

    cases = (case for case in DEPTHWISE_CASES if case.mid_activation and case.multiplier == 1)
    for case, layout, schedule, sms in product(cases, MEMORY_FORMATS, schedules, (1, 132)):
        yield Check(
            f"{case.name}, through the mid-activation, {layout}, {schedule[0]}, {sms} SMs",
            schedule,
            partial(run, case, layout, sms),
            partial(definition, case),
            TOLERANCE["float32"],
        )


def _t(case: Case, tensors: Tensors) -> Tensor:
    """The depthwise result, before the mid-activation."""
    options = {name: case.options[name] for name in ("stride", "padding", "dilation", "pre_activation")}
    inputs = tensors["x"], tensors["depthwise_weight"], tensors.get("depthwise_bias")
    return depthwise_convolution(*inputs, **options)


# ---- the tensor-core kernels


# Tiles of 128 or 256 features and a vector of the next, slabs of channels and a vector, several tiles a block and a
# block a tile, tiles that end inside a cell and past the image, all kinds, both operands' types. Of the backward, the
# gradients that have no other kernels.
TENSOR_CASES = (
    Case("slabs and vectors", 2, 72, 7, 9, 136, bias=True, residual=True, pre_activation="relu", activation="relu"),
    Case("256 features, and a vector", 1, 8, 4, 5, 264, bias=True, activation="silu"),
    Case("many tiles", 5, 8, 13, 30, 8, depthwise_bias=True, mid_activation="relu"),
    Case("many tiles of two slabs", 2, 40, 21, 30, 16, pre_activation="relu", bias=True),
    Case("stride 2", 1, 40, 11, 14, 24, stride=2, padding=1, mid_activation="relu", activation="gelu"),
    Case("stride 3", 1, 24, 14, 17, 8, kernel=(4, 2), stride=3, pre_activation="silu", mid_activation="silu"),
    Case("strides and dilations", 1, 8, 13, 19, 8, padding=((1, 2), (3, 0)), stride=(2, 1), dilation=(3, 4)),
    Case("a row and a column", 2, 8, 9, 11, 8, kernel=(3, 1), padding=((1, 0), (0, 2)), stride=(1, 2)),
    Case("more channels than threads", 1, 264, 3, 4, 8, depthwise_bias=True),
    Case("more pieces of taps than threads", 1, 8, 6, 7, 8, kernel=9, padding=4, depthwise_bias=True),
    Case("multiplier 5", 1, 16, 6, 6, 16, multiplier=5, pre_activation="relu", depthwise_bias=True),
)
TENSOR_TOLERANCE = {"bfloat16": 2e-2, "float32": 4e-3}
INPUTS = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")


def _of_the_tensor_family(schedules: Schedules) -> Iterator[Check]:
    def forward(case: Case, dtype: str, sms: int, tile: tensor.Shape | None) -> Tensors:
        inputs = {name: value for name, value in _rounded(case, dtype).items() if name != "grad_z"}
        with fused_sepconv.use_backend("fused"), launching.preferring("tensor"), planned_for(sms, tile=tile):
            return {"y": fused_sepconv.separable_conv2d(**inputs, **case.options)}

    @cache
    def forward_by_definition(case: Case, dtype: str) -> Tensors:
        inputs = {name: value.double() for name, value in _rounded(case, dtype).items() if name != "grad_z"}
        return {"y": two_convolutions(**inputs, **case.options)}

    def weight_gradient(case: Case, dtype: str, sms: int) -> Tensors:
        tensors = _rounded(case, dtype)
        call = replace(problem(case, "backward", getattr(torch, dtype)), layout="nhwc", aligned=True, tf32=True)
        step = tensor_weight.best(call, _sms(sms), ALL_KERNELS)
        inputs = tuple(tensors.get(name) for name in INPUTS)
        found = tensor_execution.pointwise_weight_gradient(step, call, tensors["grad_z"], inputs, want_bias=case.bias)
        return _asked(("pointwise_weight", "bias"), found)

    @cache
    def weight_gradient_by_definition(case: Case, dtype: str) -> Tensors:
        tensors = {name: value.double() for name, value in _rounded(case, dtype).items()}
        grad_z = tensors.pop("grad_z")
        leaves = {name: tensors[name].requires_grad_() for name in ("pointwise_weight", "bias") if name in tensors}
        z = two_convolutions(**tensors, **{**case.options, "activation": None})
        return dict(zip(leaves, torch.autograd.grad(z, list(leaves.values()), grad_z), strict=True))

    for case, (dtype, tolerance), schedule, sms in product(TENSOR_CASES, TENSOR_TOLERANCE.items(), schedules, (2, 132)):
        where = f"{dtype}, {schedule[0]}, {sms} SMs"
        for tile in (tensor.WIDE, tensor.NARROW) if case.kernel == 3 and case.dilation == 1 else (None,):
            yield Check(
                f"{case.name}, on tensor cores, tiles {tile}, {where}",
                schedule,
                partial(forward, case, dtype, sms, tile),
                partial(forward_by_definition, case, dtype),
                tolerance,
            )
        yield Check(
            f"{case.name}, pointwise weight on tensor cores, {where}",
            schedule,
            partial(weight_gradient, case, dtype, sms),
            partial(weight_gradient_by_definition, case, dtype),
            tolerance,
        )


@cache
def _rounded(case: Case, dtype: str) -> Tensors:
    """The inputs in channels_last, and the gradient of the last activation's argument."""
    grad_z = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(7))
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in {**case.tensors(), "grad_z": grad_z}.items()}
    images = {name: tensors[name].contiguous(memory_format=torch.channels_last) for name in ("x", "grad_z")}
    return {**tensors, **images}


def _asked(names: tuple[str, ...], found: tuple[Tensor | None, ...]) -> Tensors:
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


# A chunk of channels and a vector, paddings that leave x without dT and dT without x, several tiles and parts, strips,
# phases that end early, the way of relu and that of the others.
TENSOR_INPUT_CASES = (
    Case("chunks and vectors", 2, 72, 7, 9, 40, pre_activation="relu", padding=((2, 0), (0, 1)), depthwise_bias=True),
    Case("many tiles", 1, 8, 33, 31, 8, pre_activation="silu", depthwise_bias=True),
    Case("strips", 1, 8, 15, 52, 24, padding=((0, 3), (4, 1)), pre_activation="relu", depthwise_bias=True),
    Case("phases", 2, 8, 12, 19, 8, padding=((1, 5), (3, 0)), dilation=(3, 2), depthwise_bias=True),
)
TOWARDS_X = ("x", "depthwise_weight", "depthwise_bias")


def _of_the_tensor_input(schedules: Schedules) -> Iterator[Check]:
    def run(case: Case, tiling: TensorInputTiling, mask: tuple[bool, bool, bool]) -> Tensors:
        tensors = _rounded(case, "bfloat16")
        call = replace(problem(case, "backward", torch.bfloat16), layout="nhwc", aligned=True)
        step = Candidate("tensor", "tensor_backward_input_3x3_bfloat16", tiling=tiling)
        inputs = tuple(tensors.get(name) for name in INPUTS)
        return _asked(TOWARDS_X, tensor_execution.input_gradients(step, call, tensors["grad_z"], inputs, mask))

    @cache
    def definition(case: Case) -> Tensors:
        tensors = {name: value.double() for name, value in _rounded(case, "bfloat16").items()}
        leaves = [tensors[name].requires_grad_() for name in TOWARDS_X]
        grad_t = torch.einsum("nfhw,fk->nkhw", tensors["grad_z"], tensors["pointwise_weight"].flatten(1))
        return dict(zip(TOWARDS_X, torch.autograd.grad(_t(case, tensors), leaves, grad_t), strict=True))

    for case in TENSOR_INPUT_CASES:
        call = replace(problem(case, "backward", torch.bfloat16), layout="nhwc", aligned=True)
        cuts = tensor_input.cuts(call, _sms(2))
        most_strips = max(cuts, key=lambda cut: cut.strips)
        for (cut, stages, mask), schedule in product(
            (
                (cuts[0], 5, (True, True, True)),
                (most_strips, 4, (True, True, True)),
                (cuts[0], 3, (True, False, False)),
                (most_strips, 2, (False, True, True)),
            ),
            schedules,
        ):
            tiling = TensorInputTiling(cut.strips, cut.part, cut.parts, stages)
            yield Check(
                f"{case.name}, towards x on tensor cores, {schedule[0]}, {tiling}",
                schedule,
                partial(run, case, tiling, mask),
                partial(definition, case),
                TENSOR_TOLERANCE["bfloat16"],
            )
