"""`python -m tests.run_cases`: launches every kernel at least once, and compares what it computes with float64.

The problems follow from the instance table, `planning.plan.INSTANCES`, and from the kernels that the native module
holds: a kernel without a case is named, and the exit status is 1. Each family is forced in turn, and each fused tile
shape. The output and every gradient are held against float64 by the yardstick of closeness.py; eager PyTorch, which
sets it, runs on the CPU, so that the verdict does not depend on the algorithms that cuDNN happens to choose.

Runs on the GPU where there is one, as planned for it and as for a device of few SMs, and emulated on the CPU otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv.families.mma.forward import Shape
from fused_sepconv.native import loader
from fused_sepconv.ops import launching
from fused_sepconv.planning.plan import INSTANCES
from tests import accuracy
from tests.accuracy import LAYOUTS, allowing_tf32, eager_in, results
from tests.support.calls import function_of
from tests.support.cases import Case, JoinCase, depthwise, normalised
from tests.support.closeness import FACTOR, assert_as_close_as_eager, assert_gradient_as_close_as_eager
from tests.support.emulation import emulated_kernels, planned_for

FEW_SMS = 3  # several tiles and parts a block

# What a problem has besides its kernel size and stride. Channels are whole vectors of 16 bytes, as the fast kernels
# need them: part of a chunk, a chunk and a vector, one vector more than a tile of features.
VARIANTS: dict[str, dict[str, Any]] = {
    "bare": {"N": 2, "C": 40, "H": 9, "W": 14, "F": 24},
    "biases": {
        "N": 1, "C": 8, "H": 5, "W": 8, "F": 264,
        "bias": True, "depthwise_bias": True, "pre_activation": "relu", "activation": "silu",
    },
    "mid-activation": {"N": 3, "C": 72, "H": 7, "W": 6, "F": 16, "mid_activation": "silu"},
    "everything": {
        "N": 2, "C": 24, "H": 12, "W": 11, "F": 40, "bias": True, "depthwise_bias": True, "residual": True,
        "pre_activation": "silu", "mid_activation": "gelu", "activation": "relu",
    },
}  # fmt: skip
DTYPES = {**accuracy.DTYPES, "float64": torch.float64}
SMALLEST = {"N": 1, "C": 8, "H": 5, "W": 6, "F": 8}


@dataclass(frozen=True)
class Run:
    """A problem, forward and backward, and what is forced on it."""

    case: Case
    family: str
    dtype: str  # of DTYPES
    layout: str
    tile: str = ""  # of the fused forward, such as "128x256"
    through: str = ""  # the kernel that the backward goes through, where its family has several ways

    def __str__(self) -> str:
        forced = " ".join(filter(None, (self.family, self.tile, self.through)))
        return f"{self.case} ({self.dtype} {self.layout}, {forced})"


# From an instance's name to its runs ----------------------------------------------------------------------------------


def _case(kind: str, variant: str, **changes: Any) -> Case:
    """A problem of a kind, as instances call it: "5x5", "3x3_stride2", "3x3_s1", "7x7_dilated", "any"."""
    options = {**VARIANTS[variant], **changes}
    if kind == "any":
        return Case(f"any, {variant}", kernel=(4, 2), stride=3, padding=((1, 2), (1, 0)), multiplier=2, **options)
    k = int(kind[0])
    dilation = 2 if kind.endswith("dilated") else 1
    half = k // 2 * dilation
    padding = half if variant == "bare" or dilation > 1 else ((half, 1), (0, half))
    stride = 2 if kind.endswith(("stride2", "s2")) else 1
    return Case(f"{kind}, {variant}", kernel=k, stride=stride, padding=padding, dilation=dilation, **options)


def _phases(case: Case) -> Case:
    """The same problem with a dilation, for kernels that take one apart into problems without."""
    half = case.kernel // 2
    return replace(case, name=f"{case.name}, dilated", dilation=(2, 3), padding=(2 * half, 3 * half))


def simt(dtype: str, layout: str = "nhwc") -> Iterator[Run]:
    kinds = zip(VARIANTS, ("3x3", "5x5", "3x3_stride2", "any"), strict=True)
    for variant, kind in kinds:
        case = _case(kind, variant)
        yield Run(replace(case, C=case.C + 1, F=case.F // 4 + 1), "simt", dtype, layout)  # tails everywhere


def simt_depthwise(dtype: str, layout: str) -> Iterator[Run]:
    for run in simt(dtype, layout):
        yield replace(run, case=depthwise([run.case])[0])


def one_pass_depthwise(kind: str, layout: str, dtype: str) -> Iterator[Run]:
    cases = [_case(kind, variant) for variant in VARIANTS]
    if layout == "nhwc" and kind.endswith("s1"):
        cases.append(_phases(_case(kind, "everything")))
    for case in depthwise(cases):
        yield Run(case, "depthwise", dtype, layout)


def one_pass_normalised(kind: str, layout: str, dtype: str) -> Iterator[Run]:
    runs = list(one_pass_depthwise(kind, layout, dtype))
    for run, case in zip(runs, normalised([run.case for run in runs]), strict=True):
        yield replace(run, case=case)


def mma_forward(kind: str, tile: str, dtype: str) -> Iterator[Run]:
    for variant in VARIANTS:
        yield Run(_case(kind, variant), "mma", dtype, "nhwc", tile)
    yield Run(_case(kind, "everything"), "mma", dtype, "nchw", tile)
    if kind == "3x3":
        yield Run(_phases(_case(kind, "bare")), "mma", dtype, "nhwc", tile)


def mma_weight(kind: str, dtype: str) -> Iterator[Run]:
    stored = "float32" if dtype == "tf32" else dtype
    # Then the gradients of x and of the depthwise weight come from the depthwise kernels.
    through = "" if kind == "any" else f"depthwise_backward_nhwc_3x3_{'s2' if '2' in kind else 's1'}_{stored}"
    for variant in VARIANTS:
        yield Run(_case(kind, variant), "mma", dtype, "nhwc", through=through)


def mma_input(kind: str, dtype: str) -> Iterator[Run]:
    through = f"mma_backward_input_{kind}_{dtype}"
    for variant in ("bare", "biases"):  # the kernel takes no mid-activation
        yield Run(_case(kind, variant), "mma", dtype, "nhwc", through=through)
        yield Run(_phases(_case(kind, variant)), "mma", dtype, "nhwc", through=through)
    yield Run(_case(kind, "biases"), "mma", dtype, "nchw", through=through)


def norm_join(dtype: str, pooled: bool) -> Iterator[Run]:
    for variant in VARIANTS:
        sizes = {name: VARIANTS[variant][name] for name in "NCHW"}
        yield Run(JoinCase(f"join, {variant}", **sizes, F=sizes["C"], pooled=pooled), "joins", dtype, "nhwc")


_STORED = "(?P<dtype>float64|float32|float16|bfloat16)"
_LAYOUT = "(?P<layout>nhwc|nchw)"
_OPERAND = "(?P<dtype>bfloat16|float16|tf32)"
RULES: dict[str, Callable[..., Iterator[Run]]] = {
    rf"simt_(forward|backward_\w+)_{_STORED}_{_LAYOUT}": simt,
    rf"reduce_splits_{_STORED}": simt,
    rf"simt_depthwise_forward_{_STORED}_{_LAYOUT}": simt_depthwise,
    rf"depthwise_(forward|backward)_{_LAYOUT}_(?P<kind>\dx\d_(s1|s2|dilated))_{_STORED}": one_pass_depthwise,
    rf"depthwise_normalised_(forward|backward)_{_LAYOUT}_(?P<kind>\dx\d_(s1|s2))_{_STORED}": one_pass_normalised,
    rf"norm_add_{_STORED}": partial(norm_join, pooled=False),
    rf"norm_pool(_backward)?_{_STORED}": partial(norm_join, pooled=True),
    rf"mma_forward_(?P<kind>any|\dx\d(_stride2)?)_(?P<tile>\d+x\d+)_{_OPERAND}": mma_forward,
    rf"mma_backward_pointwise_weight_(?P<kind>any|\dx\d(_stride2)?)_{_OPERAND}": mma_weight,
    rf"mma_backward_input_(?P<kind>\dx\d)_{_OPERAND}": mma_input,
}


def runs_of(instance: str, smallest: bool = False) -> list[Run]:
    """The runs that must launch an instance; none where its name says nothing of what it is for."""
    for pattern, rule in RULES.items():
        if match := re.fullmatch(pattern, instance):
            runs = list(rule(**match.groupdict()))
            return [_smallest(runs)] if smallest else runs
    return []


def _smallest(runs: list[Run]) -> Run:
    """The run whose case asks for most, on a small image."""
    asks = {
        run: sum(bool(getattr(run.case, name)) for name in (*Case.activations, "bias", "depthwise_bias", "residual"))
        for run in runs
    }
    run = max(asks, key=asks.__getitem__)
    small = replace(run.case, **SMALLEST)
    return replace(run, case=small if small.operator == "separable_conv2d" else replace(small, F=small.K))


def split(dtype: str, layout: str) -> Iterator[Run]:
    """PyTorch's 1x1 beside our depthwise kernels: no instance of its own, and steps that no other run has."""
    for variant in VARIANTS:
        yield Run(_case("3x3", variant), "split", dtype, layout)


