"""A BatchNorm's result that is not computed yet: what passes between a BatchNorm and the convolution that reads it.

A fused BatchNorm gives a `Normalised` in place of a tensor. An activation that it meets is noted. A module of this
package takes the raw tensor and the norm out of it, and runs both in one. Whatever else touches it (a function, a
method, an operator, an attribute) gets the tensor that the BatchNorm and the activation would have given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.nn.norm_units import batch_norm, norm_depthwise_conv2d, norm_separable_conv2d
from fused_sepconv.tensors.activations import ACTIVATIONS

ACTIVATION_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}


@dataclass
class NormCall:
    """One call of a BatchNorm, with all that it reads. The running statistics are updated when it runs, once."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    group: Any = None
    """The processes over which the statistics are taken."""

    def __post_init__(self) -> None:
        self._version = None if self.x.is_inference() else self.x._version
        self._result: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """The norm's arguments of the unit functions; a second call of them finds no running statistics to update."""
        if self._version is not None and self.x._version != self._version:
            raise RuntimeError(
                "a fused BatchNorm's input was modified in place before the convolution that reads its result: "
                "call fused_sepconv.unfuse_batch_norm(model)"
            )
        found = {
            "x": self.x,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "norm_weight": self.weight,
            "norm_bias": self.bias,
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
            "process_group": self.group,
        }
        if self.training:
            self.running_mean = self.running_var = None
        return found

    def result(self) -> Tensor:
        """The BatchNorm's own result."""
        if self._result is None:
            self._result = batch_norm(**self.arguments())
        return self._result


class Normalised:
    """The result of a `NormCall` and an activation after it."""

    __slots__ = ("activation", "norm")

    def __init__(self, norm: NormCall, activation: str | None = None) -> None:
        self.norm, self.activation = norm, activation

    def tensor(self) -> Tensor:
        """What it stands for."""
        return ACTIVATIONS[self.activation].forward(self.norm.result())

    def separable_conv2d(self, call: dict[str, Any]) -> Tensor:
        """A separable convolution of it; `call` has the arguments of `separable_conv2d`."""
        return self._unit(norm_separable_conv2d, call)

    def depthwise_conv2d(self, call: dict[str, Any]) -> Tensor:
        """A depthwise convolution of it; `call` has the arguments of `depthwise_conv2d`."""
        return self._unit(norm_depthwise_conv2d, call)

    def _unit(self, function: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        activation = self.activation or call["pre_activation"]
        return function(**{**call, "pre_activation": activation, **self.norm.arguments()})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and type(args[0]) is cls and len(args) == 1 and kwargs.keys() <= {"inplace"}:
            name = ACTIVATION_FUNCTIONS.get(function)
            if name is not None and args[0].activation is None:
                return cls(args[0].norm, name)
        return function(*_plain(args), **_plain(kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)


def _plain(value: Any) -> Any:
    if type(value) is Normalised:
        return value.tensor()
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return {key: _plain(one) for key, one in value.items()} if type(value) is dict else value


def _forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.tensor(), name)(*map(_plain, args))


for _name in (
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul") for side in ("", "r", "i")),
    *("__neg__", "__abs__", "__getitem__", "__len__", "__iter__", "__bool__", "__float__"),
    *("__lt__", "__le__", "__gt__", "__ge__"),
):
    setattr(Normalised, _name, _forwarded(_name))
