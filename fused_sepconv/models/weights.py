"""Trained weights for `Xception`: from Keras and timm, back to timm, and in safetensors.

Keras's and timm's networks have the same layers and differ in two constants, which belong to the weights and come with
them: BatchNorm's epsilon (1e-3 in Keras, 1e-5 in timm) and how the max-poolings pad ("same", "symmetric").

Each tensor goes where its layer's name says (the residual connections' layers have automatic names in Keras, and are
known by their shapes, each of which occurs once; so is a head that has another name). Everything is checked before
anything is changed. The head alone may be missing on one side; for another number of classes load first, and
`reset_classifier` then.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_sepconv.models.keras_files import KerasWeights, read_keras
from fused_sepconv.models.xception import SeparableStack, Xception

KERAS_EPSILON, TIMM_EPSILON = 1e-3, 1e-5

_BATCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
"""Prefixes that DataParallel, Lightning and torch.compile put before every name."""
_METADATA = "fused_sepconv.xception"


@dataclass(frozen=True)
class LoadReport:
    """The result of a loader. `str()` says it in words."""

    loaded: tuple[str, ...]  # the model's tensors that have new values
    kept: tuple[str, ...]  # the model's tensors that the source has nothing for: a head, if anything
    unused: tuple[str, ...]  # the source's that the model has no place for: a classifier, if anything

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        if self.kept:
            text += f"; kept as they were, the source has none: {', '.join(self.kept)}"
        if self.unused:
            text += f"; left in the source, the model has none: {', '.join(self.unused)}"
        return text


# Keras --------------------------------------------------------------------------------------------------------------


def load_keras(model: Xception, source: Any) -> LoadReport:
    """Loads Keras's Xception, with or without its top.

    Args:
        model: receives the weights, Keras's BatchNorm epsilon and its pooling ("same").
        source: a Keras model, or the path of a `.keras`, `.weights.h5` or legacy `.h5` file. Reading a file needs
            h5py, not Keras.

    Raises:
        ValueError: a layer that is missing, unexpected or of another shape (named and counted), or a file that is
            no Keras file or does not name its layers; the model is then unchanged.
    """
    _check_model(model)
    weights = read_keras(source)
    layers, problems = _name_residual_layers(model, weights)
    state: dict[str, Tensor] = {}
    epsilons: dict[str, float] = {}
    names: dict[str, str] = {}
    known = _keras_layers(model)
    for layer, ours in known.items():
        expected = _expected_variables(model, ours)
        names |= {name: f"{layer}/{variable}" for variable, name in expected.items()}
        if layer not in layers:
            continue
        keras_name = layers[layer]
        found = weights.layers[keras_name]
        if found.keys() != expected.keys():
            problems.append(f"{keras_name}: expected the variables {sorted(expected)}, got {sorted(found)}")
            continue
        state |= {name: _from_keras_layout(variable, found[variable]) for variable, name in expected.items()}
        if "gamma" in expected:
            epsilons[ours] = weights.epsilons.get(keras_name, KERAS_EPSILON)
    head = layers.get("predictions", "predictions")
    unexpected = [
        name for name in weights.layers if name not in layers.values() or (name == head and not model.num_classes)
    ]
    has_place = known.keys() | {head}  # a model of features has no place for a classifier, and needs none
    problems += [f"{name}: no such layer in the model" for name in unexpected if name not in has_place]
    unused = [name for name in unexpected if name in has_place]
    return _apply(model, state, problems, unused, "same", epsilons, "Keras", names)


def _keras_layers(model: Xception) -> dict[str, str]:
    """Keras's layer name -> our module. The residual connections' layers, which Keras numbers, go by our names."""
    layers = {
        f"block1_{name}": f"entry.module1.{ours}"
        for name, ours in (("conv1", "conv1"), ("conv1_bn", "bn1"), ("conv2", "conv2"), ("conv2_bn", "bn2"))
    }
    for block, (name, module) in enumerate(_stacks(model).items(), 2):
        for number in range(1, module.depth + 1):
            layers[f"block{block}_sepconv{number}"] = f"{name}.sepconv{number}"
            layers[f"block{block}_sepconv{number}_bn"] = f"{name}.bn{number}"
        if module.skip is not None:
            layers |= {f"{name}.skip": f"{name}.skip", f"{name}.skip_bn": f"{name}.skip_bn"}
    if model.num_classes:
        layers["predictions"] = "classifier"
    return layers


def _name_residual_layers(model: Xception, weights: KerasWeights) -> tuple[dict[str, str], list[str]]:
    """Layer as `_keras_layers` has it -> the source's name for it: the same, or found by shape; and what went wrong."""
    table = _keras_layers(model)
    layers = {name: name for name in table if name in weights.layers}
    automatic = {name: found for name, found in weights.layers.items() if name not in table}
    problems = []
    for stack, module in _stacks(model).items():
        if module.skip is None:
            continue
        fan_out, fan_in = module.skip.weight.shape[:2]
        shapes = {f"{stack}.skip": ("kernel", (1, 1, fan_in, fan_out)), f"{stack}.skip_bn": ("gamma", (fan_out,))}
        for layer, (variable, shape) in shapes.items():
            fitting = [n for n, found in automatic.items() if variable in found and found[variable].shape == shape]
            if len(fitting) > 1:
                problems.append(f"{layer}: {' and '.join(fitting)} both have its shape {shape}")
            if len(fitting) == 1:
                layers[layer] = fitting[0]
    if "predictions" not in weights.layers:
        # The head of a model that was trained for other classes has the name that its author gave it.
        heads = [name for name, found in automatic.items() if _is_head(model, found)]
        if len(heads) > 1:
            problems.append(f"classifier: {' and '.join(heads)} both could be it")
        elif heads:
            layers["predictions"] = heads[0]
    return layers, problems


