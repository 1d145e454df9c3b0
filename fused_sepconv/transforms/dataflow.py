"""What follows what in a model: `torch.fx` graphs of as much of its forward as can be traced.

A model is traced whole where that works. Where a forward looks at values or shapes to decide what to do, its children
are traced one by one instead: what such a forward does between them is not known, and nothing is concluded from it.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fused_sepconv.nn.separable import SeparableConv2d

_LEAVES = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, SeparableConv2d)


IN_PLACE = {
    f"__i{name}__": getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
"""What `x += y` and its like are called, and do."""


class _Proxy(fx.Proxy):
    """A stand-in for a tensor that records `x += y` as what it is: `fx.Proxy` has `x = x + y`, another tensor."""


def _record(function: Callable[..., Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name, _function in IN_PLACE.items():
    setattr(_Proxy, _name, _record(_function))


class _Tracer(fx.Tracer):
    """Enters containers; what has no children, or is a convolution or a norm whatever it contains, is one node."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or not any(True for _ in m.children())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        self.entered.add(m)
        return super().call_module(m, forward, args, kwargs)


def trace(module: nn.Module) -> tuple[fx.Graph, set[nn.Module]]:
    """A module's graph, arguments that have defaults at those, and the modules that its forward calls."""
    tracer = _Tracer()
    return tracer.trace(module, _defaults(module) or None), tracer.entered


def has_defaults(module: nn.Module) -> bool:
    """Whether a module's forward has arguments that a caller may leave out, which its graph would insist on."""
    return bool(_defaults(module))


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@dataclass
class Dataflow:
    """The graphs of a model, which together call each of its modules that can be seen to be called."""

    model: nn.Module
    names: dict[nn.Module, str]
    graphs: list[tuple[nn.Module, fx.Graph]] = field(default_factory=list)
    failures: dict[nn.Module, str] = field(default_factory=dict)
    """Modules whose forward could not be traced, and the error."""
    calls: Counter[nn.Module] = field(default_factory=Counter)
    """How often each module is called."""
    places: Counter[nn.Module] = field(default_factory=Counter)
    """How many names each module has: more than one where it is shared."""

    @classmethod
    def of(cls, model: nn.Module) -> Dataflow:
        flow = cls(model, {module: name for name, module in model.named_modules()})
        flow.places.update(module for _, module in model.named_modules(remove_duplicate=False))
        flow._visit(model, set())
        for root, graph in flow.graphs:
            flow.calls.update(root.get_submodule(node.target) for node in graph.nodes if node.op == "call_module")
        return flow

    def _visit(self, module: nn.Module, seen: set[nn.Module]) -> None:
        if module in seen or isinstance(module, _LEAVES) or not any(True for _ in module.children()):
            return
        seen.add(module)
        try:
            graph, entered = trace(module)
        except Exception as error:  # whatever a forward may raise when it is handed a stand-in for a tensor
            self.failures[module] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        else:
            # A container that is not called, but whose children are, is no second caller of theirs.
            seen |= entered | {m for m in module.modules() if entered.intersection(m.children())}
            self.graphs.append((module, graph))
        for child in module.modules():  # those that were not called
            self._visit(child, seen)

    def nodes(self) -> Iterator[tuple[nn.Module, fx.Node, nn.Module]]:
        """(traced module, node, the module it calls) of every call of a module."""
        for root, graph in self.graphs:
            for node in graph.nodes:
                if node.op == "call_module":
                    yield root, node, root.get_submodule(node.target)

    def is_called_once(self, module: nn.Module) -> bool:
        return self.calls[module] == 1 and self.places[module] == 1

    def why_unseen(self, module: nn.Module) -> str:
        """Why no graph has a call of the module."""
        name = self.names[module]
        while name:
            name = name.rpartition(".")[0]
            parent = self.model.get_submodule(name)
            if parent in self.failures:
                return f"the forward of {name or 'the model'} cannot be traced ({self.failures[parent]})"
        return "no forward calls it"

    def replace(self, module: nn.Module, new: nn.Module) -> None:
        """Puts `new` where `module` is, which is not the model itself."""
        parent, _, child = self.names[module].rpartition(".")
        setattr(self.model.get_submodule(parent), child, new)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads a node's result, as its first and only argument; None where there is another."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.args == (node,) and not user.kwargs else None


def works_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node of a module's graph writes into a tensor that it is given."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(node.target), "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_")
    return node.op == "call_function" and (node.target in IN_PLACE.values() or bool(node.kwargs.get("inplace")))


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or in evaluation mode, and each module afterwards as it was."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
