"""Networks by name, weights from and to files, and what a network costs."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classify import load
from fused_sepconv import SeparableConv2d, explain, use_backend
from fused_sepconv.models import Xception, weights, xception

from .data import UserError
from .run import table

OURS: dict[str, Mapping[str, Any]] = {"xception": {}, "xception_slim": {"width": 0.25, "middle_blocks": 2}}
"""Our networks' names, and what they say to `fused_sepconv.models.xception`."""


def create(name: str, num_classes: int, dropout: float, extra: Mapping[str, Any]) -> nn.Module:
    """One of ours, torchvision's googlenet, or any image classifier of timm's, with random weights."""
    try:
        if name in OURS:
            return xception(**{"num_classes": num_classes, "dropout": dropout, **OURS[name], **extra})
        if name == "googlenet":
            from torchvision.models import googlenet

            own = {"num_classes": num_classes, "dropout": dropout, "aux_logits": True, "init_weights": True}
            return googlenet(weights=None, **{**own, **extra})
        import timm

        return timm.create_model(name, **{"num_classes": num_classes, "drop_rate": dropout, **extra})
    except ModuleNotFoundError as error:
        raise UserError(f"--model {name}: it comes with {error.name}: pip install {error.name}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {name}: {error}") from None


def load_weights(network: nn.Module, path: Path, new_head: bool = False) -> str:
    """Loads a run's .safetensors or .ckpt, or for Xception also Keras's or timm's file; says what was loaded.

    Args:
        new_head: whether Xception's classifier may stay as it is, where the file's is missing or of other classes.
    """
    try:
        if isinstance(network, Xception) and path.suffix != ".ckpt":
            report = load(network, path)
            if report.kept and not new_head:
                raise ValueError(f"it has no {', '.join(report.kept)}")
            return f"{path}: {report}"
        read = {".ckpt": state_of_checkpoint, ".safetensors": load_file}.get(path.suffix, torch.load)
        network.load_state_dict(read(path))
        return f"{path}: all tensors"
    except Exception as error:  # each format and library has its own for a file that is not what it should be
        if not new_head or not isinstance(network, Xception):
            raise UserError(f"--weights: {path} does not fit {type(network).__name__}: {error}") from None
    classes = network.num_classes
    network.reset_classifier(0)
    report = load_weights(network, path)
    network.reset_classifier(classes)
    return f"{report}; the classifier starts anew"


def state_of_checkpoint(path: Path) -> dict[str, Tensor]:
    """The network's tensors in a checkpoint of Lightning's; the averaged ones where there are."""
    state = torch.load(path, "cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def export(network: nn.Module, checkpoint: Path, path: Path) -> None:
    """Writes the weights in a checkpoint as a safetensors file; for Xception as `models.weights.save_safetensors` does,
    with what belongs to the weights and is no tensor."""
    network.load_state_dict(state_of_checkpoint(checkpoint))
    if isinstance(network, Xception):
        weights.save_safetensors(network, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)


def _on_meta(network: nn.Module, img_size: int) -> tuple[nn.Module, Tensor]:
    channels = getattr(network, "in_channels", 3)
    return copy.deepcopy(network).to("meta").eval(), torch.empty(1, channels, img_size, img_size, device="meta")


def cost(network: nn.Module, img_size: int) -> dict[str, str]:
    """Parameters, and multiply-adds for one image; GoogLeNet's auxiliary heads have parameters and no multiply-adds."""
    network, x = _on_meta(network, img_size)
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": f"{parameters:,}", "multiply-adds": f"{explain(network, x).multiply_adds:,}"}


def summary(network: nn.Module, img_size: int) -> str:
    """A table of the network's convolutions and linear layers for one image: output shape, parameters, multiply-adds;
    for a separable convolution also these by a regular convolution's, which is 1 / F + 1 / k²."""
    rows, whole = [], {"layer": "all", **cost(network, img_size)}
    network, x = _on_meta(network, img_size)

    def note(name: str, module: nn.Module, y: Tensor) -> None:
        parameters, pixels = sum(p.numel() for p in module.parameters()), y[0, 0].numel()
        multiply_adds = pixels * sum(p.numel() for p in module.parameters() if p.ndim > 1)
        rows.append({"layer": name, "output": " x ".join(map(str, y.shape[1:])), "parameters": f"{parameters:,}"})
        rows[-1] |= {"multiply-adds": f"{multiply_adds:,}", "of regular": ""}
        if isinstance(module, SeparableConv2d):
            regular = pixels * y.shape[1] * module.depthwise.in_channels * module.depthwise.weight[0].numel()
            rows[-1]["of regular"] = f"{multiply_adds / regular:.1%}"

    for name, module in network.named_modules():
        parent = network.get_submodule(name.rpartition(".")[0])
        if isinstance(module, SeparableConv2d | nn.Conv2d | nn.Linear) and not isinstance(parent, SeparableConv2d):
            module.register_forward_hook(lambda module, _, y, name=name: note(name, module, y))
    with torch.no_grad(), use_backend("reference"):
        network(x)
    return table([*rows, whole])
