"""Runs the split family: our depthwise kernels, and PyTorch's own 1x1 beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.families.depthwise import launch as depthwise_launch
from fused_sepconv.native.marshalling import Tensors
from fused_sepconv.planning.problem import Candidate, Problem
from fused_sepconv.tensors.activations import ACTIVATIONS
from fused_sepconv.tensors.memory_format import as_output, empty_output

_IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu_,
    "relu6": lambda z: F.hardtanh_(z, 0.0, 6.0),
    "elu": F.elu_,
    "silu": lambda z: F.silu(z, inplace=True),
    "hardswish": lambda z: F.hardswish(z, inplace=True),
    "gelu": torch.ops.aten.gelu_,
}


def forward(candidate: Candidate, problem: Problem, tensors: Tensors) -> Tensor:
    """The output: the depthwise result through device memory, then the 1x1, residual and activation."""
    x, _, pointwise_weight, bias, _, residual = tensors
    (depthwise,) = candidate.steps
    t = _intermediate(depthwise, problem, tensors)
    z = _pointwise(candidate, t, pointwise_weight, bias)
    if residual is not None:
        z.add_(residual)
    return as_output(x, _IN_PLACE[problem.activation](z))


def backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The six gradients, None where not asked for; the depthwise result is computed again at most once."""
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, want_residual = output_mask
    x, _, pointwise_weight, *_ = tensors
    again, one_pass = candidate.steps
    grad_z, t = gradient_of_argument(candidate, again, problem, grad_output, tensors, output)
    if want_pointwise and t is None:
        t = _intermediate(again, problem, tensors)
    want_t = want_x or want_depthwise or want_depthwise_bias
    grad_t, grad_pointwise, grad_bias = pointwise_backward(
        candidate, grad_z, t, pointwise_weight, (want_t, want_pointwise, want_bias), x
    )
    grad_x = grad_depthwise = grad_depthwise_bias = None
    if want_t:
        grad_x, grad_depthwise, grad_depthwise_bias = depthwise_backward(
            one_pass, problem, grad_t, tensors, (want_x, want_depthwise, want_depthwise_bias)
        )
    return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_z if want_residual else None


def gradient_of_argument(
    candidate: Candidate,
    again: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the last activation's argument z, and the depthwise result where z was computed again for it.

    `again` is the kernel of the depthwise result.
    """
    if problem.activation is None:
        return grad_output, None
    activation = ACTIVATIONS[problem.activation]
    if output is not None and activation.from_output is not None:
        return activation.from_output(grad_output, output), None
    _, _, pointwise_weight, bias, _, residual = tensors
    t = _intermediate(again, problem, tensors)
    z = _pointwise(candidate, t, pointwise_weight, bias)
    return activation.backward(grad_output, z if residual is None else z.add_(residual)), t


def depthwise_backward(
    one_pass: Candidate, problem: Problem, grad_t: Tensor, tensors: Tensors, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, the depthwise weight and its bias from that of the 1x1's input."""
    x, depthwise_weight, _, _, depthwise_bias, _ = tensors
    return depthwise_launch.backward(
        one_pass, problem.depthwise("backward"), x, depthwise_weight, depthwise_bias, grad_t, mask
    )


def _intermediate(step: Candidate, problem: Problem, tensors: Tensors) -> Tensor:
    """The depthwise result."""
    x, depthwise_weight, _, _, depthwise_bias, _ = tensors
    return depthwise_launch.forward(step, problem.depthwise("forward"), x, depthwise_weight, depthwise_bias)


def _pointwise(candidate: Candidate, t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1x1 in a tensor of its own: (N, F, out_h, out_w)."""
    return _matmul(t, weight, bias) if candidate.pointwise == "matmul" else F.conv2d(t, weight, bias)


def _matmul(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1x1 of an NHWC image as a product of its pixels, as rows, with the weight.

    An activation is a pass of its own: cuBLAS has relu in its epilogue, but does not say that it keeps NaN.
    """
    rows, columns = _rows(t), weight.flatten(1).t()
    return _image(torch.mm(rows, columns) if bias is None else torch.addmm(bias, rows, columns), t.shape)


def pointwise_backward(
    candidate: Candidate, grad_z: Tensor, t: Tensor | None, weight: Tensor, mask: tuple[bool, bool, bool], x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the 1x1's input, weight and bias, None where the mask does not ask.

    That of the weight is a sum over all pixels, which cuBLAS may cut into parts and add in 16 bits
    (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`). A convolution adds in float32.
    """
    want_t, want_weight, want_bias = mask
    grad_t = None
    if candidate.pointwise == "matmul" and want_t:
        grad_t = _image(torch.mm(_rows(grad_z), weight.flatten(1)), grad_z.shape)
        mask = (False, want_weight, want_bias)
    if not any(mask):
        return grad_t, None, None
    if t is None:
        # Only the weight's gradient reads the input; of this one, PyTorch looks at the shape and strides.
        n, _, height, width = grad_z.shape
        t = empty_output(x, (n, weight.shape[1], height, width))
    grads = torch.ops.aten.convolution_backward(
        grad_z, t, weight, [weight.shape[0]], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, mask
    )
    return grads[0] if grad_t is None else grad_t, grads[1], grads[2]


def _rows(image: Tensor) -> Tensor:
    """(pixels, channels) of an image: a view where it is NHWC."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(rows: Tensor, shape: torch.Size) -> Tensor:
    """The image, NHWC, whose pixels the rows are."""
    n, _, height, width = shape
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)
