"""A model's code run where nothing of it reaches the model, and changes that are made whole or not at all."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = "_hooks"
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)


class Twin:
    """A copy of a module to run in its stead: same structure, own parameters, buffers and attributes, no hooks.

    Made without calling anything of the module's own, and in the mode asked for without calling `train`.
    """

    def __init__(self, original: nn.Module, training: bool | None = None) -> None:
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that their ids stay theirs
        self.module = self._copy(original)
        self.original_of = {
            copied: source
            for source in self._originals
            if isinstance(source, nn.Module) and isinstance(copied := self._copies[id(source)], nn.Module)
        }
        if training is not None:
            for module in self.original_of:
                module.__dict__["training"] = training

    def state(self) -> list[Any]:
        """All that running the copy may change, to be compared with the same later."""
        return [_state(copied) for copied in self._copies.values()] + [_random_state()[:2]]

    def _copy(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        new, fill = self._begin(value)
        if new is not value:
            self._copies[id(value)] = new
            self._originals.append(value)
            fill()
        return new

    def _begin(self, value: Any) -> tuple[Any, Any]:
        """(A copy that is still empty, what fills it); the value itself where it is shared."""
        kind = type(value)
        if isinstance(value, torch.jit.ScriptModule):
            return value, None
        if isinstance(value, nn.Module):
            new = object.__new__(kind)
            return new, lambda: self._fill(new, value)
        if isinstance(value, Tensor):
            return self._tensor(value), lambda: None
        if kind in _CONTAINERS:
            return self._container(value)
        if isinstance(value, tuple):
            items = [self._copy(item) for item in value]
            changed = any(new is not item for new, item in zip(items, value, strict=True))
            if not changed or not (kind is tuple or hasattr(value, "_fields")):
                return value, None
            return (tuple(items) if kind is tuple else kind(*items)), lambda: None
        if kind is MethodType:
            return MethodType(value.__func__, self._copy(value.__self__)), lambda: None
        if kind is functools.partial:
            arguments = [self._copy(argument) for argument in value.args]
            keywords = {name: self._copy(argument) for name, argument in value.keywords.items()}
            return functools.partial(self._copy(value.func), *arguments, **keywords), lambda: None
        if isinstance(value, random.Random) or kind.__module__.startswith("numpy.random"):
            return copy.deepcopy(value), lambda: None
        if isinstance(value, torch.Generator):
            return value.clone_state(), lambda: None
        if hasattr(value, "__dict__") and _is_a_plain_object(kind):
            new = object.__new__(kind)
            return new, lambda: self._fill(new, value)
        return value, None

    def _container(self, value: Any) -> tuple[Any, Any]:
        new = copy.copy(value)
        new.clear()
        if isinstance(value, dict):
            return new, lambda: new.update((key, self._copy(item)) for key, item in value.items())
        add = new.update if isinstance(value, set) else new.extend
        return new, lambda: add([self._copy(item) for item in value])

    def _fill(self, new: Any, value: Any) -> None:
        for name, attribute in vars(value).items():
            if isinstance(value, nn.Module) and _HOOKS in name and isinstance(attribute, dict):
                new.__dict__[name] = OrderedDict()
            else:
                new.__dict__[name] = self._copy(attribute)

    def _tensor(self, value: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                new = value.detach().clone()
        except Exception:  # parameters without a shape yet, and subclasses that cannot be copied
            return value
        if isinstance(value, nn.Parameter):
            return nn.Parameter(new, requires_grad=value.requires_grad)
        return new.requires_grad_(value.requires_grad)


def _is_a_plain_object(kind: type) -> bool:
    """Whether an object's attributes are all that there is to it."""
    return (
        not issubclass(kind, (type, BaseException))
        and kind.__module__.split(".")[0] not in {*sys.stdlib_module_names, "torch", "numpy"}
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
    )


def _state(value: Any) -> Any:
    # With the objects themselves: an id is then of no other one, and nothing else of them is compared.
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, (dict, OrderedDict)):
        return [(key, id(item), item) for key, item in value.items()]
    if isinstance(value, (list, set, deque)):
        return [(id(item), item) for item in value]
    if hasattr(value, "__dict__"):
        # torch.fx puts the constants that it meets beside the others.
        constant = "_tensor_constant"
        return [(name, id(item), item) for name, item in vars(value).items() if not name.startswith(constant)]
    return None


def _random_state() -> tuple:
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
    )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Keeps the random numbers after it what they would have been, whatever is drawn within."""
    _, python, numpy = _random_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                sys.modules["numpy"].random.set_state(numpy)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """A model in which nothing is replaced, if an error ends what is being done to it."""
    before = [(module, type(module), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, children in before:
            if type(module) is not kind:
                module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
        raise
