"""BatchNorm units: BatchNorm, an activation and a separable or depthwise convolution, as functions.

On a GPU BatchNorm and the activation run inside the depthwise kernels, in both directions: what is between them is
never written. Elsewhere, and where no kernel runs a problem, the units are PyTorch's `F.batch_norm` and this package's
convolutions, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as sync_batch_norm

from fused_sepconv.nn.functional import depthwise_conv2d, separable_conv2d
from fused_sepconv.ops import backend as backend_setting
from fused_sepconv.ops import norm_units
from fused_sepconv.ops.arguments import Pair, check_save, normalise_depthwise
from fused_sepconv.ops.backend import asks_the_plan
from fused_sepconv.ops.joins import Norm, Window, norm_join, why_not
from fused_sepconv.ops.operators import without_autocast
from fused_sepconv.ops.torch_internals import are_functorch_transforms_active, in_forward_mode
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import memory_format_of

Padding = int | str | Pair | tuple[Pair, Pair]


def norm_separable_conv2d(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: Padding = 0,
    dilation: int | Pair = 1,
    *,
    depthwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    save_intermediate: bool | str = "auto",
) -> Tensor:
    """BatchNorm and a separable convolution: `separable_conv2d(F.batch_norm(x, ...), ..., pre_activation=...)`.

    Args:
        running_mean, running_var, norm_weight, norm_bias, training, momentum, eps: as `F.batch_norm`'s; with
            `training` the statistics are the batch's, and the running ones, if there are any, are updated in place.
        process_group: None, or the processes over whose batches the statistics are taken, as `nn.SyncBatchNorm` does.
        save_intermediate: False computes the depthwise result again in the backward. Else it is saved, where a kernel
            of ours runs the unit; elsewhere this is `separable_conv2d`'s.
        the others: as `separable_conv2d`'s; `pre_activation` comes after the norm.

    Raises:
        TypeError, ValueError: as `separable_conv2d` and `F.batch_norm` do.
    """
    norm = running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
    how = stride, padding, dilation
    call = _depthwise_of_norm(x, norm, depthwise_weight, depthwise_bias, how, pre_activation, process_group)
    if call is None:
        return separable_conv2d(
            _batch_norm(x, norm, process_group),
            depthwise_weight,
            pointwise_weight,
            bias,
            *how,
            depthwise_bias=depthwise_bias,
            residual=residual,
            pre_activation=pre_activation,
            mid_activation=mid_activation,
            activation=activation,
            save_intermediate=save_intermediate,
        )
    save = check_save(save_intermediate)
    y = _pointwise(call, ACTIVATIONS[mid_activation].forward, pointwise_weight, bias, save)
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(f"residual: expected the output's shape {tuple(y.shape)}, got {tuple(residual.shape)}")
        y = y + residual.to(y.dtype)
    return ACTIVATIONS[activation].forward(y).contiguous(memory_format=memory_format_of(x))


def norm_depthwise_conv2d(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: Padding = 0,
    dilation: int | Pair = 1,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """BatchNorm and a depthwise convolution: `depthwise_conv2d(F.batch_norm(x, ...), ..., pre_activation=...)`.

    The arguments are `norm_separable_conv2d`'s and `depthwise_conv2d`'s.
    """
    norm = running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
    how = stride, padding, dilation
    call = _depthwise_of_norm(x, norm, weight, bias, how, pre_activation, process_group)
    if call is not None:
        return ACTIVATIONS[activation].forward(call())
    u = _batch_norm(x, norm, process_group)
    return depthwise_conv2d(u, weight, bias, *how, pre_activation=pre_activation, activation=activation)


def _depthwise_of_norm(
    x: Tensor,
    norm: tuple,
    weight: Tensor,
    bias: Tensor | None,
    how: tuple,
    activation: str | None,
    group: Any,
) -> Callable[[], Tensor] | None:
    """The call of the operator, for the depthwise result; None where PyTorch's BatchNorm and a convolution run."""
    backend = backend_setting.default
    running_mean, running_var, norm_weight, norm_bias, training, momentum, eps = norm
    shared = training and group is not None
    # PyTorch's own BatchNorm over several processes knows GPUs alone.
    if not isinstance(x, Tensor) or x.dim() != 4 or not (asks_the_plan(x, backend) or (shared and not x.is_cuda)):
        return None
    (cast, weight, bias), arguments, _, _ = normalise_depthwise(x, weight, bias, *how, pre_activation=activation)
    if cast.dtype != x.dtype:  # autocast: the statistics are those of x as it is
        return None
    arguments = (*arguments[:3], activation)
    if (x.is_cuda or not shared) and not norm_units.runs(x, weight, bias, arguments, backend):
        return None
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if training and values == 1 and not shared:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    with without_autocast(x):
        mean, invstd, count = _statistics(x, norm, group if shared else None)
        args = (x, mean, invstd, norm_weight, norm_bias, weight, bias, *arguments, training, backend)
        if shared:
            args = (*args, (group, count))
        operator = norm_units.NormDepthwiseConv2dFunction.apply if shared else norm_units.norm_depthwise_conv2d

    def call() -> Tensor:
        with without_autocast(x):
            return operator(*args)

    return call