def _is_head(model: Xception, variables: Mapping[str, np.ndarray]) -> bool:
    kernel = variables.get("kernel")
    return variables.keys() == {"kernel", "bias"} and kernel.ndim == 2 and kernel.shape[0] == model.head_hidden_size


def _expected_variables(model: Xception, ours: str) -> dict[str, str]:
    """Keras's variables of a layer -> our tensors' names."""
    module = model.get_submodule(ours)
    if isinstance(module, nn.BatchNorm2d):
        return {theirs: f"{ours}.{name}" for name, theirs in _BATCH_NORM.items()}
    if isinstance(module, nn.Conv2d):
        return {"kernel": f"{ours}.weight"}
    if isinstance(module, nn.Linear):
        return {"kernel": f"{ours}.weight", "bias": f"{ours}.bias"}
    return {"depthwise_kernel": f"{ours}.depthwise.weight", "pointwise_kernel": f"{ours}.pointwise.weight"}


def _from_keras_layout(variable: str, array: np.ndarray) -> Tensor:
    """Keras: kernel (kh, kw, C, F) or (C, F), depthwise_kernel (kh, kw, C, m), all else a vector."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if variable == "depthwise_kernel" and tensor.dim() == 4:
        return tensor.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.T if tensor.dim() == 2 else tensor


# timm ---------------------------------------------------------------------------------------------------------------


def load_timm(model: Xception, source: nn.Module | Mapping[str, Tensor] | str | os.PathLike) -> LoadReport:
    """Loads timm's `legacy_xception`, with or without its `fc`.

    Args:
        model: receives the weights, timm's BatchNorm epsilon and its pooling ("symmetric").
        source: timm's model, its state dict, or the path of one (`.safetensors`, or what `torch.save` wrote, such as
            `xception-43020ad28.pth` or the older `xception-b5690688.pth`, whose pointwise weights are matrices).

    Raises:
        ValueError: a tensor that is missing, unexpected or of another shape (named and counted); the model is then
            unchanged.
    """
    _check_model(model)
    epsilon = TIMM_EPSILON
    if isinstance(source, nn.Module):
        epsilons = {module.eps for module in source.modules() if isinstance(module, nn.BatchNorm2d)}
        if len(epsilons) > 1:
            raise ValueError(f"source: expected one epsilon in all its BatchNorms, got {sorted(epsilons)}")
        epsilon = epsilons.pop() if epsilons else epsilon
        source = source.state_dict()
    elif isinstance(source, (str, os.PathLike)):
        source = _read_state_dict(Path(source))
    elif isinstance(source, Mapping):
        source = _state_dict_in(source)
    else:
        raise TypeError(f"source: expected timm's model, a state dict or the path of one, got {type(source).__name__}")
    names = _timm_names(model)
    state, unexpected = from_timm_names(model, source)
    unused = [name for name in unexpected if name.startswith("fc.")]
    problems = [f"{name}: no such tensor in the model" for name in unexpected if name not in unused]
    epsilons = {name: epsilon for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return _apply(model, state, problems, unused, "symmetric", epsilons, "timm", names)


def from_timm_names(model: Xception, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict of timm's in the model's names, and the names in it that the model has no place for."""
    theirs = {_timm_spelling(name): tensor for name, tensor in state.items()}
    names = _timm_names(model)
    renamed = {}
    for ours, name in names.items():
        if name in theirs:
            tensor = theirs[name]
            is_matrix = name.endswith("pointwise.weight") and tensor.dim() == 2
            renamed[ours] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed, sorted(theirs.keys() - names.values())


