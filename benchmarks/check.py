"""Is the answer right? Asked of every implementation before it is timed.

The oracle is PyTorch in float64 on the CPU. The yardstick is PyTorch's own result in the dtype that is measured, in the
layout in which it is farther from the oracle: an implementation may be at most twice as far, plus the rounding of one
result. Distance is measured twice, as the relative L2 norm, which sees a bias, and as the largest deviation, which sees
one wrong pixel.

The float64 answer to a large batch would take minutes. So a batch is filled with copies of a few images: the oracle
computes those, and every copy is compared with them. A weight gradient is then that of the few images times the number
of copies. Whole networks of ours are checked on small images: every channel count is there, and a float64 answer takes
a second. Networks of other libraries have other weights, and are not checked.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from networks import Network, Run, random_batch
from peers import eager
from problem import GRADIENTS, LAYOUTS, Geometry, Inputs, Problem, SeparableConv, convolution_flags, prepare
from torch import Tensor, nn

DISTINCT_IMAGES = 4  # at most so many images are computed in float64
CHECKED_SIZE, CHECKED_BATCH = 96, 2
"""Pixels a side for a whole network: 3 x 3 are left behind the last pooling."""

UNIT_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The largest relative error of rounding one number."""

RESULTS = {"fwd": ("y",), "bwd": GRADIENTS, "both": ("y", *GRADIENTS)}
"""The results that a pass has to get right. A gradient goes by the name of its tensor."""


class Distance(NamedTuple):
    """How far a result is from the oracle's."""

    l2: float  # L2 norm of the difference over that of the oracle's result
    largest: float  # largest absolute difference over the oracle's largest absolute value


def distance(result: Tensor, oracle: Tensor) -> Distance:
    """`result` repeats the oracle along its first dimension, once or several times."""
    parts = [part.to(oracle) - oracle for part in result.split(oracle.shape[0])]
    squares = sum(part.square().sum() for part in parts) / len(parts)
    largest = torch.stack([part.abs().max() for part in parts]).max()
    return Distance((squares / oracle.square().sum()).sqrt().item(), (largest / oracle.abs().max()).item())


def solve(function: SeparableConv, inputs: Inputs, geometry: Geometry, results: Sequence[str]) -> dict[str, Tensor]:
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
            for name, result in solve(eager, exact, self._geometry, self._names).items()
        }
        yardsticks = [self._solve(eager, layout, self._names) for layout in LAYOUTS]
        self._allowed = {}
        for name in self._names:
            distances = [distance(results[name], self._oracle[name]) for results in yardsticks]
            limits = (2 * max(parts) + UNIT_ROUNDOFF[problem.dtype] for parts in zip(*distances, strict=True))
            self._allowed[name] = Distance(*limits)

    def _solve(self, function: SeparableConv, layout: str, results: Sequence[str]) -> dict[str, Tensor]:
        inputs = Inputs(*(tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in self._inputs))
        return solve(function, inputs, self._geometry, results)

    def faults(self, function: SeparableConv, layout: str, results: Sequence[str]) -> dict[str, str]:
        """Names what is wrong with these results of an implementation; empty where all are right.

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


def network_faults(network: Network, dtype: str, device: str) -> dict[str, str]:
    """Says what is wrong with our network in inference ("fwd") and training ("both"); empty where all is right."""
    x, target = random_batch(CHECKED_BATCH, CHECKED_SIZE, network.layout, "cpu")
    plain = replace(network, backend="reference", is_compiled=False)
    ours, reference, exact = network.on(device), plain.on(device), plain.on("cpu").double()
    faults = {}
    for direction, result, called in (("fwd", _outputs, "the output"), ("both", _gradients, "the gradient")):
        oracle = result(exact, Run("cpu", "float32", "reference"), x.double(), target)
        answers = []
        with convolution_flags(dtype):
            for model, backend in ((reference, "reference"), (ours, network.backend)):
                images = x.to(device, memory_format=LAYOUTS[network.layout])
                answers.append(result(model, Run(device, dtype, backend), images, target.to(device)).cpu())
        yardstick, measured = (distance(answer[None], oracle[None]).l2 for answer in answers)
        allowed = 2 * yardstick + UNIT_ROUNDOFF[dtype]
        if not measured <= allowed:  # NaN is refused too
            faults[direction] = f"wrong answer: {called} is off by {measured:.1e} in L2 norm ({allowed:.1e} allowed)"
    return faults


def _outputs(model: nn.Module, run: Run, x: Tensor, target: Tensor) -> Tensor:
    return run.inference(model, x)().detach().flatten()


def _gradients(model: nn.Module, run: Run, x: Tensor, target: Tensor) -> Tensor:
    """The training loss's gradients, of all parameters in a row."""
    model.train()
    found = torch.autograd.grad(run.forward(model, x, target), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])
