"""Reads Keras's weights, from a model or from any of its file formats, into arrays by layer and variable.

What a variable is comes from its name where the format has names, and where a format numbers the variables of a layer,
from the layer's class. Layers are known by name; a file that does not name them is refused, not guessed at.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "separable_conv2d": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
"""The order in which a layer of a class numbers its variables."""

_OLD_NAMES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}
"""Keras 1's names; its running_std is a variance."""


@dataclass(frozen=True)
class KerasWeights:
    """Arrays by layer and variable (in Keras's layouts), and the epsilon of each BatchNormalization that says it."""

    layers: dict[str, dict[str, np.ndarray]]
    epsilons: dict[str, float] = field(default_factory=dict)


def read_keras(source: Any) -> KerasWeights:
    """From a Keras model, or the path of a `.keras`, a `.weights.h5` or a legacy `.h5` file.

    Raises:
        TypeError: neither a model nor a path.
        FileNotFoundError: no such file.
        ImportError: h5py, which reads the files, is not installed.
        ValueError: a file of another kind, or one that does not name its layers.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "layers") or not hasattr(source, "get_weights"):
            raise TypeError(f"source: expected a Keras model or the path of a file, got {type(source).__name__}")
        return _from_model(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source: no such file: {path}")
    h5py = _h5py()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            if not {"config.json", "model.weights.h5"} <= members:
                raise ValueError(f"source: {path} is an archive, but not a .keras file: it holds {sorted(members)}")
            config = json.loads(archive.read("config.json"))
            with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
                if "layers" not in file:
                    raise ValueError(f"source: {path} was written by a release of Keras before 3: save it again with 3")
                return KerasWeights(dict(_numbered_layers(path, file, config)), _epsilons(config))
    if not h5py.is_hdf5(path):
        raise ValueError(f"source: {path} is no Keras file: expected .keras, .weights.h5 or .h5")
    with h5py.File(path) as file:
        if "layers" in file:
            return KerasWeights(dict(_numbered_layers(path, file, None)))
        config = file.attrs.get("model_config")
        weights = file.get("model_weights", file)
        if "layer_names" not in weights.attrs:
            raise ValueError(f"source: {path} is an HDF5 file, but not a Keras one: it has no layers")
        return KerasWeights(dict(_named_layers(weights)), _epsilons(json.loads(config)) if config else {})


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise ImportError("Keras's files are read with h5py: pip install fused_sepconv[weights]") from None
    return h5py


def _from_model(model: Any) -> KerasWeights:
    layers, epsilons = {}, {}
    for layer in model.layers:
        if layer.weights:
            if hasattr(layer, "layers"):
                raise _nested(layer.name)
            names = [_variable(weight.name) for weight in layer.weights]
            layers[layer.name] = dict(zip(names, layer.get_weights(), strict=True))
        if hasattr(layer, "moving_variance"):
            epsilons[layer.name] = float(layer.epsilon)
    return KerasWeights(layers, epsilons)


def _named_layers(weights: Any) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The legacy `.h5`: a group a layer, whose `weight_names` say what is where."""
    for layer in map(_text, weights.attrs["layer_names"]):
        group = weights[layer]
        names = list(map(_text, group.attrs["weight_names"]))
        if names:
            if len({_variable(name, layer) for name in names}) < len(names):
                raise _nested(layer)
            yield layer, {_variable(name, layer): group[name][()] for name in names}


def _numbered_layers(path: Path, file: Any, config: Any) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Keras 3's format: groups are numbered by class in the order of the model's layers, and variables by layer.

    The layer's name is an attribute there, in files of newer releases; else the order of the configuration's layers
    tells, in a file that has one.
    """
    names = _names_of_groups(config)
    for key, group in file["layers"].items():
        if len(group.get("layers", ())):
            raise _nested(key)
        if "vars" not in group or not len(group["vars"]):
            continue
        variables = group["vars"]
        name = _text(variables.attrs["name"]) if "name" in variables.attrs else names.get(key)
        if name is None:
            raise ValueError(
                f"source: {path} does not name its layers. Load it into the Keras model that wrote it, and pass that "
                "model or the .keras file that it saves"
            )
        layer_class = key.rstrip("0123456789").rstrip("_") if key not in _VARIABLES else key
        known = _VARIABLES.get(layer_class, ())
        order = sorted(variables, key=int)
        yield (
            name,
            {known[i] if i < len(known) else f"variable {i}": variables[n][()] for i, n in enumerate(order)},
        )


def _nested(layer: str) -> ValueError:
    """The error for a model inside a model."""
    return ValueError(
        f"source: {layer} in it is a model of its own. Load it into Keras and pass the inner model, "
        f"model.get_layer(...), which is the Xception; the layers round it, such as a new head, are not part of that"
    )


def _names_of_groups(config: Any) -> dict[str, str]:
    """Group -> layer name: Keras numbers the layers of each class, in the order of the configuration."""
    counts: dict[str, int] = {}
    names = {}
    for layer in _layer_configs(config):
        key = _SNAKE_CASE.get(layer["class_name"], layer["class_name"].lower())
        number = counts[key] = counts.get(key, -1) + 1
        names[f"{key}_{number}" if number else key] = layer["config"]["name"]
    return names


_SNAKE_CASE = {
    "Conv2D": "conv2d",
    "SeparableConv2D": "separable_conv2d",
    "BatchNormalization": "batch_normalization",
    "Dense": "dense",
}
"""The classes that have variables in an Xception, as Keras writes them in groups' names."""


def _layer_configs(config: Any) -> list[Any]:
    return config["config"].get("layers", []) if config else []


def _epsilons(config: Any) -> dict[str, float]:
    return {
        layer["config"]["name"]: float(layer["config"]["epsilon"])
        for layer in _layer_configs(config)
        if layer["class_name"] == "BatchNormalization"
    }


def _variable(name: str, layer: str = "") -> str:
    """ "block2_sepconv1/depthwise_kernel:0" (Keras 2), "block1_conv1_W" (Keras 1) or "gamma" (Keras 3) -> variable."""
    name = name.rsplit("/", 1)[-1].split(":", 1)[0]
    name = name.removeprefix(f"{layer}_")
    return _OLD_NAMES.get(name, name)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
