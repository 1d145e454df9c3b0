"""The yardstick that a kernel must meet on the user's GPU before it may be chosen there.

The same call is computed in float64 by PyTorch's own convolutions, a few images at a time, so that it needs little
memory. A result is right where it is at most twice as far from that truth as PyTorch's own result in the call's dtype,
plus what rounding costs any honest computation:

- half a unit in the last place of the dtype (of TF32, where PyTorch may use it: its choice may be to do without);
- the sums' own: n float32 additions one after another stray by about sqrt(n / 6) units of 2^-24, a tree by fewer. All
  that counts here is that a right kernel may add in another order than PyTorch;
- in a backward, an activation whose derivative jumps. Where its argument lies next to the jump, rounding takes it to
  the other side, and one element of a gradient is off by its own size. How many are is chance: see `_flipped`.

The error is measured in L2 over the whole result, and in the worst element. The second has more room, as it only has to
find elements that are off by their own size (a tail that was not written, a race), and a 16-bit sum that a matrix
product has split rounds more than once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_sepconv.families.pytorch import convolutions
from fused_sepconv.planning.problem import ELEMENT_BYTES, DepthwiseProblem, Problem

FACTOR = 2.0
WORST_FACTOR = 4.0
HONEST = 16.0  # times the rounding noise that PyTorch's own error may count for: its kernels have been wrong too

CHUNK_BYTES = 256 << 20  # most bytes of float64 tensors at once; more only where one image is larger

JUMPS = frozenset({"relu", "relu6", "hardswish"})  # activations whose derivative jumps

Results = tuple[Tensor | None, ...]


def as_results(result: Any) -> Results:
    """A trial's result: a forward gives a tensor, a backward a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def faults(
    problem: Problem | DepthwiseProblem, arguments: Any, tensors: tuple, eager: Results, ours: Mapping[str, Results]
) -> dict[str, str]:
    """The faults of `ours`, results by name; `eager` is PyTorch's own of the same tensors."""
    scales = [None if result is None else _Scale() for result in eager]
    errors = {name: [_Errors() for _ in eager] for name in ours}
    for position, part, truth in _truth(problem, arguments, tensors, eager):
        scale, expected = scales[position], _wide(eager[position][part])
        honest = torch.isfinite(expected)  # in 16 bits a sum may overflow
        scale.add(torch.where(honest, truth, 0), torch.where(honest, expected - truth, 0))
        for name, results in ours.items():
            result = results[position]
            if isinstance(result, Tensor) and result.shape == eager[position].shape:
                errors[name][position].add(torch.where(honest, _wide(result[part]) - truth, 0))
            else:
                errors[name][position].squares = math.nan
    found = {}
    for name in ours:
        for position, scale in enumerate(scales):
            reason = scale and scale.judge(errors[name][position], problem)
            if reason:
                found[name] = f"{_name(problem, position)}: {reason}"
                break
    return found


@dataclass
class _Errors:
    """Errors of one result; NaN where it holds one, or where there is none to compare."""

    squares: float = 0.0
    worst: float = 0.0

    def add(self, error: Tensor) -> None:
        self.squares += float(error.square().sum())
        worst = float(error.abs().max())
        self.worst = max(self.worst, worst) if worst == worst else worst


@dataclass
class _Scale:
    """How large a result is in truth, and how far PyTorch's own is from it."""

    count: int = 0
    truth: _Errors = field(default_factory=_Errors)
    eager: _Errors = field(default_factory=_Errors)

    def add(self, truth: Tensor, error: Tensor) -> None:
        self.count += truth.numel()
        self.truth.add(truth)
        self.eager.add(error)

    def judge(self, ours: _Errors, problem: Problem | DepthwiseProblem) -> str:
        """Why a result with these errors is wrong; empty where it is right."""
        # A few elements tell little of how far their kind strays: see tests/support/closeness.py.
        luck = 1 + 3 / math.sqrt(self.count)
        noise, flipped = _noise(problem) * luck, _flipped(problem)
        checks = [("relative error", math.sqrt(self.truth.squares), FACTOR, flipped, "squares")]
        if not flipped:
            checks.append(("worst element's error", self.truth.worst, WORST_FACTOR, 0.0, "worst"))
        for what, size, factor, allowance, of in checks:
            error, eager = getattr(ours, of), getattr(self.eager, of)
            if of == "squares":
                error, eager = math.sqrt(error), math.sqrt(eager)
            size = size or 1.0
            eager = min(eager / size, HONEST * noise)
            allowed = factor * luck * eager + (factor / FACTOR) * noise + allowance
            if not error / size <= allowed:  # NaN is wrong too
                return f"{what} {error / size:.2e}, where PyTorch's own has {eager:.2e} and {allowed:.2e} is allowed"
        return ""


