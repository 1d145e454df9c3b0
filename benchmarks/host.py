"""The host's time of one call with next to nothing to compute, and the number of Python functions that it enters.

`measure` runs this file in a process of its own, in which launches of our kernels are stubbed: the null build of the
native module counts them and runs nothing. So what is left of a fused call is its way through Python; the two
`nn.Conv2d` beside it do their arithmetic. All of it is on one thread of the CPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from problem import DTYPES, LAYOUTS
from torch import Tensor, nn
from torch.utils import benchmark

from fused_sepconv import SeparableConv2d, use_backend
from fused_sepconv.native import loader
from fused_sepconv.ops.launching import preferring

CHECKOUT = Path(__file__).resolve().parent.parent
SHAPE = (16, 16, 5)  # channels, features, and pixels a side
PASSES = {"fwd": "no grad", "grad": "grad", "both": "forward + backward"}
FAMILIES = {"simt": "simt_", "split": "depthwise_", "mma": "mma_"}  # the kernels of each begin with this
PEER = "conv2d-nchw"
TURNS = 15


def measure(seconds: float, build: bool) -> list[dict[str, Any]]:
    """One dictionary for each implementation and pass: impl, dtype, layout, pass, seconds, python_calls, error.

    With `build` the null build is made where it is missing; without, families are left out where it is not there.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)

    failed: list[dict[str, Any]] = []
    if build or list((CHECKOUT / "build/cuda_on_cpu/null").glob("_native*.so")):
        built = python("-m", "tests.cuda_on_cpu", "--null")
        if built.returncode:
            error = f"the null build failed: {built.stderr.strip().splitlines()[-1]}"
            failed = [entry(f"fused-{family}", "bfloat16", "nhwc", way, error) for family in FAMILIES for way in PASSES]
        else:
            environment["FUSED_SEPCONV_NATIVE"] = built.stdout.strip().splitlines()[-1]
    done = python(__file__, str(seconds))
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        return [entry("fused-reference", "float32", "nchw", way, error) for way in PASSES]
    return json.loads(done.stdout) + failed


def entry(impl: str, dtype: str, layout: str, direction: str, error: str | None = None) -> dict[str, Any]:
    about = {"impl": impl, "dtype": dtype, "layout": layout, "pass": direction}
    return {**about, "seconds": [], "python_calls": None, "error": error}


class Contestant:
    """An implementation on tensors of its own."""

    def __init__(self, impl: str, module: nn.Module, dtype: str, layout: str, family: str | None = None) -> None:
        self.about = impl, dtype, layout
        self.family = family
        channels, features, size = SHAPE
        like = {"dtype": DTYPES[dtype], "memory_format": LAYOUTS[layout]}
        self.module = module.to(DTYPES[dtype])
        self.x = torch.randn(1, channels, size, size).to(**like).requires_grad_()
        self.grad_y = torch.randn(1, features, size, size).to(**like)
        self.leaves = [self.x, *module.parameters()]

    @contextmanager
    def settings(self) -> Iterator[None]:
        with use_backend("fused" if self.family else "reference"), preferring(self.family):
            yield

    def call(self, direction: str) -> Callable[[], object]:
        def forward() -> Tensor:
            return self.module(self.x)

        def without_grad() -> Tensor:
            with torch.no_grad():
                return self.module(self.x)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(self.module(self.x), self.leaves, self.grad_y)

        return {"fwd": without_grad, "grad": forward, "both": both}[direction]


def contestants() -> list[Contestant]:
    channels, features, _ = SHAPE

    def separable() -> nn.Module:
        return SeparableConv2d(channels, features, 3, padding=1, bias=False)

    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    plain = nn.Sequential(depthwise, nn.Conv2d(channels, features, 1, bias=False))
    native = loader.load()
    families = FAMILIES if native is not None and native.build_info()["emulated"] else ()
    return [
        Contestant(PEER, plain, "float32", "nchw"),
        Contestant("fused-reference", separable(), "float32", "nchw"),
        *(Contestant(f"fused-{family}", separable(), "bfloat16", "nhwc", family) for family in families),
    ]


def python_calls(call: Callable[[], object]) -> int:
    """How many Python functions a call enters, itself not counted."""
    entered = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered - 1


def check_kernels(family: str) -> None:
    """Raises where none of a family's kernels has been launched."""
    launched = list(loader.load().executed())
    if not any(name.startswith(FAMILIES[family]) for name in launched):
        raise RuntimeError(f"none of the launched kernels is of the family {family}: {launched}")


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    found, running = [], []
    for who in contestants():
        for direction in PASSES:
            row = entry(*who.about, direction)
            found.append(row)
            call = who.call(direction)
            try:
                with who.settings():
                    for _ in range(5):  # a signature's first calls do more
                        call()
                    row["python_calls"] = python_calls(call)
                if who.family:
                    check_kernels(who.family)
                timer = benchmark.Timer("call()", globals={"call": call}, num_threads=1)
                with who.settings():
                    running.append((who, timer, max(int(seconds / TURNS / timer.timeit(5).mean), 1), row))
            except Exception as failure:  # whatever goes wrong with one must not stop the others
                row["error"] = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    for _ in range(TURNS):  # a CPU's speed drifts with what else runs: taking turns shares that
        for who, timer, calls, row in running:
            with who.settings():
                row["seconds"].append(timer.timeit(calls).mean)
    print(json.dumps(found))


if __name__ == "__main__":
    main(float(sys.argv[1]))
