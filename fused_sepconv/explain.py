"""`explain`: the plan for a call or for a model, as text and as data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_sepconv.nn.depthwise import DepthwiseConv
from fused_sepconv.nn.functional import depthwise_conv2d, separable_conv2d
from fused_sepconv.nn.normalised import Normalised
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops import launching, problems, saving
from fused_sepconv.ops.arguments import Call, DepthwiseArguments, normalise, normalise_depthwise
from fused_sepconv.ops.backend import use_backend
from fused_sepconv.ops.operators import SEPARABLE_CONV2D
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import Plan, plan, saving_pays
from fused_sepconv.planning.problem import Problem
from fused_sepconv.transforms.adopted import DepthwiseOfPair, PointwiseOfPair


@dataclass(frozen=True)
class Explanation:
    """The plans of one call. `str()` is the text, `as_dict()` the data; times are in seconds.

    They are predictions, but for a candidate's `measured_seconds`: what was measured on this GPU, here or in an earlier
    process. The measured candidates come first, the one that "auto" runs in front. `excluded` says why "auto" leaves
    one out that could run: its result was wrong there, or its launch failed.
    """

    forward: Plan
    """Without gradients."""
    backward: Plan
    saving: Plan | None = None
    """The forward with gradients, where it saves the depthwise result for the backward."""

    @property
    def saved_bytes(self) -> int:
        """Of the depthwise result, where it is saved."""
        return 0 if self.saving is None else self.saving.problem.intermediate_bytes

    def __str__(self) -> str:
        lines = [str(self.forward), str(self.backward)]
        if self.saving is not None:
            lines.insert(1, f"with gradients, {self.saved_bytes / 1e6:.1f} MB saved for the backward: {self.saving}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        plans = {name: value for name, value in asdict(self).items() if value is not None}
        for plan_data in plans.values():
            for candidate in plan_data["candidates"]:
                if candidate["refusal"]:
                    candidate["predicted_seconds"] = None  # JSON has no infinity
        return {**plans, "saved_bytes": self.saved_bytes}


@dataclass(frozen=True)
class ModelExplanation:
    """The plans of every `SeparableConv2d` and `DepthwiseConv2d` of a model, and of every pair that runs as one, in the
    order in which they ran."""

    layers: tuple[tuple[str, Explanation], ...]  # (module name, its plans)
    children_called: tuple[str, ...]
    """Modules whose children carry something of their own, and so run as two convolutions, without a plan."""
    multiply_adds: int  # multiply-adds of the whole model's forward: all its convolutions and matrix products

    @property
    def forward_seconds(self) -> float:
        return sum(layer.forward.chosen.predicted_seconds for _, layer in self.layers)

    @property
    def backward_seconds(self) -> float:
        return sum(layer.backward.chosen.predicted_seconds for _, layer in self.layers)

    @property
    def saved_bytes(self) -> int:
        """Of all depthwise results that a training step saves, where it asks for every gradient."""
        return sum(layer.saved_bytes for _, layer in self.layers)

    @property
    def forward_floor_seconds(self) -> float:
        """The sum of what no kernels could beat."""
        return sum(layer.forward.floor_seconds for _, layer in self.layers)

    @property
    def backward_floor_seconds(self) -> float:
        return sum(layer.backward.floor_seconds for _, layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{name}:\n{layer}" for name, layer in self.layers]
        lines += [
            f"{name}: calls its children, which are more than plain convolutions" for name in self.children_called
        ]
        lines.append(
            f"{len(self.layers)} layers, predicted: "
            f"forward {self.forward_seconds * 1e6:.1f} us (floor {self.forward_floor_seconds * 1e6:.1f}), "
            f"backward {self.backward_seconds * 1e6:.1f} us (floor {self.backward_floor_seconds * 1e6:.1f})"
        )
        if self.saved_bytes:
            lines.append(f"training saves {self.saved_bytes / 1e6:.1f} MB of depthwise results (save_intermediate)")
        lines.append(f"the whole model: {self.multiply_adds / 1e9:.3f} G multiply-adds forward")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": {name: layer.as_dict() for name, layer in self.layers},
            "children_called": list(self.children_called),
            "multiply_adds": self.multiply_adds,
            "saved_bytes": self.saved_bytes,
            "forward_seconds": self.forward_seconds,
            "backward_seconds": self.backward_seconds,
            "forward_floor_seconds": self.forward_floor_seconds,
            "backward_floor_seconds": self.backward_floor_seconds,
        }


_CHECKS = {separable_conv2d: normalise, depthwise_conv2d: normalise_depthwise}


def explain(
    target: Tensor | nn.Module | Callable[..., Tensor], *args: Any, device: str | None = None, **kwargs: Any
) -> Any:
    """Explains what "auto" would run: the plan of a call, or of every layer of this package in a model.

    `explain(separable_conv2d, x, ...)` and `explain(depthwise_conv2d, x, ...)` take the function's arguments and give
    an `Explanation`; `explain(x, depthwise_weight, pointwise_weight, ...)` is `separable_conv2d`'s.
    `explain(model, *inputs)` runs the model once, without gradients and in evaluation mode, and gives a
    `ModelExplanation`. Meta tensors will do. Launches no kernel.

    Args:
        device: None plans for where the tensors are. "A100", "H100", "H200", "B200", "RTX 4090" or "RTX 5090" predicts
            for such a device, with every kernel built.

    Raises:
        ValueError: an unknown device; otherwise whatever the call itself would raise.
        TypeError: a target that is no tensor, module or function of this package.
    """
    if device is not None and device not in DEVICES:
        raise ValueError(f"device: expected None or one of {tuple(DEVICES)}, got {device!r}")
    if isinstance(target, nn.Module):
        return _explain_model(target, args, kwargs, device)
    if isinstance(target, Tensor) or not callable(target):
        return _explain_call(normalise(target, *args, **kwargs), device)
    if target not in _CHECKS:
        raise TypeError(f"target: expected separable_conv2d or depthwise_conv2d, a tensor or a module, got {target!r}")
    return _explain_call(_CHECKS[target](*args, **kwargs), device)


def _explain_call(call: Call, device: str | None) -> Explanation:
    plans = []
    depthwise = isinstance(call.arguments, DepthwiseArguments)
    problem_of = problems.depthwise_problem_of if depthwise else problems.problem_of
    forward, backward = (problem_of(direction, call.tensors, call.arguments) for direction in ("forward", "backward"))
    wanted = [forward, backward]
    if not depthwise and _saves(call, forward, device):
        wanted = [forward, replace(backward, saved=True), replace(forward, saved=True)]
    for problem in wanted:
        if device is None:
            plans.append(launching.plan_for(problem, call.tensors[0].device))
        else:
            plans.append(plan(problem, DEVICES[device], problems.ALL_KERNELS))
    return Explanation(*plans)


def _saves(call: Call, forward: Problem, device: str | None) -> bool:
    """Whether the call saves its depthwise result, where all gradients are asked for."""
    if device is None:
        mask = tuple(tensor is not None for tensor in call.tensors)
        return saving.saves(SEPARABLE_CONV2D, call.tensors, call.arguments, "auto", call.save, mask)
    if call.save is not None:
        return call.save
    return saving_pays(forward, DEVICES[device], problems.ALL_KERNELS, "auto")


class _NoModules(nullcontext):
    """A flop counter's record of the modules that are running: the whole model alone."""

    parents = frozenset({"Global"})


