"""Both operators as PyTorch's own convolutions: the oracle, the CPU path, and what "auto" falls to.

`forward` and `backward` are the two directions of an already checked call of `separable_conv2d`, `depthwise_forward`
and `depthwise_backward` those of `depthwise_conv2d`. They are made of PyTorch's differentiable operators: the backward
of the backward is PyTorch's own too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.ops.arguments import Padding, Pair
from fused_sepconv.tensors.activations import ACTIVATIONS

Mask = Sequence[bool]  # whether each input's gradient is asked for


def forward(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    depthwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    pre_activation: str | None,
    mid_activation: str | None,
    activation: str | None,
) -> Tensor:
    """y = act(pointwise(mid_act(depthwise(pre_act(x)) + depthwise_bias)) + bias + residual), (N, F, out_h, out_w)."""
    v = depthwise_forward(
        x, depthwise_weight, depthwise_bias, stride, padding, dilation, pre_activation, mid_activation
    )
    z = F.conv2d(v, pointwise_weight, bias)
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[activation].forward(z)


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    pre_activation: str | None,
    activation: str | None,
) -> Tensor:
    """y = act(depthwise(pre_act(x)) + bias), (N, C * m, out_h, out_w)."""
    return ACTIVATIONS[activation].forward(
        _Depthwise(x, weight, stride, padding, dilation, pre_activation).forward(bias)
    )


def backward(
    grad_output: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    depthwise_bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    pre_activation: str | None,
    mid_activation: str | None,
    activation: str | None,
    output_mask: Mask,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, depthwise_weight, pointwise_weight, bias, depthwise_bias and residual, None where not asked for.

    The depthwise result is computed again, unless `kept` is what the forward saved of it: t where the mid-activation's
    derivative needs its argument, else v. `output`, where it is given, saves computing the pointwise result again
    for an activation whose derivative can be read from it.
    """
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, want_residual = output_mask
    mid, post = ACTIVATIONS[mid_activation], ACTIVATIONS[activation]

    depthwise = _Depthwise(x, depthwise_weight, stride, padding, dilation, pre_activation)
    t = depthwise.forward(depthwise_bias) if kept is None else kept
    v = t if kept is not None and mid.from_output is not None else mid.forward(t)
    if activation is None:
        grad_z = grad_output
    elif output is not None and post.from_output is not None:
        grad_z = post.from_output(grad_output, output)
    else:
        z = F.conv2d(v, pointwise_weight, bias)
        grad_z = post.backward(grad_output, z if residual is None else z + residual)

    want_t = want_x or want_depthwise or want_depthwise_bias
    grad_v, grad_pointwise, grad_bias = _convolution_backward(
        grad_z, v, pointwise_weight, (1, 1), (0, 0), (1, 1), 1, (want_t, want_pointwise, want_bias)
    )
    grad_x = grad_depthwise = grad_depthwise_bias = None
    if want_t:
        grad_x, grad_depthwise, grad_depthwise_bias = depthwise.backward(
            (mid.from_output or mid.backward)(grad_v, t), (want_x, want_depthwise, want_depthwise_bias)
        )
    return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_z if want_residual else None


def depthwise_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    pre_activation: str | None,
    activation: str | None,
    output_mask: Mask,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, None where not asked for; `output` as in `backward`."""
    post = ACTIVATIONS[activation]
    depthwise = _Depthwise(x, weight, stride, padding, dilation, pre_activation)
    if activation is None:
        grad_t = grad_output
    elif output is not None and post.from_output is not None:
        grad_t = post.from_output(grad_output, output)
    else:
        grad_t = post.backward(grad_output, depthwise.forward(bias))
    return depthwise.backward(grad_t, output_mask)


class _Depthwise:
    """The depthwise convolution of pre_act(x), which both operators have in common, and its derivative."""

    def __init__(
        self, x: Tensor, weight: Tensor, stride: Pair, padding: Padding, dilation: Pair, pre_activation: str | None
    ) -> None:
        self._x, self._weight, self._padding = x, weight, padding
        self._pre = ACTIVATIONS[pre_activation]
        self._image, self._symmetric = _padded(self._pre.forward(x), padding)
        self._options = (stride, self._symmetric, dilation)

    def forward(self, bias: Tensor | None) -> Tensor:
        return F.conv2d(self._image, self._weight, bias, *self._options, groups=self._x.shape[1])

    def backward(self, grad: Tensor, mask: Mask) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias."""
        groups = self._x.shape[1]
        grad_x, grad_weight, grad_bias = _convolution_backward(
            grad, self._image, self._weight, *self._options, groups, mask
        )
        if grad_x is not None:
            grad_x = self._pre.backward(_unpadded(grad_x, self._x, self._padding, self._symmetric), self._x)
        return grad_x, grad_weight, grad_bias


def _padded(image: Tensor, padding: Padding) -> tuple[Tensor, Pair]:
    """The image and the padding that the convolution itself can still apply: the same on both sides or none."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return image, (top, left)
    return F.pad(image, (left, right, top, bottom)), (0, 0)


def _unpadded(grad: Tensor, x: Tensor, padding: Padding, symmetric: Pair) -> Tensor:
    top, _, left, _ = padding
    if symmetric == (top, left) and grad.shape == x.shape:
        return grad
    return grad[:, :, top : top + x.shape[2], left : left + x.shape[3]]


def _convolution_backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    mask: Mask,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_image, grad_weight, grad_bias), None where the mask does not ask."""
    return torch.ops.aten.convolution_backward(
        grad, image, weight, [weight.shape[0]], stride, padding, dilation, False, (0, 0), groups, mask
    )
