"""`python -m tests.run_cases`: a short list of cases through the kernels on the GPU, for tools that watch a process.

compute-sanitizer slows a kernel down a hundredfold, so this is the least that executes every instance: each dtype and
layout, on the cases that between them have tails, strides, activations, biases and a residual.
"""

from __future__ import annotations

import sys

import torch

import fused_sepconv
from fused_sepconv.ops.launching import preferring
from tests.support.calls import function_of
from tests.support.cases import CASES, DEPTHWISE, both

LARGEST = 20_000  # multiplications
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32 = 5e-3  # of the 1x1 in float32, where PyTorch allows it


def main() -> int:
    if not torch.cuda.is_available():
        print("run_cases: no GPU that torch can use", file=sys.stderr)
        return 2
    cases = both([case for case in CASES if case.N and case.multiplications < LARGEST][::4])
    runs = [("simt", case) for case in cases]
    runs += [(family, case) for family in ("split", "mma") for case in (*cases, *DEPTHWISE)]
    wrong = 0
    for family, case in runs:
        exact = case.tensors()
        oracle = case.definition(**exact, **case.options)
        for dtype, tolerance in TOLERANCE.items():
            for memory_format in (torch.channels_last, torch.contiguous_format):
                tensors = {name: tensor.to("cuda", dtype) for name, tensor in exact.items()}
                tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
                tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
                with fused_sepconv.use_backend("fused"), preferring(family):
                    y = function_of(case)(**tensors, **case.options)
                    y.sum().backward()
                error = float((y.detach().cpu().double() - oracle).norm() / oracle.norm())
                if not error < (TF32 if family != "simt" and dtype == torch.float32 else tolerance):
                    wrong += 1
                    print(f"{family} {case} {dtype} {memory_format}: relative error {error:.2e}")
    torch.cuda.synchronize()
    print(f"run_cases: {len(runs)} cases in {len(TOLERANCE)} dtypes and 2 layouts, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
