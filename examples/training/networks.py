"""Networks by name, weights from and to files, and what a network costs."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_sepconv import SeparableConv2d, explain, use_backend
from fused_sepconv.models import Xception, weights, xception

from .errors import UserError

OURS: dict[str, Mapping[str, Any]] = {
    "xception": {},
    "xception_slim": {"width": 0.25, "middle_blocks": 2},
}
"""Our networks' names, and what they say to `fused_sepconv.models.xception`."""

INCEPTION_SIZE = 299
"""Pixels that Inception V3's auxiliary head needs; for smaller images it is left out."""


def create(name: str, num_classes: int, dropout: float, img_size: int, extra: Mapping[str, Any]) -> nn.Module:
    """One of ours, torchvision's googlenet, or any image classifier of timm's, with random weights."""
    try:
        if name in OURS:
            return xception(num_classes, **{"dropout": dropout, **OURS[name], **extra})
        if name == "googlenet":
            from torchvision.models import googlenet

            own = {"num_classes": num_classes, "dropout": dropout, "aux_logits": True, "init_weights": True}
            return googlenet(weights=None, **{**own, **extra})
        import timm

        own = {"num_classes": num_classes, "drop_rate": dropout}
        if name == "inception_v3":
            own["aux_logits"] = img_size >= INCEPTION_SIZE
        return timm.create_model(name, **{**own, **extra})
    except ModuleNotFoundError as error:
        raise UserError(f"--model {name}: it comes with {error.name}: pip install {error.name}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {name}: {error}") from None


def load_weights(network: nn.Module, path: Path, head_may_differ: bool) -> str:
    """Loads a run's .safetensors or .ckpt, or for Xception also Keras's or timm's file; says what was loaded.

    `head_may_differ`: whether the own classifier may stay, where the file's is missing or of other classes.
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
    if path.suffix == ".ckpt":
        network.load_state_dict(state_of_checkpoint(path))
        return "a run's checkpoint"
    if not isinstance(network, Xception):
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        network.load_state_dict(tensors)
        return f"{len(tensors)} tensors loaded"
    if path.suffix in (".keras", ".h5"):
        report = weights.load_keras(network, path)
    elif path.suffix == ".safetensors" and "entry.module1.conv1.weight" in load_file(path):
        report = weights.load_safetensors(network, path)
    else:
        report = weights.load_timm(network, path)
    if report.kept and not head_may_differ:
        raise ValueError(f"it has no {', '.join(report.kept)}")
    return str(report)


def state_of_checkpoint(path: Path) -> dict[str, Tensor]:
    """The network's tensors in a checkpoint of Lightning's; the averaged ones where there are."""
    state = torch.load(path, "cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def export(skeleton: nn.Module, checkpoint: Path, path: Path) -> None:
    """Writes the weights in a checkpoint as a safetensors file, whole or not at all; for Xception as
    `fused_sepconv.models.weights.save_safetensors` does, with what belongs to the weights and is no tensor."""
    whole, unfinished = copy.deepcopy(skeleton), path.with_name(f"unfinished-{path.name}")
    whole.load_state_dict(state_of_checkpoint(checkpoint), assign=True)
    if isinstance(whole, Xception):
        weights.save_safetensors(whole, unfinished)
    else:
        save_file({name: tensor.contiguous() for name, tensor in whole.state_dict().items()}, unfinished)
    os.replace(unfinished, path)


def _on_meta(network: nn.Module, img_size: int) -> tuple[nn.Module, Tensor]:
    channels = getattr(network, "in_channels", 3)
    return copy.deepcopy(network).to("meta").eval(), torch.empty(1, channels, img_size, img_size, device="meta")


def cost(network: nn.Module, img_size: int) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image; auxiliary heads have parameters and no multiply-adds."""
    network, x = _on_meta(network, img_size)
    return sum(p.numel() for p in network.parameters()), explain(network, x).multiply_adds


def summary(network: nn.Module, img_size: int) -> str:
    """A table of the network's layers for one image: output shape, parameters, multiply-adds; for a separable
    convolution also these by a regular convolution's, which is 1 / F + 1 / k²."""
    network, x = _on_meta(network, img_size)
    separable = [name for name, module in network.named_modules() if isinstance(module, SeparableConv2d)]
    shapes: dict[str, list[int]] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in separable)
        if isinstance(module, SeparableConv2d | nn.Conv2d | nn.Linear) and not inside:
            module.register_forward_hook(lambda _, __, y, name=name: shapes.update({name: list(y.shape[1:])}))
    with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        network(x)
    counts = counter.get_flop_counts()
    lines = [f"{'layer':<34}{'output':>16}{'parameters':>14}{'multiply-adds':>17}{'of regular':>12}"]
    for name, shape in shapes.items():
        module, ratio = network.get_submodule(name), ""
        parameters = sum(p.numel() for p in module.parameters())
        multiply_adds = sum(counts.get(f"{type(network).__name__}.{name}", {}).values()) // 2
        if name in separable:
            k, pixels = module.depthwise.kernel_size, shape[1] * shape[2]
            ratio = f"{multiply_adds / (pixels * shape[0] * module.depthwise.in_channels * k[0] * k[1]):.1%}"
        text = " x ".join(map(str, shape))
        lines.append(f"{name:<34}{text:>16}{parameters:>14,}{multiply_adds:>17,}{ratio:>12}")
    totals = sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2
    lines.append(f"{'all':<34}{'':>16}{totals[0]:>14,}{totals[1]:>17,}")
    return "\n".join(lines)
