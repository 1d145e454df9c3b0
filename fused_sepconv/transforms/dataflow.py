"""What follows what in a model: `torch.fx` graphs of as much of its forward as can be traced.

A model is traced whole where that works. Where a forward looks at values or shapes to decide what to do, its children
are traced one by one instead: what such a forward does between them is not known, and nothing is concluded from it.

What runs is a twin of the model, in whichever mode is asked for; the model itself is only looked at.
"""

from __future__ import annotations

import gc
import inspect
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

from torch import fx, nn

from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.transforms.isolation import Twin, random_state_kept
from fused_sepconv.transforms.lookahead import has_hooks, next_module

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


class Trace(NamedTuple):
    """What a module's forward does. Its graph's targets are names in the module itself."""

    graph: fx.Graph
    called: set[nn.Module]
    """The modules that the forward calls, at any depth."""
    followed_by: dict[nn.Module, nn.Module]
    """For a convolution, the module that its caller hands its result to, and to nobody else."""
    has_effects: bool
    """Whether the forward changes attributes, keeps tensors or draws random numbers, which its graph does not show."""
    constants: dict[str, Any]
    """Attributes that the graph reads and the module lacks."""


class _Tracer(fx.Tracer):
    """Enters containers; what has no children or carries hooks, or is a convolution or a norm whatever it contains, is
    one node. No hooks run."""

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin = twin
        self.entered: set[nn.Module] = set()
        self.followed_by: dict[nn.Module, nn.Module] = {}
        self.proxies: list[tuple[weakref.ref, fx.Node]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        original = self.twin.original_of.get(m, m)
        return isinstance(m, _LEAVES) or has_hooks(original) or not any(True for _ in m.children())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append((weakref.ref(proxy), node))
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        self.entered.add(m)
        if isinstance(m, nn.Conv2d):
            follower = next_module(m, sys._getframe(), _caller_in_a_trace)
            if follower is not None:
                self.followed_by[m] = follower
        return super().call_module(m, m.forward, args, kwargs)  # `forward` would run hooks for all modules

    def mark_what_is_kept(self) -> bool:
        """Marks the nodes whose results somebody still holds after the forward."""
        if any(proxy() is not None for proxy, _ in self.proxies):
            gc.collect()
        kept = [node for proxy, node in self.proxies if proxy() is not None]
        for node in kept:
            node.meta["kept"] = True
        return bool(kept)


def _caller_in_a_trace(frame: FrameType | None) -> FrameType | None:
    """The frame that called the module whose forward, or this tracer's stand-in for it, `frame` is."""
    frame = frame if frame.f_code is _Tracer.call_module.__code__ else frame.f_back
    while frame is not None and frame.f_code.co_filename in (__file__, fx._symbolic_trace.__file__):
        frame = frame.f_back
    return frame


def trace(module: nn.Module, training: bool | None = None) -> Trace:
    """A module's forward, arguments that have defaults at those; in a mode, or in that which each module is in.

    Raises whatever a forward may raise when it is handed a stand-in for a tensor.
    """
    twin = Twin(module, training)
    tracer, of = _Tracer(twin), twin.original_of
    with random_state_kept():
        before = twin.state()
        graph = tracer.trace(twin.module, _defaults(twin.module) or None)
        graph._tracer_cls = None  # a module made of the graph is unpickled without this tracer
        has_effects = tracer.mark_what_is_kept() | (twin.state() != before)
    constants = {
        node.target: getattr(twin.module, node.target)
        for node in graph.nodes
        if node.op == "get_attr" and node.target.startswith("_tensor_constant") and not hasattr(module, node.target)
    }
    followed_by = {of[m]: of[follower] for m, follower in tracer.followed_by.items() if m in of and follower in of}
    return Trace(graph, {of.get(m, m) for m in tracer.entered}, followed_by, has_effects, constants)


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
    training: bool | None
    names: dict[nn.Module, str]
    graphs: list[tuple[nn.Module, fx.Graph]] = field(default_factory=list)
    failures: dict[nn.Module, str] = field(default_factory=dict)
    """Modules whose forward could not be traced, and the error."""
    calls: Counter[nn.Module] = field(default_factory=Counter)
    """How often each module is called."""
    places: Counter[nn.Module] = field(default_factory=Counter)
    """How many names each module has: more than one where it is shared."""
    followed_by: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """For a convolution, the module that its caller hands its result to, and to nobody else."""

    @classmethod
    def of(cls, model: nn.Module, training: bool | None = None) -> Dataflow:
        flow = cls(model, training, {module: name for name, module in model.named_modules()})
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
            traced = trace(module, self.training)
            for node in traced.graph.nodes:
                if node.op == "call_module":
                    module.get_submodule(node.target)
        except Exception as error:  # whatever a forward may raise when it is handed a stand-in for a tensor
            self.failures[module] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        else:
            called = {m for m in traced.called if not has_hooks(m)}
            # A container that is not called, but whose children are, is no second caller of theirs.
            seen |= called | {m for m in module.modules() if called.intersection(m.children())}
            self.graphs.append((module, traced.graph))
            self.followed_by.update(traced.followed_by)
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
        put(self.model, self.names[module], new)


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module where another is; unlike `setattr`, it calls nothing of the model's own."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads a node's result, as its first and only argument; None where there is another."""
    if len(node.users) != 1 or node.meta.get("kept"):
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


def is_touched(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class says: hooks of it or inside it, or a forward of its own."""
    return any(has_hooks(m) or "forward" in vars(m) for m in module.modules())
