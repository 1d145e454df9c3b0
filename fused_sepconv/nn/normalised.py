"""A BatchNorm's result that is not computed yet: what passes between a BatchNorm and the convolution that reads it.

A fused BatchNorm gives a `Normalised` in place of a tensor. An activation or a max-pooling that it meets is noted. A
module of this package takes the raw tensor and the norm out of it, and runs both in one; so does an addition. Whatever
else touches it (a function, a method, an operator, an attribute) gets the tensor that the BatchNorm and what followed
it would have given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.nn.functional import depthwise_conv2d, separable_conv2d
from fused_sepconv.nn.norm_units import batch_norm, joined, norm_depthwise_conv2d, norm_separable_conv2d
from fused_sepconv.ops.joins import Window
from fused_sepconv.tensors.activations import ACTIVATIONS

ACTIVATION_FUNCTIONS: dict[Callable[..., Tensor], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}


ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


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

    def read(self) -> dict[str, Any]:
        """The norm's arguments of the unit functions."""
        if self._version is not None and self.x._version != self._version:
            raise RuntimeError(
                "a fused BatchNorm's input was modified in place before its result was read: "
                "call fused_sepconv.unfuse_batch_norm(model)"
            )
        return {
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

    def done(self) -> None:
        """Notes that the norm has run: a second time finds no running statistics to update."""
        if self.training:
            self.running_mean = self.running_var = None

    def arguments(self) -> dict[str, Any]:
        """As `read`, for whoever runs the norm."""
        found = self.read()
        self.done()
        return found

    def has_result(self) -> bool:
        return self._result is not None

    def result(self) -> Tensor:
        """The BatchNorm's own result."""
        if self._result is None:
            self._result = batch_norm(**self.arguments())
        return self._result


class Normalised:
    """The result of a `NormCall` and of an activation or a max-pooling after it."""

    __slots__ = ("activation", "norm", "window")

    def __init__(self, norm: NormCall, activation: str | None = None, window: Window | None = None) -> None:
        self.norm, self.activation, self.window = norm, activation, window

    def tensor(self) -> Tensor:
        """What it stands for."""
        if self.window is None:
            return ACTIVATIONS[self.activation].forward(self.norm.result())
        found = None if self.norm.has_result() else self._joined(None)
        return self.window.pool(self.norm.result()) if found is None else found

    @property
    def shape(self) -> torch.Size:
        shape = self.norm.x.shape
        return shape if self.window is None else torch.Size((*shape[:2], *self.window.size))

    def plus(self, other: Any, add: Callable[[Any, Any], Any] = operator.add) -> Any:
        """The sum with a tensor, or with what stands for one; by `add` where no kernel makes it."""
        pair = [self, other]
        if type(other) is Normalised and other.window is not None and self.window is None:
            pair.reverse()  # the one that is pooled is the first
        first, second = pair
        if type(second) is Normalised and not second._is_bare():
            second = second.tensor()
        if first.activation is None and not first.norm.has_result() and isinstance(second, (Tensor, Normalised)):
            found = first._joined(second)
            if found is not None:
                return found
        return add(self.tensor(), _plain(other))

    def _is_bare(self) -> bool:
        """Tells a norm alone, which nobody has run yet."""
        return self.activation is None and self.window is None and not self.norm.has_result()

    def _joined(self, other: Tensor | Normalised | None) -> Tensor | None:
        norms = [self.norm, other.norm] if type(other) is Normalised else [self.norm]
        found = joined(self.norm.read(), self.window, norms[1].read() if len(norms) > 1 else other)
        if found is not None:
            for norm in norms:
                norm.done()
        return found

    def separable_conv2d(self, call: dict[str, Any]) -> Tensor:
        """A separable convolution of it; `call` has the arguments of `separable_conv2d`."""
        if self.window is not None:
            return separable_conv2d(**{**call, "x": self.tensor()})
        return self._unit(norm_separable_conv2d, call)

    def depthwise_conv2d(self, call: dict[str, Any]) -> Tensor:
        """A depthwise convolution of it; `call` has the arguments of `depthwise_conv2d`."""
        if self.window is not None:
            return depthwise_conv2d(**{**call, "x": self.tensor()})
        return self._unit(norm_depthwise_conv2d, call)

    def _unit(self, function: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        activation = self.activation or call["pre_activation"]
        return function(**{**call, "pre_activation": activation, **self.norm.arguments()})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and type(args[0]) is cls and args[0].activation is None and args[0].window is None:
            name = ACTIVATION_FUNCTIONS.get(function)
            if name is not None and len(args) == 1 and kwargs.keys() <= {"inplace"}:
                return cls(args[0].norm, name)
            if function is F.max_pool2d or function in POOLINGS:
                window = window_of(args[0].shape, *args[1:], **kwargs)
                if window is not None:
                    return cls(args[0].norm, window=window)
        if function in ADDITIONS and len(args) == 2 and not kwargs:
            first, second = args
            return first.plus(second) if type(first) is cls else second.plus(first)
        return function(*_plain(args), **_plain(kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)


POOLINGS = (F.max_pool2d, torch.max_pool2d, F._max_pool2d)


def window_of(
    shape: Sequence[int],
    kernel_size: Any = None,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Window | None:
    """The window of a max-pooling that a BatchNorm can be joined to; None of another one."""
    sides = _pair(padding)
    wanted = _pair(kernel_size) == (3, 3) and _pair(stride) == (2, 2) and _pair(dilation) == (1, 1)
    if not wanted or return_indices or sides is None or not all(side in (0, 1) for side in sides):
        return None
    size = tuple(shape[2:])
    if len(size) != 2 or not all(type(side) is int and side >= 3 for side in size):
        return None
    return Window.of(size, sides, bool(ceil_mode))


def _pair(value: Any) -> tuple[int, int] | None:
    if type(value) is int:
        return value, value
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def _plain(value: Any) -> Any:
    if type(value) is Normalised:
        return value.tensor()
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return {key: _plain(one) for key, one in value.items()} if type(value) is dict else value


def _forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(self.tensor(), name)(*map(_plain, args))


for _name in (
    *(f"__{side}{name}__" for name in ("sub", "mul", "truediv", "pow", "matmul") for side in ("", "r", "i")),
    *("__neg__", "__abs__", "__getitem__", "__len__", "__iter__", "__bool__", "__float__"),
    *("__lt__", "__le__", "__gt__", "__ge__"),
):
    setattr(Normalised, _name, _forwarded(_name))
Normalised.__add__ = Normalised.__radd__ = Normalised.plus
Normalised.__iadd__ = lambda self, other: self.plus(other, operator.iadd)
