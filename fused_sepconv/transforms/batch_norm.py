"""`fuse_batch_norm`: each BatchNorm run together with what alone reads its result; and the way back.

The BatchNorm stays where and what it is, under its name. Its class becomes one that hands its input and its parameters
on, as a `Normalised`, to whatever reads its result. Nothing links it to that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from fused_sepconv.nn.depthwise import DepthwiseConv, DepthwiseConv2d
from fused_sepconv.nn.normalised import ACTIVATION_FUNCTIONS, POOLINGS, Normalised, NormCall, window_of
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops.torch_internals import has_global_hooks
from fused_sepconv.transforms.adopted import AdoptedSequential
from fused_sepconv.transforms.dataflow import Dataflow, has_hooks, is_touched, works_in_place
from fused_sepconv.transforms.depthwise import DropInDepthwiseConv2d
from fused_sepconv.transforms.isolation import all_or_nothing
from fused_sepconv.transforms.lookahead import is_looked_at
from fused_sepconv.transforms.report import ReplacementReport, check_model

_SIZES = (1, 1, 9, 9)  # of an image of which nothing is known
_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}


class _FusedNorm(nn.modules.batchnorm._BatchNorm):
    """What the two classes share."""

    def forward(self, input: Tensor) -> Any:
        if not self._hands_on(input):
            return super().forward(input)
        return Normalised(self._call(input))

    def _hands_on(self, input: Any) -> bool:
        """Whether nobody looks on who expects a tensor: no compiler, tracer or hook."""
        return (
            not torch.compiler.is_compiling()
            and type(input) in (Tensor, nn.Parameter)
            and input.dim() == 4
            and not torch.jit.is_tracing()
            and not is_looked_at(self)
            and not has_global_hooks()
        )

    def _call(self, input: Tensor) -> NormCall:
        """As `_BatchNorm.forward` finds it, the count of batches included."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        kept = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if kept else (None, None)
        training = self.training or (self.running_mean is None and self.running_var is None)
        group = self._group() if training and self.training else None
        return NormCall(input, *running, self.weight, self.bias, training, momentum, self.eps, group)

    def _group(self) -> Any:
        return None


class FusedBatchNorm2d(_FusedNorm, nn.BatchNorm2d):
    """An `nn.BatchNorm2d` that runs together with the convolution that reads its result."""


class FusedSyncBatchNorm(_FusedNorm, nn.SyncBatchNorm):
    """An `nn.SyncBatchNorm` that runs together with the convolution that reads its result."""

    def _group(self) -> Any:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.SyncBatchNorm: FusedSyncBatchNorm,
}


def fuse_batch_norm(model: nn.Module) -> ReplacementReport:
    """Runs each BatchNorm of a model together with what alone reads its result, in place.

    BatchNorm (`nn.BatchNorm2d` or `nn.SyncBatchNorm`) → perhaps ReLU, ReLU6, SiLU or hardswish → a `SeparableConv2d` or
    `DepthwiseConv2d`: on a GPU the norm and the activation run inside the depthwise kernels, in training and in
    evaluation, and what is between them is never written. BatchNorm → an addition, or → a 3x3 max-pooling of stride 2
    and perhaps an addition (of another BatchNorm's result, too): likewise by kernels of their own, for images in NHWC
    whose pixels are whole pieces of 16 bytes, and not over several processes. Call `replace_separable_convs` or
    `replace_depthwise_convs` first, for convolutions that are PyTorch's. Parameters, buffers, names, keys and results
    stay what they are; `train()`, `eval()` and frozen BatchNorms are heard at every call. Under `torch.compile` and
    tracers the parts run one after the other. `unfuse_batch_norm` is the way back.

    Returns:
        A report: `.replaced` names the BatchNorms, `.skipped` has (name, reason) of those that were left.

    Raises:
        TypeError: a `model` that is no `nn.Module`.
    """
    check_model(model)
    flows = {"in training, ": Dataflow.of(model, training=True), "": Dataflow.of(model, training=False)}
    replaced, skipped = [], []
    with all_or_nothing(model):
        for name, norm in model.named_modules():
            if type(norm) not in _CLASSES or not name:
                continue
            reasons = [prefix + reason for prefix, flow in flows.items() if (reason := _why_not(flow, norm))]
            if reasons:
                skipped.append((name, reasons[-1]))
            else:
                norm.__class__ = _CLASSES[type(norm)]
                replaced.append(name)
    return ReplacementReport(tuple(replaced), tuple(skipped))


