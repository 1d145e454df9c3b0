"""`optimize_for_inference`: BatchNorm, activations and residual additions folded into separable convolutions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_sepconv.nn.functional import separable_conv2d
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops.arguments import output_size, padding_form, padding_sides
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.transforms.adopted import (
    AdoptedSequential,
    class_name,
    is_depthwise,
    is_plain,
    is_pointwise,
    own_padding,
)
from fused_sepconv.transforms.batch_norm import FusedBatchNorm2d, FusedSyncBatchNorm
from fused_sepconv.transforms.dataflow import (
    Dataflow,
    has_defaults,
    is_touched,
    only_user,
    put,
    trace,
    works_in_place,
)
from fused_sepconv.transforms.isolation import all_or_nothing, random_state_kept
from fused_sepconv.transforms.lookahead import has_hooks
from fused_sepconv.transforms.report import ReplacementReport, check_model
from fused_sepconv.transforms.separable import separable_children, why_not

Operation = nn.Module | str
"""A norm that is an affine map of each channel, or the name of an activation."""

_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_FUNCTIONS = {F.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"}
_NOTHING = (nn.Identity, nn.modules.dropout._DropoutNd)
_NOTHING_NAMES = ("timm.layers.drop.DropPath", "torchvision.ops.stochastic_depth.StochasticDepth")
_NORM_AND_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FusedBatchNorm2d, FusedSyncBatchNorm)
_FROZEN_NORMS = ("torchvision.ops.misc.FrozenBatchNorm2d", "detectron2.layers.batch_norm.FrozenBatchNorm2d")
_MAKES_A_NEW_TENSOR = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, SeparableConv2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class FoldedSeparableConv2d(SeparableConv2d):
    """A separable convolution whose weights contain the BatchNorms that were round it: for evaluation alone."""

    def forward(self, x: Tensor, residual: Any = None, in_place: bool = False) -> Tensor:
        """The convolution, and the addition of a residual by PyTorch's own rules of shapes and dtypes; `in_place`:
        those of `z += residual`."""
        if self.training:
            raise RuntimeError("optimize_for_inference folded this model's BatchNorms: it cannot train any more")
        if residual is None:
            return super().forward(x)
        whole = self.runs_as_one()
        call = self.call(x) if whole else {}
        if whole and _fits(residual, call, self.halves()[1].out_channels):
            return separable_conv2d(**{**call, "residual": residual})
        z = separable_conv2d(**{**call, "activation": None}) if whole else self._children_result(x)
        z = z.add_(residual) if in_place else z + residual
        return ACTIVATIONS[self.activation].forward(z)


def _fits(residual: Any, call: dict[str, Any], features: int) -> bool:
    """Whether a residual has the shape and the dtype of a call's result."""
    x, kernel = call["x"], call["depthwise_weight"].shape[-2:]
    stride, dilation, size = call["stride"], call["dilation"], x.shape[-2:]
    sides = padding_sides(padding_form(call["padding"]), size, kernel, stride, dilation)
    cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
    return (
        isinstance(residual, Tensor)
        and residual.dtype == dtype
        and residual.device == x.device
        and residual.shape == (*x.shape[:-3], features, *output_size(size, kernel, stride, sides, dilation))
    )