def _noise(problem: Problem | DepthwiseProblem) -> float:
    """The relative error that no computation in the dtype can be blamed for."""
    dtype = getattr(torch, problem.dtype)
    tf32 = problem.dtype == "float32" and getattr(problem, "tf32", False)
    unit = 2.0**-10 if tf32 else torch.finfo(dtype).eps / 2
    added = problem.pixels + problem.K + getattr(problem, "F", 0)
    return unit + math.sqrt(added) * (2.0**-53 if problem.dtype == "float64" else 2.0**-24)


def _flipped(problem: Problem | DepthwiseProblem) -> float:
    """The relative error, in L2, that elements next to a jump of the derivative may add to a gradient.

    The argument of an activation has about unit variance here (`choice` sees to that): at most 0.4 of its density is at
    a jump, on either side of which rounding reaches 4 units. The number beyond that is chance: six standard deviations
    and six more. The share of the elements that are flipped is that of the square of the gradient's size, twice where
    half of the elements are zero anyway.
    """
    jumps = [
        (problem.mid_activation in JUMPS, problem.K),
        (getattr(problem, "activation", None) in JUMPS, getattr(problem, "F", 0)),
    ]
    counts = [problem.pixels * channels for jump, channels in jumps if jump]
    if problem.direction == "forward" or not counts:
        return 0.0
    elements = min(counts)
    expected = 0.8 * 4 * _noise(problem) * elements
    return math.sqrt(2 * (expected + 6 * math.sqrt(expected) + 6) / max(elements, 1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64)


def _name(problem: Problem | DepthwiseProblem, position: int) -> str:
    if problem.direction == "forward":
        return "the output"
    weights = ("depthwise weight", "pointwise weight") if isinstance(problem, Problem) else ("weight", "bias")
    names = ("x", *weights, "bias", "depthwise bias", "residual")
    return f"the gradient of {names[position]}"


def images(problem: Problem | DepthwiseProblem, tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """The positions of a trial's tensors whose dimension 0 numbers images."""
    inputs = (0, 5) if isinstance(problem, Problem) else (0,)
    if problem.direction == "forward":
        return inputs
    return (0, *(position + 1 for position in inputs), len(tensors) - 1)  # grad_output, the inputs, the output


def image_bytes(problem: Problem | DepthwiseProblem) -> int:
    """Device memory for one image in float64: x, the output, their gradients, and some intermediates."""
    per_image = 2 * problem.C * problem.H * problem.W
    per_image += problem.out_h * problem.out_w * (4 * problem.K + 2 * getattr(problem, "F", problem.K))
    return ELEMENT_BYTES["float64"] * per_image


def _truth(
    problem: Problem | DepthwiseProblem, arguments: Any, tensors: tuple, eager: Results
) -> Iterator[tuple[int, Any, Tensor]]:
    """(position of a result, part of it, that part in float64); a weight's gradient comes whole, at the end."""
    by_image = images(problem, tensors)
    weights = [tensor if tensor is None or i in by_image else _wide(tensor) for i, tensor in enumerate(tensors)]
    step = max(1, CHUNK_BYTES // image_bytes(problem))
    sums: dict[int, Tensor] = {}
    for start in range(0, problem.N, step):
        part = slice(start, start + step)
        chunk = [
            weights[i] if tensor is None or i not in by_image else _wide(tensor[part])
            for i, tensor in enumerate(tensors)
        ]
        for position, truth in enumerate(_in_float64(problem, arguments, chunk, eager)):
            if truth is None:
                continue
            if problem.direction == "forward" or position in (0, 5):  # of images
                yield position, part, truth
            else:
                sums[position] = sums[position].add_(truth) if position in sums else truth
    for position, total in sums.items():
        yield position, slice(None), total


def _in_float64(problem: Problem | DepthwiseProblem, arguments: Any, tensors: list, eager: Results) -> Results:
    depthwise = isinstance(problem, DepthwiseProblem)
    if problem.direction == "forward":
        run = convolutions.depthwise_forward if depthwise else convolutions.forward
        return (run(*tensors, *arguments),)
    mask = tuple(result is not None for result in eager)
    run = convolutions.depthwise_backward if depthwise else convolutions.backward
    return run(*tensors, *arguments, mask)
