"""PyTorch's own convolutions for exporters, whose targets know no other.

`ExportedProgram.run_decompositions`, and `torch.onnx.export` through it, get them for an operator of this package: no
table of decompositions that is made in PyTorch can hold one, so the operators decompose themselves there. The exported
program itself, and everything that is compiled, keeps the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from fused_sepconv.ops.autograd import backward_composite
from fused_sepconv.ops.operators import OPERATORS, Operator
from fused_sepconv.ops.torch_internals import decompositions

_CORE = torch.ops.aten.addcmul_.default
"""In the tables of decompositions that PyTorch makes, for its core operators or ONNX's, and not in an empty one."""


def traces_for_onnx() -> bool:
    """Whether `torch.onnx.export(dynamo=False)` is tracing."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def _forward(operator: Operator) -> Callable[..., Tensor]:
    count, (forward, _) = operator.count, operator.reference

    def convolutions(*args: Any) -> Tensor:
        (x, *weights), (stride, padding, dilation, *activations) = args[:count], args[count : operator.arity - 1]
        if any(isinstance(side, torch.SymInt) for side in padding):
            # Which sides are equal would be asked of the sizes. (Every activation leaves a 0 as it is.)
            top, bottom, left, right = padding
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0, 0, 0)
        return forward(x, *weights, stride, padding, dilation, *activations)

    return convolutions


def _register(op: torch._ops.OpOverload, convolutions: Callable[..., Any]) -> None:
    def traced(mode: ProxyTorchDispatchMode, *args: Any) -> Any:
        table = decompositions(mode)
        if torch.compiler.is_exporting() and not mode.pre_dispatch and _CORE in table and op not in table:
            with mode:
                return convolutions(*args)
        return mode.__torch_dispatch__(op, (), args, {})

    op.py_impl(ProxyTorchDispatchMode)(traced)


for _operator in OPERATORS:
    _register(_operator.forward, _forward(_operator))
    _register(_operator.backward, backward_composite(_operator))