# Running --------------------------------------------------------------------------------------------------------------


def ours(run: Run, stored: dict[str, Tensor], device: str, sms: int) -> dict[str, Tensor]:
    """The output and every gradient, by the kernels that the run forces; on the CPU."""
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=LAYOUTS[run.layout])
    tile = Shape(*map(int, run.tile.split("x"))) if run.tile else None
    with (
        planned_for(sms, tile=tile, through=run.through),
        launching.preferring(run.family),
        fused_sepconv.use_backend("fused"),
    ):
        found = results(function_of(run.case), tensors, run.case, DTYPES[run.dtype])
    return {name: tensor.cpu() for name, tensor in found.items()}


def compare(run: Run, device: str, sms: tuple[int, ...]) -> Iterator[str | None]:
    """For each result, on a device of so many SMs each, what is wrong with it; None where it is right."""
    dtype = DTYPES[run.dtype]
    tensors = run.case.tensors()
    if run.case.activation == "relu" and run.case.residual:
        # Far from the bend: on which side an element lies must not hang on rounding.
        tensors["residual"] = tensors["residual"].sign() * 8
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    definition = run.case.definition
    eager = results(eager_in(run.dtype) if run.dtype == "tf32" else definition, stored, run.case, dtype)
    exact = {name: tensor.double() for name, tensor in stored.items()}
    oracle = results(definition, exact, run.case, dtype)
    for count in sms:
        for name, mine in ours(run, stored, device, count).items():
            check = assert_as_close_as_eager if name == "y" else assert_gradient_as_close_as_eager
            # A library's 1x1 sums in another order on a GPU: one element of a few shows twice as much of that.
            factor = FACTOR * (2 if run.family == "split" else 1)
            try:
                check(mine, eager[name], oracle[name], name=name, factor=factor)
            except AssertionError as error:
                yield f"{error}, planned for {count} SMs"
            else:
                yield None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run_cases", description=__doc__.partition("\n")[0])
    parser.add_argument("--smallest", action="store_true", help="one small problem an instance, for compute-sanitizer")
    parser.add_argument("--only", default="", metavar="TEXT", help="only instances whose name contains this")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)  # the cases are small: threads would wait for one another
    gpu = torch.cuda.is_available()
    emulated = contextlib.nullcontext() if gpu or os.environ.get("FUSED_SEPCONV_NATIVE") else emulated_kernels(False)
    with emulated:
        return _run(given.smallest, given.only, "cuda" if gpu else "cpu")


