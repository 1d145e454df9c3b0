"""The families by name, and how each prepares a candidate: one protocol for all of them.

`forward(candidate, problem, tensors)` and `backward(candidate, problem, grad_output, tensors, output, mask)` look at
the strides and dtypes of the tensors given, and make something that runs on every later call like this one:
`run(*tensors)` gives the output, `run(grad_output, tensors, output)` the gradients, None where the mask does not ask.
`output` is the forward's result where the last activation's derivative is read from it, else None.

Where the problem is `saved`, a forward gives (output, kept), and a backward is called with `kept` as its last argument:
the depthwise result, v, or t where the mid-activation's derivative needs t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_sepconv.families.depthwise import launch as depthwise
from fused_sepconv.families.mma import launch as mma
from fused_sepconv.families.pytorch import launch as pytorch
from fused_sepconv.families.simt import launch as simt
from fused_sepconv.families.split import launch as split

RunForward = Callable[..., Any]
RunBackward = Callable[..., "tuple[Tensor | None, ...]"]


@dataclass(frozen=True)
class Family:
    """Prepares both directions of a family's candidates."""

    forward: Callable[..., RunForward]
    backward: Callable[..., RunBackward]


SEPARABLE_CONV2D = {
    "pytorch": Family(pytorch.separable_forward, pytorch.separable_backward),
    "simt": Family(simt.Forward, simt.prepare_backward),
    "split": Family(split.Forward, split.prepare_backward),
    "mma": Family(mma.prepare_forward, mma.prepare_backward),
}
DEPTHWISE_CONV2D = {
    "pytorch": Family(pytorch.depthwise_forward, pytorch.depthwise_backward),
    "simt": Family(depthwise.Forward, depthwise.Backward),
    "depthwise": Family(depthwise.Forward, depthwise.Backward),
}
