"""`python -m tests.accuracy`: how far from the truth are the kernels on Xception's layers, at their full size?

Prints, for the output and every gradient, the relative L2 error against float64, beside the error that PyTorch's own
convolutions make in the same dtype; and fails where ours is more than twice theirs, plus the rounding of the result
(closeness.py). Runs on the GPU where there is one, and emulated on the CPU otherwise: some minutes for all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv.native import loader
from fused_sepconv.ops.launching import preferring
from tests.support.cases import XCEPTION, XCEPTION_REDUCED, Case, two_convolutions
from tests.support.closeness import assert_as_close_as_eager
from tests.support.emulation import emulated_kernels
from tests.support.tf32 import pointwise_in_tf32

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=("mma", "split", "simt"), default="mma", help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: all that the tensor cores serve")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="nhwc", help="default: %(default)s")
    parser.add_argument("--layers", default="", metavar="TEXT", help="only layers whose name contains this, as @19")
    parser.add_argument("--reduced", action="store_true", help="an eighth of the channels, on small images")
    given = parser.parse_args()
    dtypes = [given.dtype] if given.dtype else [name for name in DTYPES if name != "float32"]
    layers = [case for case in (XCEPTION_REDUCED if given.reduced else XCEPTION) if given.layers in case.name]
    if not layers:
        parser.error(f"argument --layers: no layer's name contains {given.layers!r}")

    gpu = torch.cuda.is_available()
    wrong = 0
    emulated = contextlib.nullcontext() if gpu or os.environ.get("FUSED_SEPCONV_NATIVE") else emulated_kernels(False)
    with emulated, preferring(given.family):
        for case, dtype in product(layers, dtypes):
            with allowing_tf32(dtype == "tf32"), fused_sepconv.use_backend("fused"):
                wrong += report(case, dtype, LAYOUTS[given.layout], "cuda" if gpu else "cpu")
    print(f"{len(layers)} layers in {', '.join(dtypes)} {'on the GPU' if gpu else 'emulated'}: {wrong} results too far")
    return int(wrong > 0)


def report(case: Case, dtype: str, memory_format: torch.memory_format, device: str) -> int:
    """Prints a line for each result of a case; returns how many are too far from the truth."""
    exact = case.tensors()
    stored = {name: tensor.to(device, DTYPES[dtype]) for name, tensor in exact.items()}
    stored["x"] = stored["x"].contiguous(memory_format=memory_format)
    loader.load().reset_launch_counts()
    ours = results(fused_sepconv.separable_conv2d, stored, case, DTYPES[dtype])
    print(f"{case} {dtype}: {', '.join(loader.load().launch_counts())}", flush=True)
    eager = results(eager_in(dtype), stored, case, DTYPES[dtype])
    exact = {name: tensor.cpu().double() for name, tensor in stored.items()}
    oracle = results(two_convolutions, exact, case, DTYPES[dtype])
    wrong = 0
    for name, mine in ours.items():
        errors = [relative_error(result, oracle[name]) for result in (mine, eager[name])]
        verdict = ""
        try:
            assert_as_close_as_eager(mine, eager[name], oracle[name], name=name)
        except AssertionError as error:
            verdict, wrong = f"  TOO FAR: {error}", wrong + 1
        print(f"    {name:34} {errors[0]:.2e}, eager {errors[1]:.2e}{verdict}", flush=True)
    return wrong


def eager_in(dtype: str) -> Callable[..., Tensor]:
    """PyTorch's own convolutions; those in TF32 by hand, as a CPU has none, and cuDNN uses it where it likes."""
    if dtype != "tf32":
        return two_convolutions
    return lambda **arguments: two_convolutions(**arguments, pointwise=pointwise_in_tf32)


def results(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], case: Case, rounded: torch.dtype
) -> dict[str, Tensor]:
    """The output, and the gradients for a random gradient of it, the same in every dtype: rounded to one of them."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves, **case.options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(rounded).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **{f"gradient of {name}": each for name, each in zip(leaves, grads, strict=True)}}


def relative_error(result: Tensor, oracle: Tensor) -> float:
    return float((result.cpu().double() - oracle).norm() / oracle.norm())


@contextlib.contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's flag for convolutions, as it was afterwards."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


if __name__ == "__main__":
    sys.exit(main())
