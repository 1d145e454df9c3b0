"""The floor of a network of any kind, run operator by operator: each of them a perfect kernel.

The network runs once on meta tensors, and every operator that PyTorch dispatches is counted: the bytes of the tensors
that it takes and gives, and its flops by PyTorch's own formulas. Views move nothing. An operator that its library makes
of several kernels counts as one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from problem import DTYPES
from roofline import Ceilings, Floor, Kernel, floor_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class OperatorCounter(TorchDispatchMode):
    """Notes every operator that runs, as a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and not _makes_empty(func):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            moved = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
            self.kernels.append(Kernel(str(func), moved, matrix_flops=flops))
        return out


def _makes_empty(func: Any) -> bool:
    return "empty" in func.overloadpacket.__name__ or func.overloadpacket is torch.ops.aten.detach


def operator_floor(
    build: Callable[[], nn.Module],
    batch: int,
    dtype: str,
    *,
    training: bool,
    ceilings: Ceilings,
    image_size: int = 299,
) -> Floor:
    """Of one inference, or of forward, backward and SGD with momentum, with activations and weights in `dtype`."""
    with torch.device("meta"):
        model = build().to(DTYPES[dtype]).train(training)
        x = torch.empty(batch, 3, image_size, image_size, dtype=DTYPES[dtype])
        target = torch.zeros(batch, dtype=torch.long)
    counter = OperatorCounter()
    with counter:
        if training:
            F.cross_entropy(model(x), target).backward()
        else:
            with torch.no_grad():
                model(x)
    kernels = counter.kernels
    if training:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        kernels = [*kernels, Kernel("optimizer", parameters * 4 * 5)]
    return floor_of(kernels, dtype, ceilings)