def to_timm(model: Xception) -> dict[str, Tensor]:
    """The state dict of timm's `legacy_xception` that computes what `model` computes, in evaluation mode.

    timm's BatchNorms add 1e-5 to their variances: where `model` adds another epsilon, the difference goes into
    `running_var`. How the poolings pad cannot be written in a state dict: a warning says so where `model` pads
    otherwise ("same"), and the results then differ where a size is even.

    Raises:
        ValueError: a model that timm's cannot be: one with other layers, or an epsilon so much smaller than timm's that
            a variance would be negative.
    """
    _check_model(model)
    stacks = _stacks(model).values()
    plain = all(m.residual for m in list(stacks)[:-1]) and not any(
        getattr(m, f"sepconv{n}").mid_activation for m in stacks for n in range(1, m.depth + 1)
    )
    if not plain or len(model.middle) != 8 or model.hidden_units:
        raise ValueError(
            "model: timm's legacy_xception has 8 middle blocks, residual connections, no mid_activation and no "
            "hidden_units"
        )
    if model.pool_padding != "symmetric":
        warnings.warn(
            f'to_timm: this model\'s poolings pad "{model.pool_padding}", timm\'s pad "symmetric": results differ '
            "where a size is even",
            stacklevel=2,
        )
    state = {}
    for ours, theirs in _timm_names(model).items():
        module, _, name = ours.rpartition(".")
        tensor = model.get_submodule(module).state_dict()[name]
        if name == "running_var" and model.get_submodule(module).eps != TIMM_EPSILON:
            tensor = tensor + (model.get_submodule(module).eps - TIMM_EPSILON)
            if (tensor < 0).any():
                raise ValueError(f"model: {ours} with eps = {model.get_submodule(module).eps} is too small for timm's")
        state[theirs] = tensor.detach().clone()
    return state


def _timm_names(model: Xception) -> dict[str, str]:
    """Our tensor's name -> timm's."""
    modules = {f"entry.module1.{name}": name for name in ("conv1", "bn1", "conv2", "bn2")}
    stacks = list(_stacks(model).items())
    for block, (ours, module) in enumerate(stacks[:-1], 1):
        first = 0 if module.sepconv1.pre_activation is None else 1  # rep begins with a ReLU, if there is one
        for number in range(1, module.depth + 1):
            position = first + 3 * (number - 1)  # separable convolution, BatchNorm, ReLU
            modules[f"{ours}.sepconv{number}.depthwise"] = f"block{block}.rep.{position}.conv1"
            modules[f"{ours}.sepconv{number}.pointwise"] = f"block{block}.rep.{position}.pointwise"
            modules[f"{ours}.bn{number}"] = f"block{block}.rep.{position + 1}"
        modules |= {f"{ours}.skip": f"block{block}.skip", f"{ours}.skip_bn": f"block{block}.skipbn"}
    for number, theirs in ((1, 3), (2, 4)):
        modules[f"exit.module2.sepconv{number}.depthwise"] = f"conv{theirs}.conv1"
        modules[f"exit.module2.sepconv{number}.pointwise"] = f"conv{theirs}.pointwise"
        modules[f"exit.module2.bn{number}"] = f"bn{theirs}"
    modules["classifier"] = "fc"
    names = {}
    for name in model.state_dict():
        module, _, tensor = name.rpartition(".")
        if module in modules:
            names[name] = f"{modules[module]}.{tensor}"
    return names


def _timm_spelling(name: str) -> str:
    """Without the prefixes of wrappers, and with today's name for the classifier."""
    name = _WRAPPERS.sub("", name)
    return f"fc.{name.removeprefix('last_linear.')}" if name.startswith("last_linear.") else name


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"source: no such file: {path}")
    if path.suffix == ".safetensors":
        return _safetensors().load_file(path)
    try:
        # timm's training checkpoints have their command line's arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"source: {path} holds more than tensors, and is not read: {error}") from error
    contents = _state_dict_in(contents) if isinstance(contents, Mapping) else contents
    if not isinstance(contents, Mapping) or not all(isinstance(tensor, Tensor) for tensor in contents.values()):
        raise ValueError(f"source: {path} holds no state dict")
    return contents