def optimize_for_inference(model: nn.Module) -> ReplacementReport:
    """Folds what is round each depthwise and pointwise convolution into one call, in place, for evaluation.

    Depthwise -> BatchNorm -> ReLU, ReLU6, SiLU or hardswish -> pointwise -> BatchNorm -> activation, each of which may
    be absent, with an activation before and the addition of a residual after, becomes one `SeparableConv2d` with other
    weights. The results stay the same but for rounding. The `state_dict` changes, and the model cannot train any more:
    keep its weights elsewhere. A module whose forward adds a residual becomes a `torch.fx.GraphModule`, which has the
    module's children and its forward, and none of its other methods. What carries hooks, and what a forward keeps, stay
    as they are. Nothing of the model's own code runs on the model itself, and after an error nothing is replaced.

    Returns:
        A report: `.replaced` names the depthwise convolutions (or `SeparableConv2d`s) that now do it all, `.skipped`
        has (name, reason) of those that stayed.

    Raises:
        TypeError: a `model` that is no `nn.Module`.
        ValueError: a model, or a part of one, in training mode.
    """
    check_model(model)
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected one in evaluation mode; call model.eval() first")
    flow = Dataflow.of(model)
    inside = separable_children(model)
    candidates = {m: name for m, name in flow.names.items() if name and _is_candidate(m) and m not in inside}
    replaced, skipped = [], []
    chains = {chain.head: chain for chain in _chains(flow, candidates)}
    with all_or_nothing(model), random_state_kept():  # new modules are made with random weights first
        for module, name in candidates.items():
            if module in chains:
                chains[module].fold(flow)
                replaced.append(name)
            elif isinstance(module, SeparableConv2d):
                skipped.append((name, "there is nothing round it to fold"))
            else:
                skipped.append((name, why_not(flow, module)))
        _fold_residuals(model)
    return ReplacementReport(tuple(replaced), tuple(skipped))


def _is_candidate(module: nn.Module) -> bool:
    return is_depthwise(module) or type(module).forward in (SeparableConv2d.forward, AdoptedSequential.forward)


