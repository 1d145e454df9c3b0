"""The 1x1 convolution in TF32, on a CPU: what eager gives on a GPU, where its flags allow TF32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to TF32's ten bits of fraction, ties away from zero, as cvt.rna does."""
    return (tensor.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def pointwise_in_tf32(t: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(N, K, H, W), (F, K, 1, 1), (F) -> (N, F, H, W): operands of all three products in TF32, sums in float32."""
    z = _Pointwise.apply(t, weight)
    return z if bias is None else z + bias.view(-1, 1, 1)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, weight: Tensor) -> Tensor:
        operands = to_tf32(t), to_tf32(weight)
        ctx.save_for_backward(*operands)
        return torch.nn.functional.conv2d(*operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        t, weight = ctx.saved_tensors
        grad = to_tf32(grad)
        grad_t = torch.nn.functional.conv_transpose2d(grad, weight)
        grad_weight = torch.einsum("nfhw,nkhw->fk", grad, t).view(weight.shape)
        return grad_t, grad_weight
