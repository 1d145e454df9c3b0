"""The yardstick of the choice: honest results pass, however they round and in whatever order they add; no others do.

The results are PyTorch's own on the CPU, computed in other ways than its convolutions do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.families.pytorch import convolutions
from fused_sepconv.ops import problems
from fused_sepconv.ops.arguments import Arguments, normalise
from fused_sepconv.planning import choice, proof
from fused_sepconv.planning.problem import Problem
from fused_sepconv.tensors.activations import ACTIVATIONS

MASK = (True, True, True, False, False, False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATED = ((None, None, None), ("relu", None, "relu"), (None, "relu6", None), ("gelu", "hardswish", "elu"))


@dataclasses.dataclass
class Made:
    """A problem on tensors as `choice` makes them, with PyTorch's own result."""

    problem: Problem
    arguments: Arguments
    tensors: tuple
    eager: proof.Results

    def faults(self, **ours: Any) -> dict[str, str]:
        results = {name: proof.as_results(result) for name, result in ours.items()}
        return proof.faults(self.problem, self.arguments, self.tensors, self.eager, results)


def made(
    direction: str, dtype: torch.dtype, activations: tuple, shape: tuple = (3, 32, 9, 8, 24), residual: bool = False
) -> Made:
    n, channels, height, width, features = shape
    names = ("pre_activation", "mid_activation", "activation")
    x = torch.empty(n, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    y = torch.empty(n, features, height, width, dtype=dtype)
    call = normalise(
        *(x, torch.empty(channels, 1, 3, 3, dtype=dtype), torch.empty(features, channels, 1, 1, dtype=dtype)),
        *(torch.empty(features, dtype=dtype), 1, 1),
        residual=y if residual else None,
        **dict(zip(names, activations, strict=True)),
    )
    arguments, problem = call.arguments, problems.problem_of(direction, call.tensors, call.arguments)
    if direction == "forward":
        own = choice.tensors_like(problem, arguments, call.tensors)
        return Made(problem, arguments, own, (convolutions.forward(*own, *arguments),))
    output = y if activations[2] == "relu" else None
    own = choice.tensors_like(problem, arguments, (y, *call.tensors, output))
    return Made(problem, arguments, own, convolutions.backward(*own, *arguments, MASK))


@pytest.fixture(params=range(3))
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other random tensors than `choice` takes, with and without TF32 in the yardstick."""
    generator = torch.Generator
    seeded = type("Seeded", (), {"manual_seed": lambda self, seed: generator().manual_seed(request.param)})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", lambda device: seeded())
        patch.setattr(torch.backends.cudnn, "allow_tf32", request.param == 0)
        yield


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


@pytest.mark.parametrize("activations", ACTIVATED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_outputs_pass(dtype, activations, seed):
    call = made("forward", dtype, activations, residual=True)
    x, depthwise, pointwise, bias, _, residual = call.tensors
    honest = {"fused": convolutions.forward(*map(wide, call.tensors), *call.arguments).to(dtype)}
    v = convolutions.depthwise_forward(x, depthwise, None, *call.arguments[:-1])
    for parts in (2, 8):  # a matrix product may split its sum, and round the parts to 16 bits
        pairs = zip(v.chunk(parts, 1), pointwise.chunk(parts, 1), strict=True)
        z = sum(F.conv2d(part.float(), weight.float()).to(dtype) for part, weight in pairs)
        z = z + bias.view(1, -1, 1, 1) + residual
        honest[f"in {parts} parts"] = ACTIVATIONS[call.arguments.activation].forward(z)
    assert call.faults(eager=call.eager, **honest) == {}


@pytest.mark.parametrize("activations", ACTIVATED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_gradients_pass(dtype, activations, seed):
    """They compute the outputs' signs again, which rounding may flip, and add image after image."""
    call = made("backward", dtype, activations)
    grad, x, *weights, _, _ = map(wide, call.tensors)
    by_image = [
        convolutions.backward(grad[i : i + 1], x[i : i + 1], *weights, None, None, *call.arguments, MASK)
        for i in range(call.problem.N)
    ]
    grad_x, *of_weights = zip(*(gradients[:3] for gradients in by_image), strict=True)
    ordered = (grad.to(dtype) for grad in (torch.cat(grad_x), *map(sum, of_weights)))
    assert call.faults(eager=call.eager, ours=(*ordered, None, None, None)) == {}


def test_a_sum_one_after_another_over_many_pixels_passes():
    """In float32, where PyTorch adds in a tree."""
    problem = dataclasses.replace(
        made("backward", torch.float32, ACTIVATED[0]).problem, N=64, out_h=19, out_w=19, tf32=False
    )
    terms = torch.randn(problem.pixels, 128)
    ours, truth = torch.zeros(128), terms.double().sum(0)
    for term in terms:
        ours += term
    scale, errors = proof._Scale(), proof._Errors()
    scale.add(truth, terms.sum(0) - truth)
    errors.add(ours - truth)
    assert errors.squares > 16 * scale.eager.squares  # twice PyTorch's error would not do
    assert scale.judge(errors, problem) == ""


WRONG: dict[str, Callable[[list], object]] = {
    "a tap": lambda tensors: tensors[1][:, :, 0, 0].zero_(),
    "a channel": lambda tensors: tensors[2][:, 0].zero_(),
    "the bias": lambda tensors: tensors[3].zero_(),
    "the last pixel of an image": lambda tensors: tensors[0][1, :, -1, -1].zero_(),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_that_leaves_something_out_is_wrong(what, dtype, seed):
    call = made("forward", dtype, ("relu", None, None))
    tensors = [None if tensor is None else tensor.clone() for tensor in call.tensors]
    WRONG[what](tensors)
    (reason,) = call.faults(ours=convolutions.forward(*tensors, *call.arguments)).values()
    assert reason.startswith("the output: ")


@pytest.mark.parametrize("activations", ACTIVATED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position, name", [(0, "x"), (1, "depthwise weight"), (2, "pointwise weight")])
def test_a_wrong_gradient_is_wrong_whatever_may_flip(position, name, dtype, activations, seed):
    call = made("backward", dtype, activations)
    spoiled = list(call.eager)
    spoiled[position] = spoiled[position].roll(1, 0)
    (reason,) = call.faults(ours=tuple(spoiled)).values()
    assert reason.startswith(f"the gradient of {name}: relative error")
    spoiled[position] = torch.full_like(spoiled[position], math.nan)
    assert call.faults(ours=tuple(spoiled))


def test_the_truth_is_the_same_image_by_image(monkeypatch):
    for direction in ("forward", "backward"):
        call = made(direction, torch.float32, (None, "silu", "silu"), residual=True)
        call.tensors = tuple(None if tensor is None else tensor.double() for tensor in call.tensors)
        parts = []
        for size in (proof.CHUNK_BYTES, 1):
            monkeypatch.setattr(proof, "CHUNK_BYTES", size)
            found: dict[int, list[Tensor]] = {}
            for position, _, truth in proof._truth(call.problem, call.arguments, call.tensors, call.eager):
                found.setdefault(position, []).append(truth)
            parts.append({position: torch.cat(truth) for position, truth in found.items()})
            monkeypatch.undo()
        whole, one_by_one = parts
        assert whole.keys() == one_by_one.keys() == set(range(1 if direction == "forward" else 3))
        for position, truth in whole.items():
            torch.testing.assert_close(one_by_one[position], truth, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(call.eager[position].double(), truth, rtol=1e-4, atol=1e-4)


def test_where_pytorch_overflows_only_the_rest_is_compared():
    call = made("forward", torch.float16, ACTIVATED[0])
    call.eager[0][0, 0] = math.inf
    right = call.eager[0].clone()
    right[0, 0] = 60000
    wrong = right.clone()
    wrong[0, 1] = math.inf
    assert list(call.faults(right=right, wrong=wrong)) == ["wrong"]
