"""A case as a call of the operator that it is a case of: the public function, and the two custom ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_sepconv
from tests.support.cases import Case, four_sides, pair
from tests.support.joins import norm_join
from tests.support.normalised import normalised_depthwise


def function_of(case: Case) -> Callable[..., Tensor]:
    """The function that takes the case's tensors and options: the package's, if it has one."""
    ours = {"normalised_depthwise": normalised_depthwise, "norm_join": norm_join}
    return ours.get(case.operator) or getattr(fused_sepconv, case.operator)


def forward_op(case: Case) -> Any:
    return getattr(torch.ops.fused_sepconv, case.operator)


def backward_op(case: Case) -> Any:
    return getattr(torch.ops.fused_sepconv, f"{case.operator}_backward")


def op_arguments(case: Case, backend: str = "auto") -> list[Any]:
    """What the ops take that is no tensor."""
    stride, dilation = pair(case.stride), pair(case.dilation)
    sides = four_sides(case.padding, (case.H, case.W), pair(case.kernel), stride, dilation)
    activations = (getattr(case, name) for name in case.activations)
    return [list(stride), list(sides), list(dilation), *activations, backend]


def forward_arguments(case: Case, tensors: dict[str, Tensor], backend: str = "auto") -> tuple[Any, ...]:
    return (*(tensors.get(name) for name in case.inputs), *op_arguments(case, backend))


def saved_output(case: Case, y: Tensor) -> Tensor | None:
    """The output, where a backward may be given it."""
    return y if case.activation in ("relu", "relu6", "elu") else None


def backward_arguments(
    case: Case, tensors: dict[str, Tensor], requires_grad: bool = False, backend: str = "auto"
) -> tuple[Any, ...]:
    """For a random grad_output, asking for every gradient there is."""
    y = case.definition(**tensors, **case.options).detach()
    grad_output = torch.randn_like(y).requires_grad_(requires_grad)
    mask = [name in tensors for name in case.inputs]
    inputs = (tensors.get(name) for name in case.inputs)
    return (grad_output, *inputs, saved_output(case, y), *op_arguments(case, backend), mask)


def leaves(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", frozen: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The case's tensors, all of which but the frozen ones ask for a gradient."""
    made = {name: tensor.to(device, dtype).clone() for name, tensor in case.tensors().items()}
    return {name: tensor.requires_grad_(name not in frozen) for name, tensor in made.items()}


def value_and_gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], options: dict[str, Any], grad_output: Tensor
) -> dict[str, Tensor]:
    """The output "y", and the gradient of each tensor that asks for one, by name."""
    asking = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    y = function(**tensors, **options)
    found = torch.autograd.grad(y, list(asking.values()), grad_output.to(y.device, y.dtype))
    return {"y": y.detach(), **dict(zip(asking, found, strict=True))}


@contextlib.contextmanager
def recording(case: Case, backends: list[tuple[str, str]]) -> Iterator[None]:
    """Within the context, (operator, backend) of each call that reaches one of the case's two ops."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func in (forward_op(case).default, backward_op(case).default):
                names = [argument.name for argument in func._schema.arguments]
                given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                backends.append((func._schema.name.split("::")[1], given["backend"]))
            return func(*args, **(kwargs or {}))

    with Record():
        yield


def each_input(cases: tuple[Case, ...]) -> list[Any]:
    """Parameters of a test: (case, one of its inputs) for every input that it has."""
    return [
        pytest.param((case, name), id=f"{case}: {name}")
        for case in cases
        for name in case.inputs
        if name in case.tensors()
    ]
