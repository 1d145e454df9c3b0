"""The public functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.families.pytorch import convolutions
from fused_sepconv.ops import autograd, backend, eager, exporting
from fused_sepconv.ops.arguments import Pair, TensorSpec, normalise, normalise_depthwise, padding_sides, pair
from fused_sepconv.ops.operators import DEPTHWISE_CONV2D, SEPARABLE_CONV2D


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | str | Pair | tuple[Pair, Pair] = 0,
    dilation: int | Pair = 1,
    *,
    depthwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    save_intermediate: bool | str = "auto",
) -> Tensor:
    """Depthwise separable convolution: a k x k depthwise convolution and the 1 x 1 pointwise convolution after it.

    ``y = act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual)``

    Args:
        x: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides.
        depthwise_weight: (C * m, 1, kh, kw), as PyTorch lays out a grouped convolution's; m is the depth multiplier.
        pointwise_weight: (F, C * m, 1, 1).
        bias: (F,), added after the pointwise convolution.
        stride: of the depthwise convolution, in pixels; an int or (vertical, horizontal).
        padding: zeros round x, in pixels: an int, (vertical, horizontal), ((top, bottom), (left, right)), "valid"
            (none) or "same" (TensorFlow's rule: out = ceil(in / stride), for every stride).
        dilation: distance between the taps, in pixels; an int or (vertical, horizontal).
        depthwise_bias: (C * m,), added after the depthwise convolution.
        residual: the output's shape, added before the last activation.
        pre_activation, mid_activation, activation: None, "relu", "relu6", "elu", "silu", "hardswish" or "gelu", on x
            as it is read, between the two convolutions, and on the output.
        save_intermediate: whether the backward is given the depthwise result, as large as that convolution's output,
            or computes it again. "auto": saved where the backward would otherwise run the depthwise convolution again,
            and saving is faster by the plan (`explain` tells). True: wherever it can be had. False: never. Nothing is
            saved under `torch.func`'s transforms.

    Returns:
        (N, F, out_h, out_w), or (F, out_h, out_w) for an unbatched x, where
        out = floor((in + before + after - dilation * (k - 1) - 1) / stride) + 1. Its memory format is x's.

    Raises:
        TypeError: an argument of a wrong type or dtype (all tensors share x's), named in the message.
        ValueError: a wrong value, shape or device, named in the message.

    Under autocast the tensors are cast as a convolution's would be. Differentiable any number of times, in both modes.
    """
    tensors = (x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual)
    options = (stride, padding, dilation, pre_activation, mid_activation, activation, save_intermediate)
    y = eager.run(SEPARABLE_CONV2D, tensors, options, backend.default)
    if y is not None:
        return y
    tracing = torch.jit.is_tracing()
    if tracing and padding == "same":
        x, padding = _padded_in_the_trace(x, depthwise_weight, stride, dilation), 0
    call = normalise(
        x,
        depthwise_weight,
        pointwise_weight,
        bias,
        stride,
        padding,
        dilation,
        depthwise_bias=depthwise_bias,
        residual=residual,
        pre_activation=pre_activation,
        mid_activation=mid_activation,
        activation=activation,
        save_intermediate=save_intermediate,
    )
    if tracing and exporting.traces_for_onnx():
        y = convolutions.forward(*call.tensors, *call.arguments)
    else:
        save = () if call.save is None else (call.save,)
        y = autograd.separable_conv2d(*call.tensors, *call.arguments, backend.default, *save)
    return y.squeeze(0) if call.unbatched else y


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | str | Pair | tuple[Pair, Pair] = 0,
    dilation: int | Pair = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution: every channel with kernels of its own; `F.conv2d` with as many groups as channels.

    ``y = act(depthwise(pre_act(x)) + bias)``

    Args:
        x: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16, any strides. A sequence (N, C, L) is an
            image of one row: ``x.unsqueeze(-2)``, with a weight (C * m, 1, 1, k) and stride, padding and dilation of
            (1, s), (0, p) and (1, d).
        weight: (C * m, 1, kh, kw), as PyTorch lays out a grouped convolution's; m is the depth multiplier. Output
            channel k reads input channel k // m.
        bias: (C * m,).
        stride: in pixels; an int or (vertical, horizontal).
        padding: zeros round x, in pixels: an int, (vertical, horizontal), ((top, bottom), (left, right)), "valid"
            (none) or "same" (TensorFlow's rule: out = ceil(in / stride), for every stride).
        dilation: distance between the taps, in pixels; an int or (vertical, horizontal).
        pre_activation, activation: None, "relu", "relu6", "elu", "silu", "hardswish" or "gelu", on x as it is read and
            on the output.

    Returns:
        (N, C * m, out_h, out_w), or (C * m, out_h, out_w) for an unbatched x, where
        out = floor((in + before + after - dilation * (k - 1) - 1) / stride) + 1. Its memory format is x's.

    Raises:
        TypeError: an argument of a wrong type or dtype (all tensors share x's), named in the message.
        ValueError: a wrong value, shape or device, named in the message.

    Under autocast the tensors are cast as a convolution's would be. Differentiable any number of times, in both modes.
    """
    options = (stride, padding, dilation, pre_activation, activation)
    y = eager.run(DEPTHWISE_CONV2D, (x, weight, bias), options, backend.default)
    if y is not None:
        return y
    tracing = torch.jit.is_tracing()
    if tracing and padding == "same":
        x, padding = _padded_in_the_trace(x, weight, stride, dilation), 0
    call = normalise_depthwise(
        x, weight, bias, stride, padding, dilation, pre_activation=pre_activation, activation=activation
    )
    if tracing and exporting.traces_for_onnx():
        y = convolutions.depthwise_forward(*call.tensors, *call.arguments)
    else:
        y = autograd.depthwise_conv2d(*call.tensors, *call.arguments, backend.default)
    return y.squeeze(0) if call.unbatched else y


def _padded_in_the_trace(x: Tensor, weight: Tensor, stride: int | Pair, dilation: int | Pair) -> Tensor:
    """x padded by TensorFlow's rule, for `torch.jit.trace`: its sizes are tensors, from which the trace computes them
    at every call, but which an operator's argument would freeze. (No activation makes anything else of a 0.)"""
    size, kernel = TensorSpec.of("x", x).shape[-2:], TensorSpec.of("weight", weight).shape[-2:]
    top, bottom, left, right = padding_sides(
        "same", size, tuple(map(int, kernel)), pair("stride", stride, 1), pair("dilation", dilation, 1)
    )
    return F.pad(x, (left, right, top, bottom))
