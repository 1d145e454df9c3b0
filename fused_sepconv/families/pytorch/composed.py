"""PyTorch's own convolutions, prepared for tensors of one signature: the least Python round them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import empty_output, output_strides


def depthwise(arguments: Any, tensors: tuple[Tensor | None, ...], *activation: str | None) -> Callable[..., Tensor]:
    """act(depthwise(pre_act(x)) + bias), as a function of x, weight and bias; `arguments` may be a problem."""
    x, weight = tensors[:2]
    convolve = _depthwise(arguments, x.shape[1])
    activate = _activation(*(activation or (arguments.activation,)))
    strides = _strides_of_output(arguments, x, weight, weight.shape[0])

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = convolve(x, weight, bias)
        if activate is not None:
            y = activate(y)
        return y if y.stride() == strides else empty_output(x, y.shape).copy_(y)

    return run


def separable(arguments: Any, tensors: tuple[Tensor | None, ...], saves: bool = False) -> Callable[..., Any]:
    """act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual), as a function of the six.

    `arguments` may be a problem. With `saves` it gives (y, v), or t for v where the mid-activation's derivative needs
    t.
    """
    x, depthwise_weight, pointwise_weight = tensors[:3]
    convolve = _depthwise(arguments, x.shape[1])
    activate_mid, activate = _activation(arguments.mid_activation), _activation(arguments.activation)
    saves_v = ACTIVATIONS[arguments.mid_activation].from_output is not None
    strides = _strides_of_output(arguments, x, depthwise_weight, pointwise_weight.shape[0])

    def run(
        x: Tensor,
        depthwise_weight: Tensor,
        pointwise_weight: Tensor,
        bias: Tensor | None,
        depthwise_bias: Tensor | None,
        residual: Tensor | None,
    ) -> Any:
        kept = v = convolve(x, depthwise_weight, depthwise_bias)
        if activate_mid is not None:
            v = activate_mid(v)
            if saves_v:
                kept = v
        y = torch.conv2d(v, pointwise_weight, bias)
        if residual is not None:
            y = y + residual
        if activate is not None:
            y = activate(y)
        y = y if y.stride() == strides else empty_output(x, y.shape).copy_(y)
        return (y, kept) if saves else y

    return run


def _depthwise(arguments: Any, groups: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    top, bottom, left, right = arguments.padding
    activate = _activation(arguments.pre_activation)
    sides = None if (top, left) == (bottom, right) else (left, right, top, bottom)
    options = (arguments.stride, (0, 0) if sides else (top, left), arguments.dilation, groups)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if activate is not None:
            x = activate(x)
        if sides is not None:
            x = F.pad(x, sides)
        return torch.conv2d(x, weight, bias, *options)

    return run


def _activation(name: str | None) -> Callable[[Tensor], Tensor] | None:
    return None if name is None else ACTIVATIONS[name].forward


def _strides_of_output(arguments: Any, x: Tensor, weight: Tensor, channels: int) -> tuple[int, ...]:
    top, bottom, left, right = arguments.padding
    padded = x.shape[2] + top + bottom, x.shape[3] + left + right
    height, width = (
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, dilation, taps, stride in zip(
            padded, arguments.dilation, weight.shape[2:], arguments.stride, strict=True
        )
    )
    return output_strides(x, (x.shape[0], channels, height, width))
