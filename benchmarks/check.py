"""Is the answer right? Asked of every implementation before it is timed.

The oracle is the reference in float64 on the CPU. The yardstick is PyTorch's own result in the dtype that is measured,
in the layout in which it is farther from the oracle: an implementation may be at most twice as far, plus the rounding
of one result. Distance is measured twice, as the relative L2 norm, which sees a bias, and as the largest deviation,
which sees one wrong pixel.

The float64 answer to a large batch would take minutes. So a batch is filled with copies of a few images: the oracle
computes those, and every copy is compared with them. A weight gradient is then that of the few images times the number
of copies.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from peers import eager
from problem import GRADIENTS, LAYOUTS, Geometry, Inputs, Problem, SeparableConv, prepare

import fused_sepconv.families.pytorch.convolutions

DISTINCT_IMAGES = 4
"""At most so many images are computed in float64."""

UNIT_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The largest relative error of rounding one number."""

RESULTS = {"fwd": ("y",), "bwd": GRADIENTS, "both": ("y", *GRADIENTS)}
"""The results that a pass has to get right. A gradient goes by the name of its tensor."""


class Distance(NamedTuple):
    """How far a result is from the oracle's."""

    l2: float
    """L2 norm of the difference over that of the oracle's result."""
    largest: float
    """Largest absolute difference over the oracle's largest absolute value."""


def distance(result: torch.Tensor, oracle: torch.Tensor) -> Distance:
    """`result` repeats the oracle along its first dimension, once or several times."""
    parts = [part.to(oracle) - oracle for part in result.split(oracle.shape[0])]
    squares = sum(part.square().sum() for part in parts) / len(parts)
    largest = torch.stack([part.abs().max() for part in parts]).max()
    return Distance(
        l2=(squares / oracle.square().sum()).sqrt().item(),
        largest=(largest / oracle.abs().max()).item(),
    )


def reference(
    x: torch.Tensor, depthwise_weight: torch.Tensor, pointwise_weight: torch.Tensor, geometry: Geometry
) -> torch.Tensor:
    return fused_sepconv.reference.separable_conv2d(x, depthwise_weight, pointwise_weight, None, *geometry)


def solve(
    function: SeparableConv, inputs: Inputs, geometry: Geometry, results: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The results that are asked for, by name."""
    solved = {}
    if "y" in results:
        solved["y"] = prepare(function, "fwd", inputs, geometry)()
    if set(results) & set(GRADIENTS):
        solved.update(zip(GRADIENTS, prepare(function, "bwd", inputs, geometry)(), strict=True))
    return solved


class Check:
    """The oracle's results for one problem, against which one implementation after the other is held."""

    def __init__(self, problem: Problem, passes: Sequence[str], seed: int = 0) -> None:
        distinct = max(images for images in range(1, DISTINCT_IMAGES + 1) if problem.batch % images == 0)
        copies = problem.batch // distinct
        few = replace(problem, batch=distinct).inputs(seed)
        self._names = list(dict.fromkeys(name for direction in passes for name in RESULTS[direction]))
        self._geometry = problem.geometry
        self._inputs = few._replace(
            x=few.x.repeat(copies, 1, 1, 1), grad_output=few.grad_output.repeat(copies, 1, 1, 1)
        )

        exact = Inputs(*(tensor.to("cpu", torch.float64, memory_format=torch.contiguous_format) for tensor in few))
        self._oracle = {
            name: result.to(problem.device) * (copies if name in GRADIENTS[1:] else 1)
            for name, result in solve(reference, exact, self._geometry, self._names).items()
        }
        eager_distances = [
            {
                name: distance(result, self._oracle[name])
                for name, result in self._solve(eager, layout, self._names).items()
            }
            for layout in LAYOUTS
        ]
        noise = UNIT_ROUNDOFF[problem.dtype]
        self._allowed = {
            name: Distance(*(2 * max(parts) + noise for parts in zip(*(d[name] for d in eager_distances), strict=True)))
            for name in self._names
        }

    def _solve(self, function: SeparableConv, layout: str, results: Sequence[str]) -> dict[str, torch.Tensor]:
        inputs = Inputs(*(tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in self._inputs))
        return solve(function, inputs, self._geometry, results)

    def faults(self, function: SeparableConv, layout: str, results: Sequence[str]) -> dict[str, str]:
        """What is wrong with these of an implementation's results, by their names; empty where all are right.

        Results that no pass of this check computes are not looked at.
        """
        shapes = dict(zip((*GRADIENTS, "y"), (tuple(tensor.shape) for tensor in self._inputs), strict=True))
        faults = {}
        asked = [name for name in results if name in self._names]
        for name, result in self._solve(function, layout, asked).items():
            called = name if name == "y" else f"the gradient of {name}"
            if tuple(result.shape) != shapes[name]:
                faults[name] = f"wrong answer: {called} has shape {tuple(result.shape)}, not {shapes[name]}"
                continue
            measured, allowed = distance(result, self._oracle[name]), self._allowed[name]
            if not all(part <= limit for part, limit in zip(measured, allowed, strict=True)):  # NaN is refused too
                faults[name] = (
                    f"wrong answer: {called} is off by {measured.l2:.1e} in L2 norm ({allowed.l2:.1e} allowed), "
                    f"{measured.largest:.1e} at worst ({allowed.largest:.1e} allowed)"
                )
        return faults
