"""`replace_separable_convs`: a model's own depthwise and pointwise convolutions, run as one."""

from __future__ import annotations

import inspect

from torch import fx, nn

from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.transforms.adopted import (
    AdoptedSeparableConv2d,
    DepthwiseOfPair,
    PointwiseOfPair,
    is_depthwise,
    is_detectron2,
    is_plain,
    is_pointwise,
)
from fused_sepconv.transforms.dataflow import Dataflow, only_user, trace
from fused_sepconv.transforms.isolation import all_or_nothing
from fused_sepconv.transforms.lookahead import has_hooks
from fused_sepconv.transforms.report import ReplacementReport, check_model


def replace_separable_convs(model: nn.Module) -> ReplacementReport:
    """Runs each depthwise convolution of a model together with the pointwise one right after it, in place.

    Parameters, `state_dict` keys and results stay what they are, in training and in evaluation. Pairs are found by
    what follows what in the model's forward (with `torch.fx`), not by names: two attributes of a module or neighbours
    in an `nn.Sequential`. A module that does and offers nothing but calling the two is replaced by a
    `SeparableConv2d`. Elsewhere each of the two stays the convolution that it was; only where the code that calls them
    hands the result of the one straight to the other, and keeps it nowhere, do they run as one. Nothing of the model's
    own code runs on the model itself, and after an error nothing is replaced.

    Returns:
        A report: `.replaced` names the modules that now run a pair, `.skipped` has (name, reason) of every depthwise
        convolution that was left: with something between it and the pointwise one (`optimize_for_inference` folds
        most of that, for evaluation), without a pointwise one, shared, carrying hooks, or in a forward that `torch.fx`
        cannot trace.

    Raises:
        TypeError: a `model` that is no `nn.Module`.
    """
    check_model(model)
    training_flow, flow = Dataflow.of(model, training=True), Dataflow.of(model, training=False)
    in_training, pairs = dict(_pairs(training_flow)), dict(_pairs(flow))
    replaced, skipped = [], []
    inside = separable_children(model)
    with all_or_nothing(model):
        for depthwise, name in [(m, name) for m, name in flow.names.items() if _waits(m) and m not in inside]:
            pointwise = pairs.get(depthwise)
            if pointwise is None:
                skipped.append((name, why_not(flow, depthwise)))
            elif in_training.get(depthwise) is not pointwise:
                skipped.append((name, f"in training, {why_not(training_flow, depthwise)}"))
            else:
                replaced.append(_join(flow, depthwise, pointwise))
    return ReplacementReport(tuple(replaced), tuple(skipped))


def separable_children(model: nn.Module) -> set[nn.Module]:
    """What is inside the `SeparableConv2d`s of a model, and runs already."""
    return {child for m in model.modules() if isinstance(m, SeparableConv2d) for child in m.modules() if child is not m}


def _waits(module: nn.Module) -> bool:
    return is_depthwise(module) and not isinstance(module, DepthwiseOfPair)


def _pairs(flow: Dataflow) -> list[tuple[nn.Module, nn.Module]]:
    return [
        (depthwise, pointwise)
        for root, node, depthwise in flow.nodes()
        if _waits(depthwise) and (pointwise := _partner(flow, root, node, depthwise)) is not None
    ]


def _partner(flow: Dataflow, root: nn.Module, node: fx.Node, depthwise: nn.Conv2d) -> nn.Conv2d | None:
    user = only_user(node)
    if user is None or user.op != "call_module":
        return None
    pointwise = root.get_submodule(user.target)
    fits = flow.followed_by.get(depthwise) is pointwise and is_pointwise(pointwise)
    fits = fits and all(
        is_plain(conv) and flow.is_called_once(conv) and not has_hooks(conv) for conv in (depthwise, pointwise)
    )
    return pointwise if fits and depthwise.padding_mode == "zeros" else None


