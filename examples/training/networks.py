"""Networks by name, and weights from files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fused_sepconv.models import Xception, weights, xception

from .errors import UserError

OURS: dict[str, Mapping[str, Any]] = {
    "xception": {},
    "xception_slim": {"width": 0.25, "middle_blocks": 2},
}
"""Our networks' names, and what they say to `fused_sepconv.models.xception`."""


KERAS_SUFFIXES = (".keras", ".h5")


def create(name: str, num_classes: int, dropout: float, extra: Mapping[str, Any]) -> nn.Module:
    """One of ours, or any image classifier of timm's, with random weights.

    Args:
        dropout: probability, before the last layer.
        extra: further arguments of the network.
    """
    try:
        if name in OURS:
            return xception(num_classes, **{"dropout": dropout, **OURS[name], **extra})
        return _timm().create_model(name, **{"num_classes": num_classes, "drop_rate": dropout, **extra})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {name}: {error}") from None


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError(f"--model: expected {', '.join(OURS)}; others come with timm: pip install timm") from None
    return timm


def load_weights(network: nn.Module, path: Path, head_may_differ: bool) -> str:
    """Loads a run's .safetensors, or for Xception also Keras's or timm's file; says what was loaded.

    Args:
        head_may_differ: whether the network's own classifier may stay, where the file's is missing or of other classes.

    Raises:
        UserError: the file is missing, is of another kind, or does not fit.
    """
    try:
        return f"{path}: {_load(network, path, head_may_differ)}"
    except (OSError, ImportError) as error:
        raise UserError(f"--weights: {error}") from None
    except Exception as error:  # each format and library has its own for a file that is not what it should be
        complaint = error
    if head_may_differ and isinstance(network, Xception):
        head, network.classifier = network.classifier, nn.Identity()
        try:
            return f"{path}: {_load(network, path, head_may_differ)}; the classifier starts anew"
        except Exception:  # then it is not the classifier alone, and the first complaint has it all
            pass
        finally:
            network.classifier = head
    raise UserError(f"--weights: {path} does not fit {type(network).__name__}: {complaint}")


def _load(network: nn.Module, path: Path, head_may_differ: bool) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not isinstance(network, Xception):
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        network.load_state_dict(tensors)
        return f"{len(tensors)} tensors loaded"
    if path.suffix in KERAS_SUFFIXES:
        report = weights.load_keras(network, path)
    elif path.suffix == ".safetensors" and _is_ours(path):
        report = weights.load_safetensors(network, path)
    else:
        report = weights.load_timm(network, path)
    if report.kept and not head_may_differ:
        raise ValueError(f"it has no {', '.join(report.kept)}")
    return str(report)


def _is_ours(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return "entry.module1.conv1.weight" in file.keys()  # noqa: SIM118 - a handle, not a dict