def unfuse_batch_norm(model: nn.Module) -> ReplacementReport:
    """Makes PyTorch's own of the BatchNorms that `fuse_batch_norm` has changed, in place.

    Raises:
        TypeError: a `model` that is no `nn.Module`.
    """
    check_model(model)
    plain = {fused: kind for kind, fused in _CLASSES.items()}
    replaced = []
    for name, norm in model.named_modules():
        if type(norm) in plain:
            norm.__class__ = plain[type(norm)]
            replaced.append(name or "(the model)")
    return ReplacementReport(tuple(replaced), ())


def _why_not(flow: Dataflow, norm: nn.Module) -> str:
    """Why a BatchNorm can't run together with what reads it; empty if it can."""
    calls = [(root, node) for root, node, module in flow.nodes() if module is norm]
    if is_touched(norm):
        return "it carries hooks, or a forward of its own"
    if not calls:
        return flow.why_unseen(norm)
    if not flow.is_called_once(norm):
        return "it is called in several places"
    root, node = calls[0]
    if len(node.args) != 1 or node.kwargs:
        return "it is called in an unusual way"
    source = node.args[0]
    if isinstance(source, fx.Node) and any(works_in_place(root, user) for user in source.users):
        return "its input is changed in place"
    activation = None
    while True:
        reader, reason = _only_reader(flow, root, node)
        if reader is None:
            return reason
        if activation is None and (_is_addition(reader, node) or _is_pooling(root, reader, node)):
            return ""
        name = _activation(root, reader)
        if name is None or activation is not None:
            break
        activation, node = name, reader
    module = root.get_submodule(reader.target) if reader.op == "call_module" else None
    if not _is_convolution(module) or reader.args[0] is not node:
        return f"no separable or depthwise convolution of this package reads it, but {_describe(flow, module, reader)}"
    if has_hooks(module):
        return f"{flow.names[module]}, which reads it, carries hooks"
    if not module.runs_normalised(activation):
        return f"{flow.names[module]}, which reads it, does more than one activation before and zeros around"
    return ""


def _only_reader(flow: Dataflow, root: nn.Module, node: fx.Node) -> tuple[fx.Node | None, str]:
    if node.meta.get("kept"):
        return None, f"its result is kept by {flow.names[root] or 'the model'}"
    if len(node.users) != 1:
        return None, f"its result is used in {len(node.users)} places"
    (reader,) = node.users
    if reader.op == "output":
        return None, f"its result is that of {flow.names[root] or 'the model'}"
    if sum(node is argument for argument in reader.all_input_nodes) != 1:
        return None, "its result is used twice"
    return reader, ""


def _activation(root: nn.Module, node: fx.Node) -> str | None:
    """The activation that a node is; None if it is none that a convolution can run."""
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        return None if is_touched(module) else _ACTIVATION_MODULES.get(type(module))
    if node.op == "call_function" and len(node.args) == 1 and node.kwargs.keys() <= {"inplace"}:
        return ACTIVATION_FUNCTIONS.get(node.target)
    return None


def _is_addition(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a node adds an image to another one: what is added in place, if so, is this one."""
    if reader.op != "call_function" or len(reader.args) != 2 or reader.kwargs:
        return False
    if reader.target not in (operator.add, torch.add) and (
        reader.target is not operator.iadd or reader.args[0] is not node
    ):
        return False
    return all(isinstance(argument, fx.Node) for argument in reader.args)


def _is_pooling(root: nn.Module, reader: fx.Node, node: fx.Node) -> bool:
    """Whether a node is a max-pooling that a BatchNorm can be joined to."""
    from fused_sepconv.models.max_pool import MaxPool3x3  # which comes after this module

    if not reader.args or reader.args[0] is not node:
        return False
    if reader.op == "call_function":
        return reader.target in POOLINGS and window_of(_SIZES, *reader.args[1:], **reader.kwargs) is not None
    if reader.op != "call_module":
        return False
    module = root.get_submodule(reader.target)
    if is_touched(module) or has_hooks(module):
        return False
    if type(module) is MaxPool3x3:
        return module.stride == 2 and module.dilation == 1
    if type(module) is not nn.MaxPool2d:
        return False
    options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    return window_of(_SIZES, *options, module.return_indices) is not None


def _is_convolution(module: Any) -> bool:
    forwards = (
        SeparableConv2d.forward,
        AdoptedSequential.forward,
        DepthwiseConv.forward,
        DropInDepthwiseConv2d.forward,
    )
    return isinstance(module, (SeparableConv2d, DepthwiseConv2d)) and type(module).forward in forwards


def _describe(flow: Dataflow, module: nn.Module | None, node: fx.Node) -> str:
    if module is not None:
        return f"{flow.names[module]}, a {type(module).__name__}"
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