def _run(smallest: bool, only: str, device: str) -> int:
    native = loader.load()
    if native is None:
        print(f"run_cases: {loader.why_missing()}", file=sys.stderr)
        return 2
    compiled = {figures["name"] for figures in native.instances()}
    wanted = sorted(name for name in INSTANCES.keys() | compiled if only in name)
    expected: dict[Run, set[str]] = {}
    for instance in wanted:
        for run in runs_of(instance, smallest):
            expected.setdefault(run, set()).add(instance)
    if not smallest and not only:
        for dtype in ("float32", "float16", "bfloat16"):
            expected.update({run: set() for layout in LAYOUTS for run in split(dtype, layout)})
    sms = (FEW_SMS,)
    if device == "cuda" and not smallest:
        sms = (FEW_SMS, launching._here("cuda", None)[0].sms)

    launched: set[str] = set()
    compared, wrong, passed_by = 0, [], []
    for run, instances in expected.items():
        native.reset_launch_counts()
        try:
            with allowing_tf32(run.dtype == "tf32"):
                verdicts = list(compare(run, device, sms))
        except KeyboardInterrupt:  # out of time: what was found is said all the same
            print("interrupted: the rest was not run", flush=True)
            break
        except RuntimeError as error:  # a launch that failed, or a kernel that the plan refused
            verdicts = [f"{error}"]
        counts = native.launch_counts()
        launched |= counts.keys()
        compared += len(verdicts)
        errors = [f"{run}: {verdict}" for verdict in verdicts if verdict]
        print(f"{'WRONG' if errors else 'right'} {run}: {', '.join(sorted(counts))}", flush=True)
        print(*errors, sep="\n", end="\n" * bool(errors), flush=True)
        wrong += errors
        passed_by += [f"{name}: not launched by {run}" for name in sorted(instances - counts.keys())]
        if device == "cuda" and errors and _lost():
            print("the GPU takes no more work: the rest was not run", flush=True)
            break
    missed = [name for name in wanted if name not in launched]
    without = {name for name in missed if not runs_of(name)}
    print(*wrong, *passed_by, sep="\n", end="\n" * bool(wrong or passed_by))
    for name in missed:
        print(f"missed: {name}" + (" (no case)" if name in without else ""))
    ran = len(wanted) - len(missed)
    print(f"instances: {ran} of {len(wanted)} run, {compared} results compared, {len(wrong)} wrong")
    return 1 if wrong or missed or passed_by or not wanted else 0


def _lost() -> bool:
    """Whether an error has left the process without its GPU."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