def _statistics(x: Tensor, norm: tuple, group: Any) -> tuple[Tensor, Tensor, Any]:
    """Mean, 1 / sqrt(variance + eps) and count of what x is normalised by."""
    running_mean, running_var, _, _, training, momentum, eps = norm
    if training:
        return norm_units.statistics(x, running_mean, running_var, momentum, eps, group)
    wide = norm_units.accumulator(x)
    return running_mean.to(wide), torch.rsqrt(running_var.to(wide) + eps), None


def joined(norm: dict[str, Any], window: Window | None, other: Tensor | dict[str, Any] | None) -> Tensor | None:
    """pool(batch_norm(**norm)) + other, or + batch_norm(**other), by kernels of ours; None where they can't run it, and
    then no running statistics have changed."""
    norms = [norm] if type(other) is not dict else [norm, other]
    images = [each["x"] for each in norms] + ([other] if isinstance(other, Tensor) else [])
    x = images[0]
    if torch.compiler.is_compiling() or are_functorch_transforms_active() or in_forward_mode():
        return None
    if any(type(image) not in (Tensor, torch.nn.Parameter) for image in images) or not _joins(x):
        return None
    shape = tuple(x.shape) if window is None else (*x.shape[:2], *window.size)
    if any((tuple(other.shape), other.dtype, other.device) != (shape, x.dtype, x.device) for other in images[1:]):
        return None
    for each in norms:
        image = each["x"]
        if each["process_group"] is not None or (each["training"] and image.numel() == image.shape[1]):
            return None  # the second is an error, which F.batch_norm raises
    found = []
    for each in norms:
        names = ("running_mean", "running_var", "norm_weight", "norm_bias", "training", "momentum", "eps")
        mean, invstd, _ = _statistics(each["x"], tuple(each[name] for name in names), None)
        found.append(Norm(mean, invstd, each["norm_weight"], each["norm_bias"], each["training"]))
    return norm_join(x, found[0], images[1] if len(images) > 1 else None, *(found[1:] or (None,)), window)


def _joins(x: Tensor) -> bool:
    return x.numel() > 0 and asks_the_plan(x, backend_setting.default) and not why_not(x)


def _pointwise(
    call: Callable[[], Tensor],
    activation: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    save: bool | None,
) -> Tensor:
    """The 1x1 of the depthwise result that `call` gives, which the backward calls again where it is not to be saved."""
    t = call()
    if save is not False or torch.compiler.is_compiling() or are_functorch_transforms_active():
        return F.conv2d(activation(t), weight, bias)

    def again(name: str) -> Tensor:
        with torch.no_grad():
            return call() if name == "t" else activation(call())

    def dropping(known: dict[int, str], other: str = "") -> Any:
        """A context in which autograd keeps a name in place of a tensor: by its storage, else `other` if there is."""
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: known.get(_storage(tensor), other) or tensor,
            lambda kept: again(kept) if isinstance(kept, str) else kept,
        )

    with dropping({_storage(t): "t"}, "v"):
        v = activation(t)
    with dropping({_storage(v): "v"}):
        return F.conv2d(v, weight, bias)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    process_group: Any = None,
) -> Tensor:
    """PyTorch's BatchNorm, that of several processes too."""
    return _batch_norm(x, (running_mean, running_var, norm_weight, norm_bias, training, momentum, eps), process_group)


def _batch_norm(x: Tensor, norm: tuple, group: Any) -> Tensor:
    running_mean, running_var, norm_weight, norm_bias, training, momentum, eps = norm
    if not training or group is None:
        return F.batch_norm(x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    size = torch.distributed.get_world_size(group)
    return sync_batch_norm.apply(x, norm_weight, norm_bias, running_mean, running_var, eps, momentum, group, size)
