"""Counts the bytes that a training step of Xception moves through a GPU's memory and saves for its backward.

    python benchmarks/traffic.py [--batch 64] [--device H200]

Nothing is run: a step is traced on meta tensors, operator by operator. A convolution of this package moves what the
plan says of the kernels that it would run (tests hold that against the bytes that the emulated kernels ask for). Any
other operator reads each tensor that it is given and writes each that it gives, but for what `_PASSES` says.
Parameters are counted like every tensor; the optimizer's step is not part of it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from suites import saved_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_sepconv import SeparableConv2d, fuse_batch_norm, restore_convs, use_backend
from fused_sepconv.families.depthwise import normalised
from fused_sepconv.models import xception
from fused_sepconv.ops import launching, norm_units, problems
from fused_sepconv.ops.arguments import Arguments, DepthwiseArguments
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import plan
from fused_sepconv.tensors.memory_format import memory_format_of

aten = torch.ops.aten


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


# Exceptions: tensors that PyTorch's CUDA kernels read more than once, or are given and do not read.
_PASSES: dict[Any, Callable[..., int]] = {
    # For the statistics, and to normalise.
    aten.native_batch_norm.default: lambda x, *_: _bytes(x),
    # For the two sums, and for the gradient.
    aten.native_batch_norm_backward.default: lambda grad, x, *_: _bytes(grad, x),
    # For the gradients of the input and of the weight, each.
    aten.convolution_backward.default: lambda grad, *rest: _bytes(grad) * (sum(rest[-1][:2]) - 1),
    # Both read the dtype or the sizes of this input, not its elements.
    aten.batch_norm_gather_stats_with_counts.default: lambda x, *_: -_bytes(x),
    aten.max_pool2d_with_indices_backward.default: lambda grad, x, *_: -_bytes(x),
}

_MOVES_NOTHING = ("aten::detach", "aten::empty", "aten::empty_strided", "aten::empty_like")

_KINDS = {
    "norm_pool": "joins",
    "norm_add": "joins",
    "depthwise": "depthwise",
    "separable": "separable",
    "batch_norm": "BatchNorm",
    "convolution": "convolutions",
    "threshold": "activations",
    "relu": "activations",
    "max_pool": "pooling",
    "add": "additions",
}
"""Kinds of operators, by what is in their names; the first that fits."""


@dataclass
class Traffic(TorchDispatchMode):
    """Bytes of device memory, read and written, by direction and kind of operator, of what runs within the context."""

    direction: str = "forward"
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = self.run(op, args, kwargs)
        if op.namespace == "fused_sepconv" and "conv2d" in op._schema.name:
            moved = self.planned(op, args)
        elif op.is_view or op._schema.name in (
            "aten::detach",
            "aten::empty",
            "aten::empty_strided",
            "aten::empty_like",
        ):
            moved = 0
        else:
            read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            moved = _bytes(*read, *written) + _PASSES.get(op, lambda *_: 0)(*args)
        name = op._schema.name
        self.bytes[self.direction, next((kind for part, kind in _KINDS.items() if part in name), "other")] += moved
        return result

    def run(self, op: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator."""
        if op in _FOR_CUDA_ALONE:
            return _FOR_CUDA_ALONE[op](*args)
        result = op(*args, **kwargs)
        if op is aten.convolution.default:  # on the meta device NCHW always
            return result.contiguous(memory_format=memory_format_of(args[0]))
        if op is aten.convolution_backward.default and result[0] is not None:
            return result[0].contiguous(memory_format=memory_format_of(args[1])), *result[1:]
        return result

    def planned(self, op: Any, args: tuple) -> int:
        """The bytes of an operator of this package, by the plan."""
        name = op._schema.name.split("::")[1].removesuffix("_backward")
        direction = "backward" if op._schema.name.endswith("_backward") else "forward"
        args = args[1:] if direction == "backward" else args
        where = launching.device_and_kernels(args[0].device)
        if name == "norm_depthwise_conv2d":
            x, weight, bias, arguments = args[0], *args[5:7], args[7:11]
            problem = norm_units.problem_of(x, weight, bias, arguments)
            return normalised.candidate(replace(problem, direction=direction), *where).bytes
        count = {"separable_conv2d": 6, "depthwise_conv2d": 3}[name]
        kind, problem_of = Arguments, problems.problem_of
        if name == "depthwise_conv2d":
            kind, problem_of = DepthwiseArguments, problems.depthwise_problem_of
        tensors, rest = args[:count], args[count + (direction == "backward") :]
        *arguments, backend = rest[: len(kind._fields) + 1]
        arguments = kind(*(tuple(each) if isinstance(each, list) else each for each in arguments))
        return plan(problem_of(direction, tensors, arguments), *where).choose(backend, launching.wish.family).bytes

    def total(self, direction: str = "") -> int:
        return sum(moved for (way, _), moved in self.bytes.items() if way.startswith(direction))