def _explain_model(model: nn.Module, inputs: tuple, kwargs: dict[str, Any], device: str | None) -> ModelExplanation:
    layers: list[tuple[str, Explanation]] = []
    children_called: list[str] = []
    names = {module: name or "(the model)" for name, module in model.named_modules()}

    def note_pair(depthwise: nn.Conv2d, call: dict[str, Any]) -> None:
        layers.append((names[depthwise], _explain_call(normalise(**call), device)))

    def note(module: SeparableConv2d | DepthwiseConv, args: tuple, kwargs: dict[str, Any]) -> None:
        args = tuple(arg.tensor() if type(arg) is Normalised else arg for arg in args)  # of a fused BatchNorm
        if isinstance(module, DepthwiseConv):
            layers.append((names[module], _explain_call(normalise_depthwise(**module.call(*args, **kwargs)), device)))
        elif module.runs_as_one():
            layers.append((names[module], _explain_call(normalise(**module.call(*args, **kwargs)), device)))
        else:
            children_called.append(names[module])

    training = {module: module.training for module in names}
    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in names
        if isinstance(module, (SeparableConv2d, DepthwiseConv))
    ]
    PointwiseOfPair.watchers.append(note_pair)
    try:
        model.eval()  # so that running statistics stay as they are
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()  # its own hooks every module, and a pair that is looked at runs as two
        with torch.no_grad(), use_backend("reference"), counter:
            model(*inputs, **kwargs)
    finally:
        PointwiseOfPair.watchers.remove(note_pair)
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    ran = {name for name, _ in layers}
    children_called += [n for m, n in names.items() if isinstance(m, DepthwiseOfPair) and n not in ran]
    # Two flops are a multiply-add.
    return ModelExplanation(tuple(layers), tuple(children_called), counter.get_total_flops() // 2)