def _join(flow: Dataflow, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> str:
    """Makes a pair of the two, and gives the name of what runs it."""
    name, partner = flow.names[depthwise], flow.names[pointwise]
    parent_name, _, child = name.rpartition(".")
    partner_parent, _, partner_child = partner.rpartition(".")
    parent = flow.model.get_submodule(parent_name)
    if (
        parent_name
        and parent_name == partner_parent
        and flow.places[parent] == 1
        and _is_nothing_else(parent, depthwise, pointwise)
    ):
        flow.replace(parent, AdoptedSeparableConv2d.adopt(parent, child, partner_child))
        return parent_name
    DepthwiseOfPair.take(depthwise)
    if not isinstance(pointwise, PointwiseOfPair):
        PointwiseOfPair.take(pointwise)
    return name


def _is_nothing_else(module: nn.Module, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> bool:
    """Whether a module's forward is one call of each, and it has nothing else that a replacement would lose."""
    if has_hooks(module) or module._parameters or module._buffers or set(module.children()) != {depthwise, pointwise}:
        return False
    if not type(depthwise) is type(pointwise) is nn.Conv2d or _public_names(module):
        return False
    if not isinstance(module, nn.Sequential) and list(inspect.signature(module.forward).parameters) != ["x"]:
        return False  # it may be called in a way that a SeparableConv2d may not
    graph, _, _, has_effects, _ = trace(module)
    if has_effects:
        return False
    return [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_module", "output"] and isinstance(
        list(graph.nodes)[-1].args[0], fx.Node
    )


def _public_names(module: nn.Module) -> set[str]:
    """What a module offers beyond its forward and what any `nn.Module` (or `nn.Sequential`) does."""
    own = [vars(base) for base in type(module).__mro__ if not base.__module__.startswith("torch.nn.")]
    names = {name for namespace in (*own, vars(module)) for name in namespace if not name.startswith("_")}
    return names - vars(nn.Module).keys() - {"forward", "training"}


# Why not ------------------------------------------------------------------------------------------------------------


def why_not(flow: Dataflow, depthwise: nn.Conv2d) -> str:
    """Why a depthwise convolution runs with no pointwise one."""
    calls = [(root, node) for root, node, module in flow.nodes() if module is depthwise]
    if not calls:
        return flow.why_unseen(depthwise)
    if not flow.is_called_once(depthwise):
        return "it is called in several places"
    if has_hooks(depthwise):
        return "it carries hooks"
    if is_detectron2(depthwise) and not is_plain(depthwise):
        return "it has a norm or an activation of its own after it"
    if not is_plain(depthwise):
        return f"a {type(depthwise).__name__} is more than a convolution"
    if depthwise.padding_mode != "zeros":
        return f"its padding_mode is {depthwise.padding_mode!r}"
    root, node = calls[0]
    between = []
    while True:
        if node.meta.get("kept"):
            return f"its result{_after(between)} is kept by {flow.names[root] or 'the model'}"
        if len(node.users) != 1:
            readers = ", ".join(dict.fromkeys(_reader(flow, root, user) for user in node.users))
            return f"its result{_after(between)} is used in {len(node.users)} places: {readers}"
        (node,) = node.users
        if node.op == "output":
            return f"no pointwise convolution follows{_after(between)} in {flow.names[root] or 'the model'}"
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d):
            between.append(type(module).__name__ if module is not None else _function_name(node))
            continue
        if not is_pointwise(module):
            return f"no pointwise convolution follows{_after(between)}, but {flow.names[module]}, {module}"
        if between:
            return f"{_list(between)} between it and the pointwise convolution {flow.names[module]}"
        if is_plain(module) and flow.is_called_once(module) and not has_hooks(module):
            return (
                f"the code that calls it and the pointwise convolution {flow.names[module]} is not of the form "
                "pointwise(depthwise(x))"
            )
        reason = "carries hooks" if has_hooks(module) else "is called in several places"
        if not is_plain(module):
            reason = f"is more than a convolution, a {type(module).__name__}"
        return f"the pointwise convolution {flow.names[module]} {reason}"


def _reader(flow: Dataflow, root: nn.Module, node: fx.Node) -> str:
    """What reads a result: the module in whose forward it does, such as a squeeze-and-excitation block."""
    if node.op == "call_module":
        return flow.names[root.get_submodule(node.target)]
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = root.get_submodule(stack[-1][0]) if stack and isinstance(stack[-1][0], str) else root
    return f"{type(module).__name__} {flow.names[module]}".strip()


def _after(between: list[str]) -> str:
    return f" after {_list(between)}" if between else ""


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _function_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