def _state_dict_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a training checkpoint, under its usual names; itself, where it has none of them."""
    return next(
        (checkpoint[key] for key in ("state_dict", "model") if isinstance(checkpoint.get(key), Mapping)), checkpoint
    )


# safetensors --------------------------------------------------------------------------------------------------------


def save_safetensors(model: Xception, path: str | os.PathLike) -> None:
    """Writes the model's own state dict, with the epsilon and the pooling that belong to it, as a safetensors file."""
    _check_model(model)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    semantics = {"pool_padding": model.pool_padding, "epsilons": _epsilons(model)}
    _safetensors().save_file(state, path, metadata={"format": "pt", _METADATA: json.dumps(semantics)})


def load_safetensors(model: Xception, path: str | os.PathLike) -> LoadReport:
    """Loads what `save_safetensors` wrote. (timm's safetensors files are `load_timm`'s.)

    Raises:
        ValueError: a tensor that is missing, unexpected or of another shape (named and counted), or a file that
            another program wrote; the model is then unchanged.
    """
    _check_model(model)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    if not is_own_file(path):
        raise ValueError(f"path: {path} was not written by save_safetensors; timm's files are load_timm's")
    semantics = json.loads(_metadata(path)[_METADATA])
    state = _safetensors().load_file(path)
    unexpected = sorted(state.keys() - model.state_dict().keys())
    unused = [name for name in unexpected if name.startswith("classifier.")]
    problems = [f"{name}: no such tensor in the model" for name in unexpected if name not in unused]
    state = {name: tensor for name, tensor in state.items() if name not in unexpected}
    return _apply(model, state, problems, unused, semantics["pool_padding"], semantics["epsilons"], str(path))


def is_own_file(path: str | os.PathLike) -> bool:
    """Whether `save_safetensors` wrote a safetensors file."""
    return _METADATA in _metadata(path)


def _metadata(path: str | os.PathLike) -> dict[str, str]:
    with _safetensors().safe_open(path, "pt") as file:
        return file.metadata() or {}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(".safetensors files need safetensors: pip install fused_sepconv[weights]") from None
    return safetensors.torch


# All of them --------------------------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if not isinstance(model, Xception):
        raise TypeError(f"model: expected a fused_sepconv.models.Xception, got {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: its parameters are on the meta device, which holds no values")


def _stacks(model: Xception) -> dict[str, SeparableStack]:
    """The modules of separable convolutions by name, in the order of the network."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SeparableStack)}


def _epsilons(model: Xception) -> dict[str, float]:
    return {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def _apply(
    model: Xception,
    state: Mapping[str, Tensor],
    problems: list[str],
    unused: list[str],
    pool_padding: str,
    epsilons: Mapping[str, float],
    origin: str,
    source_names: Mapping[str, str] | None = None,
) -> LoadReport:
    """Copies a state dict of our names into the model, if it is all there and fits; else names all that does not."""
    own = model.state_dict()
    source_names = source_names or {}
    kept = []
    for name, tensor in own.items():
        spelled = f"{name} ({source_names[name]} in {origin})" if name in source_names else name
        if name in state:
            if state[name].shape != tensor.shape:
                got, expected = tuple(state[name].shape), tuple(tensor.shape)
                problems.append(f"{spelled}: expected shape {expected}, got {got}")
        elif name.startswith(("hidden.", "classifier.")):
            kept.append(name)
        elif not name.endswith("num_batches_tracked"):  # a counter that Keras and old files do not have
            problems.append(f"{spelled}: missing")
    if kept and any(name.startswith("classifier.") for name in state):
        problems += [f"{name}: missing" for name in kept]
    if problems:
        raise ValueError(
            f"source: {origin}'s weights do not fit the model, which is unchanged. "
            f"{len(problems)} differ: {_in_short(problems)}"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    for name, epsilon in epsilons.items():
        model.get_submodule(name).eps = epsilon
    model.pool_padding = pool_padding
    return LoadReport(tuple(state), tuple(kept), tuple(unused))


def _in_short(problems: list[str], most: int = 4) -> str:
    """The first few of each kind of problem, and how many more there are of it."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        words = problem.partition(": ")[2].split()
        kinds.setdefault(" ".join(words[:2]), []).append(problem)
    return "; ".join(
        "; ".join(found[:most]) + (f", and {len(found) - most} more like it" if len(found) > most else "")
        for found in kinds.values()
    )