def _statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.ones(x.shape[1], dtype=norm_units.accumulator(x), device=x.device) for _ in range(2))


_FOR_CUDA_ALONE: dict[Any, Callable[..., Any]] = {
    aten.batch_norm_stats.default: _statistics,
    aten.batch_norm_gather_stats_with_counts.default: _statistics,
    aten.batch_norm_backward_elemt.default: lambda grad, *_: torch.empty_like(grad),
    aten.batch_norm_backward_reduce.default: lambda grad, *rest: 2 * _statistics(*rest),
}
"""Tensors like the results of PyTorch's operators that are for CUDA tensors alone."""


# Variants of a step


def _saving(save: bool | str, model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SeparableConv2d):
            module.save_intermediate = save


VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    "PyTorch, eager": restore_convs,
    "False": partial(_saving, False),
    "'auto'": partial(_saving, "auto"),
    "True": partial(_saving, True),
    "False, fuse_norm": lambda model: (_saving(False, model), fuse_batch_norm(model)),
    "'auto', fuse_norm": fuse_batch_norm,
    "True, fuse_norm": lambda model: (_saving(True, model), fuse_batch_norm(model)),
}
"""Variants of a network, by name: `save_intermediate`, and whether BatchNorms are fused."""


@dataclass(frozen=True)
class Step:
    """Bytes of a training step."""

    traffic: Traffic
    saved: int  # for the backward, parameters and statistics left out


def count(model: nn.Module, x: Tensor, device: str = "H200") -> Step:
    """Counts the bytes that a training step of a meta model, its loss left out, moves and saves on a device."""
    model.train()
    traffic = Traffic()
    own = [*model.parameters(), *model.buffers()]
    results: list[Tensor] = []
    with launching.meta_planned_for(device), use_backend("fused"), traffic:
        saved = saved_bytes(lambda: results.append(model(x)), own)
        traffic.direction = "backward"
        (y,) = results
        y.backward(y.detach())
    return Step(traffic, saved)


def xception_step(change: Callable[[nn.Module], object], batch: int, device: str = "H200") -> Step:
    """A step of the network in bfloat16, NHWC, on 299 x 299 images."""
    model = xception(device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    change(model)
    x = torch.empty(batch, 3, 299, 299, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    return count(model, x, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=DEVICES, default="H200")
    arguments = parser.parse_args()
    steps = {name: xception_step(change, arguments.batch, arguments.device) for name, change in VARIANTS.items()}
    kinds = sorted({kind for step in steps.values() for _, kind in step.traffic.bytes})
    columns = ["forward", "backward", "total", *kinds, "saved"]
    print("| GB, batch", arguments.batch, "|", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, step in steps.items():
        by_kind = [sum(step.traffic.bytes[way, kind] for way in ("forward", "backward")) for kind in kinds]
        figures = [step.traffic.total("forward"), step.traffic.total("backward"), step.traffic.total()]
        print("|", name, "|", " | ".join(f"{each / 1e9:.2f}" for each in (*figures, *by_kind, step.saved)), "|")


if __name__ == "__main__":
    main()