# What is round a pair -----------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """A pair and the modules round it that it can take in."""

    head: nn.Module
    """The module that will run it: the depthwise convolution, or a `SeparableConv2d`."""
    depthwise: nn.Conv2d
    pointwise: nn.Conv2d
    padding: Any
    pre_activation: str | None
    between: list[Operation]
    after: list[Operation]
    emptied: list[nn.Module]
    """The modules that have nothing left to do."""
    last: fx.Node
    """The call that gives the pair's result."""

    def fold(self, flow: Dataflow) -> None:
        flow.replace(self.head, self._folded())
        for module in self.emptied:
            flow.replace(module, nn.Identity().eval())

    @torch.no_grad()
    def _folded(self) -> FoldedSeparableConv2d:
        mid, after = _split(self.between), _split(self.after)
        weight, bias = _fold(self.depthwise, mid.norms)
        pointwise_weight, pointwise_bias = _fold(self.pointwise, after.norms)
        conv = self.depthwise
        folded = FoldedSeparableConv2d(
            conv.in_channels,
            self.pointwise.out_channels,
            conv.kernel_size,
            conv.stride,
            self.padding,
            conv.dilation,
            bias=pointwise_bias is not None,
            depth_multiplier=conv.out_channels // conv.in_channels,
            depthwise_bias=bias is not None,
            padding_mode=conv.padding_mode,
            pre_activation=self.pre_activation,
            mid_activation=mid.activation,
            activation=after.activation,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        values = {"depthwise.weight": weight, "depthwise.bias": bias}
        values |= {"pointwise.weight": pointwise_weight, "pointwise.bias": pointwise_bias}
        folded.load_state_dict({name: value for name, value in values.items() if value is not None})
        return folded.eval().requires_grad_(False)


def _chains(flow: Dataflow, candidates: Iterable[nn.Module]) -> Iterator[Chain]:
    candidates = set(candidates)
    taken: set[nn.Module] = set()
    for root, node, module in flow.nodes():
        if module not in candidates or not _is_free(flow, module):
            continue
        chain = (
            _separable_at(node, module) if isinstance(module, SeparableConv2d) else _pair_at(flow, root, node, module)
        )
        if chain is None:
            continue
        activation = _activation_before(flow, root, node)
        if chain.pre_activation is None and activation is not None and activation not in taken:
            (chain.pre_activation,) = _operations(activation)
            chain.emptied.append(activation)
        for _, user, operations in _following(flow, root, chain.last):
            if _split(chain.after + operations) is None:
                break
            chain.after += operations
            chain.emptied.append(user)
        taken.update(chain.emptied)
        if isinstance(module, nn.Conv2d) or chain.emptied:
            yield chain


def _separable_at(node: fx.Node, module: SeparableConv2d) -> Chain | None:
    """A `SeparableConv2d` as the beginning of a chain."""
    if not module.runs_as_one() or len(node.args) != 1 or node.kwargs:
        return None
    depthwise, pointwise = module.halves()
    padding = depthwise.padding
    if module._own_padding is not None:
        padding = "same" if module._own_padding == "same" else (module._own_padding[:2], module._own_padding[2:])
    mid, after = ([name] if name else [] for name in (module.mid_activation, module.activation))
    return Chain(module, depthwise, pointwise, padding, module.pre_activation, mid, after, [], last=node)


def _pair_at(flow: Dataflow, root: nn.Module, node: fx.Node, depthwise: nn.Conv2d) -> Chain | None:
    """The chain that a depthwise convolution begins: as far as the pointwise one, and what that has inside."""
    between, emptied = _own_operations(depthwise), []
    if between is None:
        return None
    last = node
    for call, user, operations in _following(flow, root, node):
        last = call
        between = between + operations
        emptied.append(user)
    last = only_user(last)
    if last is None or last.op != "call_module" or _split(between) is None:
        return None
    pointwise = root.get_submodule(last.target)
    if not is_pointwise(pointwise) or not _is_free(flow, pointwise):
        return None
    after = _own_operations(pointwise)
    if after is None or _split(after) is None:
        return None
    padding = own_padding(depthwise) or depthwise.padding
    return Chain(depthwise, depthwise, pointwise, padding, None, between, after, [*emptied, pointwise], last)


def _activation_before(flow: Dataflow, root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The activation whose result a node alone reads, if nobody misses it."""
    source = node.args[0] if len(node.args) == 1 else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or only_user(source) is not node:
        return None
    activation = root.get_submodule(source.target)
    is_one = type(activation) in _ACTIVATIONS and _is_free(flow, activation)
    return activation if is_one and _changes_nobody_s_input(root, source, activation) else None


def _following(flow: Dataflow, root: nn.Module, node: fx.Node) -> Iterator[tuple[fx.Node, nn.Module, list[Operation]]]:
    """The foldable modules that follow one another after a node, each the only reader of the last: (call, it, what it
    does)."""
    while (user := only_user(node)) is not None and user.op == "call_module":
        module = root.get_submodule(user.target)
        operations = _operations(module)
        if operations is None or not _is_free(flow, module):
            return
        yield user, module, operations
        node = user


def _is_free(flow: Dataflow, module: nn.Module) -> bool:
    return flow.is_called_once(module) and not is_touched(module)


def _changes_nobody_s_input(root: nn.Module, node: fx.Node, activation: nn.Module) -> bool:
    """Whether leaving an activation out leaves everybody else's tensors as they were: one that works in place must be
    the only reader of a new tensor, such as a convolution's."""
    if not getattr(activation, "inplace", False):
        return True
    (source,) = node.args
    is_new = source.op == "call_module" and isinstance(root.get_submodule(source.target), _MAKES_A_NEW_TENSOR)
    return is_new and len(source.users) == 1


# What a module does -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    norms: tuple[nn.Module, ...]
    activation: str | None


def _split(operations: list[Operation]) -> Split | None:
    """Norms, then perhaps one activation; None if it is anything else."""
    norms = tuple(operation for operation in operations if isinstance(operation, nn.Module))
    rest = operations[len(norms) :]
    if tuple(operations[: len(norms)]) != norms or len(rest) > 1:
        return None
    return Split(norms, rest[0] if rest else None)


def _operations(module: Any) -> list[Operation] | None:
    """The operations of a module in evaluation; None if they can't be folded."""
    name = class_name(module)
    if isinstance(module, _NOTHING) or name in _NOTHING_NAMES:
        return []
    if type(module) in _ACTIVATIONS:
        return [_ACTIVATIONS[type(module)]]
    if type(module) in _BATCH_NORMS or name in _FROZEN_NORMS:
        return [module] if module.running_mean is not None else None
    if name in _NORM_AND_ACTIVATION and module.running_mean is not None:
        activation = _operations(module.act)
        return None if activation is None else [module, *activation]
    return None


def _own_operations(conv: nn.Conv2d) -> list[Operation] | None:
    """The operations inside a convolution, after it: detectron2's has a norm and an activation."""
    if is_plain(conv):
        return []
    if class_name(conv) != "detectron2.layers.wrappers.Conv2d":
        return None
    norm = [] if conv.norm is None else _operations(conv.norm)
    if conv.activation is None:
        return norm
    activation = [_FUNCTIONS[conv.activation]] if conv.activation in _FUNCTIONS else _operations(conv.activation)
    return None if norm is None or activation is None else norm + activation


def _fold(conv: nn.Conv2d, norms: tuple[nn.Module, ...]) -> tuple[Tensor, Tensor | None]:
    """The weight and bias, in float64, of a convolution and the norms after it:
    (w x + b - mean) * weight / sqrt(var + eps) + bias."""
    weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
    for norm in norms:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return weight, bias


# Residual additions -------------------------------------------------------------------------------------------------


def _fold_residuals(model: nn.Module) -> None:
    """Each module whose own forward adds something to what a folded convolution gives becomes a graph without it."""
    names = sorted(
        (name for name, module in model.named_modules() if name and not isinstance(module, nn.Sequential)),
        key=lambda name: name.count("."),
        reverse=True,  # inner modules first
    )
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, SeparableConv2d) or has_hooks(module) or has_defaults(module):
            continue
        if not any(isinstance(child, FoldedSeparableConv2d) for child in module.modules()):
            continue
        try:
            graph, _, _, has_effects, constants = trace(module)
        except Exception:  # a forward that decides by values or shapes keeps its addition
            continue
        if not has_effects and _fold_additions(module, graph):
            graph.lint()
            targets = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")} - constants.keys()
            root = constants | {target: operator.attrgetter(target)(module) for target in targets}
            folded = fx.GraphModule(root, graph, type(module).__name__)
            folded.__dict__["training"] = module.training
            put(model, name, folded)


def _fold_additions(root: nn.Module, graph: fx.Graph) -> bool:
    folded = False
    for addition in list(graph.nodes):
        if not _is_addition(addition):
            continue
        in_place = addition.target in (operator.iadd, "add_")
        if addition.args[0] is addition.args[1]:
            continue
        for summand, other in (addition.args, addition.args[::-1])[: 1 if in_place else 2]:
            passed = _as_far_as_the_convolution(root, summand)
            if not passed or not _may_wait(root, passed[-1], addition):
                continue
            call = passed[-1]
            root.get_submodule(call.target).activation = _take_activation(root, addition)
            with graph.inserting_before(addition):
                whole = graph.call_module(call.target, (call.args[0], other), {"in_place": True} if in_place else {})
            addition.replace_all_uses_with(whole)
            for node in (addition, *passed):
                graph.erase_node(node)
            folded = True
            break
    return folded


def _is_addition(node: fx.Node) -> bool:
    is_add = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return is_add and not node.kwargs and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def _as_far_as_the_convolution(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The nodes from a result back to the folded convolution that it is of, through identities; empty if it is of none,
    of one that has an activation, or if something else reads it too."""
    passed = []
    while node.op == "call_module" and len(node.users) == 1 and not is_touched(root.get_submodule(node.target)):
        module = root.get_submodule(node.target)
        passed.append(node)
        if isinstance(module, FoldedSeparableConv2d):
            return passed if len(node.args) == 1 and module.activation is None else []
        if not isinstance(module, nn.Identity):
            return []
        (node,) = node.args
    return []


def _may_wait(root: nn.Module, call: fx.Node, addition: fx.Node) -> bool:
    """Whether a convolution reads the same where the addition is: nothing in between writes into a tensor."""
    node = call.next
    while node is not addition:
        if works_in_place(root, node):
            return False
        node = node.next
    return True


def _take_activation(root: nn.Module, addition: fx.Node) -> str | None:
    """The activation after an addition, taken out of the graph."""
    user = only_user(addition)
    if user is None or user.op != "call_module":
        return None
    module = root.get_submodule(user.target)
    if type(module) not in _ACTIVATIONS or is_touched(module):
        return None
    user.replace_all_uses_with(addition)
    user.graph.erase_node(user)
    return _ACTIVATIONS[type(module)]
