"""Builds the problem that a checked call is, for the plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sepconv.native.marshalling import Tensors
from fused_sepconv.ops.arguments import Arguments, DepthwiseArguments, output_size
from fused_sepconv.planning.plan import INSTANCES
from fused_sepconv.planning.problem import DepthwiseProblem, Kernels, Problem
from fused_sepconv.tensors.memory_format import aligned, memory_format_of, tf32

DepthwiseTensors = tuple[Tensor, Tensor, Tensor | None]
"""x, weight, bias."""

ALL_KERNELS = Kernels(frozenset(INSTANCES))
"""What a complete build has; predictions for a device that is not here assume it."""


def problem_of(direction: str, tensors: Tensors, arguments: Arguments) -> Problem:
    """The problem that a checked call is."""
    x, depthwise_weight, pointwise_weight, _, _, residual = tensors
    return Problem(
        **_depthwise_fields(direction, x, depthwise_weight, arguments),
        mid_activation=arguments.mid_activation,
        F=pointwise_weight.shape[0],
        activation=arguments.activation,
        residual=residual is not None,
        tf32=tf32(),
    )


def depthwise_problem_of(direction: str, tensors: DepthwiseTensors, arguments: DepthwiseArguments) -> DepthwiseProblem:
    """The problem that a checked call of a depthwise convolution is."""
    x, weight, _ = tensors
    return DepthwiseProblem(
        **_depthwise_fields(direction, x, weight, arguments),
        mid_activation=arguments.activation,
    )


def _depthwise_fields(
    direction: str, x: Tensor, weight: Tensor, arguments: Arguments | DepthwiseArguments
) -> dict[str, Any]:
    n, channels, height, width = x.shape
    kernel = tuple(weight.shape[2:])
    out_h, out_w = output_size((height, width), kernel, arguments.stride, arguments.padding, arguments.dilation)
    # The dilation of one tap alone says nothing: it is where it is.
    dilation = tuple(1 if taps == 1 else apart for apart, taps in zip(arguments.dilation, kernel, strict=True))
    return {
        "direction": direction,
        "N": n,
        "C": channels,
        "H": height,
        "W": width,
        "multiplier": weight.shape[0] // channels,
        "kernel": kernel,
        "stride": arguments.stride,
        "padding": arguments.padding,
        "dilation": dilation,
        "out_h": out_h,
        "out_w": out_w,
        "dtype": str(x.dtype).removeprefix("torch."),
        "layout": "nhwc" if memory_format_of(x) == torch.channels_last else "nchw",
        "pre_activation": arguments.pre_activation,
        "aligned": aligned(x),
    }
