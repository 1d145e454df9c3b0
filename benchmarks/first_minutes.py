"""The figures that decide most, in the first minutes on a GPU; each beside its floor and beside what the plan predicts.

    python benchmarks/first_minutes.py                     prints them, and writes first_minutes.json
    python benchmarks/first_minutes.py --apply FILE        puts what was measured in place of the plan's assumptions
    python bench.py --ceilings FILE                        takes the device's ceilings from it

Measured are a copy, a launch, PyTorch's matrix products, its depthwise convolutions and ours, and our fused kernels. On
a GPU that takes a minute. Where there is none every figure that needs one is named as missing, and the predictions are
an H200's; with --rehearse each call is made once all the same, on the CPU and small, so that a mistake shows early.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the checkout's package, however this is started

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from machine import product  # noqa: E402
from problem import DTYPES, LAYOUTS  # noqa: E402

import fused_sepconv  # noqa: E402
from fused_sepconv.ops import launching  # noqa: E402
from fused_sepconv.ops.problems import ALL_KERNELS  # noqa: E402
from fused_sepconv.planning.choice import cuda_seconds  # noqa: E402
from fused_sepconv.planning.devices import DEVICES  # noqa: E402
from fused_sepconv.planning.plan import plan  # noqa: E402
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Problem  # noqa: E402
from tests.support.emulation import planned_for  # noqa: E402

BATCH = 64
LAUNCHES = 200  # in the graph that shows what one costs

Call = Callable[[], object]


@dataclass
class Figure:
    """One measurement: of how many bytes and flop, what no kernel could beat, and what the plan expected."""

    name: str
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float | None = None
    floor_seconds: float | None = None
    predicted_seconds: float | None = None
    predicted_kernel: str = ""
    missing: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            text = f"missing: {self.missing}"
        else:
            text = f"{self.seconds * 1e6:9.2f} us"
            text += f", {self.bytes / self.seconds / 1e9:6.0f} GB/s" if self.bytes else ""
            text += f", {self.flops / self.seconds / 1e12:6.1f} TFLOP/s" if self.flops else ""
            text += f", {self.floor_seconds / self.seconds:5.0%} of the floor" if self.floor_seconds else ""
        if self.predicted_seconds is not None:
            text += f"; predicted {self.predicted_seconds * 1e6:.2f} us ({self.predicted_kernel})"
        return f"{self.name:58} {text}"


class Machine:
    """Where the calls are made, and how they are timed."""

    def __init__(self, rehearse: bool) -> None:
        self.gpu = torch.cuda.is_available()
        self.rehearse = rehearse and not self.gpu
        self.where = "cuda" if self.gpu else "cpu"
        here = launching._here("cuda", torch.cuda.current_device()) if self.gpu else (DEVICES["H200"], ALL_KERNELS)
        self.device, self.kernels = here
        self.name = torch.cuda.get_device_name() if self.gpu else "no GPU"

    def measure(self, figure: Figure, make: Callable[[], Call]) -> Figure:
        """Fills in the figure's seconds, or why they are missing. `make` gives the call: it allocates its tensors."""
        if not self.gpu and not self.rehearse:
            figure.missing = "needs a GPU"
            return figure
        try:
            call = make()
            if self.gpu:
                figure.seconds = cuda_seconds(self._captured(call))
            else:
                call()
                figure.missing = "needs a GPU (the call was made once on the CPU, at a small size)"
        except RuntimeError as error:  # no such kernel here, or out of memory: the others go on
            figure.missing = f"failed: {str(error).splitlines()[0]}"
        return figure

    def _captured(self, call: Call) -> Call:
        """The call as a CUDA graph, so that no kernel of it waits for the host."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # builds, searches and first allocations, which a capture does not allow
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return lambda kept=call: graph.replay()  # it reads the call's tensors

    def random(self, *shape: int, dtype: str = "bfloat16", layout: str = "nchw") -> torch.Tensor:
        tensor = torch.randn(*shape, device=self.where, dtype=DTYPES[dtype])
        return tensor.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else tensor

    def tensors(self, problem: Problem | DepthwiseProblem) -> tuple[torch.Tensor, ...]:
        """Random x, gradient, depthwise and pointwise weight of the problem; small ones where there is no GPU."""
        shape = (problem.N, problem.C, problem.H, problem.W) if self.gpu else (1, 16, 6, 6)
        x, grad = (self.random(*shape, dtype=problem.dtype, layout=problem.layout) for _ in range(2))
        k = shape[1]
        return x, grad, *(self.random(*weight, dtype=problem.dtype) for weight in ((k, 1, 3, 3), (k, k, 1, 1)))

    def candidates(self, problem: Problem | DepthwiseProblem, family: str) -> list[Candidate]:
        return [c for c in plan(problem, self.device, self.kernels).candidates if c.family == family]


# The measurements -----------------------------------------------------------------------------------------------------


def ceilings(machine: Machine) -> Iterator[Figure]:
    """A copy, a plain elementwise kernel, a launch, and square products."""
    size = 1 << (31 if machine.gpu else 12)

    def copy() -> Call:
        source = torch.ones(size, dtype=torch.uint8, device=machine.where)
        return partial(torch.empty_like(source).copy_, source)

    def launches() -> Call:
        one = torch.zeros(1, device=machine.where)
        return lambda: [one.zero_() for _ in range(LAUNCHES)]

    yield machine.measure(Figure("copy", bytes=2 * size), copy)
    relu = Figure("relu bfloat16", bytes=2 * size)
    yield machine.measure(relu, lambda: partial(torch.relu, machine.random(size // 2)))
    yield machine.measure(Figure(f"{LAUNCHES} launches in a graph"), launches)
    n = 8192 if machine.gpu else 16
    for dtype in DTYPES:
        figure = Figure(f"product {dtype} square", flops=2 * n**3)
        yield machine.measure(figure, partial(product, machine.where, dtype, n, n, n))


def products(machine: Machine) -> Iterator[Figure]:
    """The 1x1 of 728->728@19, batch 64, forward (NT), its input's gradient (NN), its weight's (TN)."""
    pixels, channels = (23104, 728) if machine.gpu else (32, 8)
    for dtype in ("bfloat16", "float16"):
        for kind in ("NN", "NT", "TN"):
            m, n, k = (channels, channels, pixels) if kind == "TN" else (pixels, channels, channels)
            moved, flops = 2 * (m * k + k * n + m * n), 2 * m * n * k
            figure = Figure(f"product {dtype} {kind} 23104x728x728", moved, flops)
            yield machine.measure(figure, partial(product, machine.where, dtype, m, n, k, kind))


def _problem(kind: type, direction: str, dtype: str, layout: str, channels: int, size: int) -> Any:
    more = {"F": channels} if kind is Problem else {}
    return kind(
        direction=direction, N=BATCH, C=channels, H=size, W=size, multiplier=1, kernel=(3, 3), stride=(1, 1),
        padding=(1, 1, 1, 1), dilation=(1, 1), out_h=size, out_w=size, dtype=dtype, layout=layout, **more,
    )  # fmt: skip


def _predict(figure: Figure, candidate: Candidate) -> None:
    if not candidate.refusal:
        figure.predicted_seconds, figure.predicted_kernel = candidate.predicted_seconds, candidate.name


def _by(family: str, call: Call) -> Call:
    """The call by a family's kernels."""

    def forced() -> None:
        with torch.no_grad(), launching.preferring(family), fused_sepconv.use_backend("fused"):
            call()

    return forced


def depthwise(machine: Machine) -> Iterator[Figure]:
    """PyTorch's depthwise convolutions (cuDNN's for NHWC, its own for NCHW) and ours, both directions."""
    for channels, size in ((728, 19), (128, 147)):
        for dtype, layout in (("bfloat16", "nhwc"), ("float16", "nhwc"), ("bfloat16", "nchw")):
            library = "cuDNN's" if layout == "nhwc" else "PyTorch's"
            for direction in ("forward", "backward"):
                problem = _problem(DepthwiseProblem, direction, dtype, layout, channels, size)
                for family, whose in (("pytorch", library), ("depthwise", "our")):
                    name = f"{whose} depthwise {direction} {channels}@{size} {dtype} {layout}"
                    floor = problem.floor_seconds(machine.device)
                    figure = Figure(name, problem.least_bytes, floor_seconds=floor)
                    _predict(figure, machine.candidates(problem, family)[0])
                    yield machine.measure(figure, partial(depthwise_call, machine, problem, family == "depthwise"))


def depthwise_call(machine: Machine, problem: DepthwiseProblem, ours: bool) -> Call:
    x, grad, weight, _ = machine.tensors(problem)
    channels, forward = x.shape[1], problem.direction == "forward"
    if ours and forward:
        return _by("depthwise", lambda: fused_sepconv.depthwise_conv2d(x, weight, padding=1))
    if ours:
        backward = torch.ops.fused_sepconv.depthwise_conv2d_backward
        options = ([1, 1], [1, 1, 1, 1], [1, 1], None, None, "fused", [True, True, False])
        return _by("depthwise", lambda: backward(grad, x, weight, None, None, *options))
    if forward:
        call = partial(F.conv2d, x, weight, None, 1, 1, 1, channels)
    else:
        options = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), channels, (True, True, False))
        call = partial(torch.ops.aten.convolution_backward, grad, x, weight, *options)

    def library() -> None:
        with torch.backends.cudnn.flags(enabled=problem.layout == "nhwc"):
            call()

    return library


def fused(machine: Machine) -> Iterator[Figure]:
    """Our tensor-core kernels: the forward, the gradient of the pointwise weight, and each way to the other two."""
    for channels, size in ((128, 147), (256, 74)):
        for dtype in ("bfloat16", "float16"):
            layer = f"{channels}->{channels}@{size} {dtype} nhwc"
            problem = _problem(Problem, "forward", dtype, "nhwc", channels, size)
            figure = Figure(f"fused forward {layer}", problem.least_bytes, problem.pointwise_flops)
            figure.floor_seconds = problem.floor_seconds(machine.device)
            _predict(figure, machine.candidates(problem, "mma")[0])
            yield machine.measure(figure, partial(fused_call, machine, problem))

            problem = _problem(Problem, "backward", dtype, "nhwc", channels, size)
            backwards = machine.candidates(problem, "mma")
            if backwards[0].refusal:
                yield Figure(f"fused gradients {layer}", missing=f"failed: {backwards[0].refusal}")
                continue
            weight = backwards[0].steps[0]
            figure = Figure(f"fused gradient of the pointwise weight {layer}", flops=problem.pointwise_flops)
            _predict(figure, weight)
            yield machine.measure(figure, partial(fused_call, machine, problem, (False, False, True)))
            for backward in backwards:
                through = backward.steps[-1].name
                name = f"fused gradients of x and the depthwise weight {layer}, by {through}"
                figure = Figure(name, flops=problem.pointwise_flops)
                _predict(figure, backward)
                if figure.predicted_seconds is not None:
                    figure.predicted_seconds -= weight.predicted_seconds
                yield machine.measure(figure, partial(fused_call, machine, problem, (True, True, False), through))


def fused_call(
    machine: Machine, problem: Problem, mask: tuple[bool, bool, bool] | None = None, through: str = ""
) -> Call:
    x, grad, *weights = machine.tensors(problem)
    if mask is None:
        return _by("mma", lambda: fused_sepconv.separable_conv2d(x, *weights, padding=1))
    options = ([1, 1], [1, 1, 1, 1], [1, 1], None, None, None, "fused", [*mask, False, False, False])
    backward = torch.ops.fused_sepconv.separable_conv2d_backward

    def call() -> None:
        with planned_for(machine.device.sms, through=through):
            backward(grad, x, *weights, None, None, None, None, *options)

    return _by("mma", call)


# The conclusions ------------------------------------------------------------------------------------------------------


def summary(machine: Machine, figures: list[Figure]) -> dict[str, Any]:
    """The figures, bench.py's ceilings and the plan's fractions: None where they were not measured."""
    by_name = {figure.name: figure for figure in figures}

    def rate(name: str, what: str) -> float | None:
        figure = by_name.get(name)  # None where the run was interrupted before
        return None if figure is None or figure.seconds is None else getattr(figure, what) / figure.seconds

    copied = rate("copy", "bytes")
    matrix = {dtype: rate(f"product {dtype} square", "flops") for dtype in DTYPES}
    fma = matrix.pop("float32")
    complete = None not in (copied, fma, *matrix.values())
    return {
        "device": machine.name,
        "torch": torch.__version__,
        "ceilings": {
            "device": machine.name,
            "source": "measured by first_minutes.py: a copy and matrix products",
            "bytes_per_second": copied,
            "fma_flops": fma,
            "matrix_flops": matrix,
        }
        if complete
        else None,
        "fractions": dict(fractions(figures, by_name, copied, matrix["bfloat16"])),
        "figures": [asdict(figure) for figure in figures],
    }


def fractions(
    figures: list[Figure], by_name: dict[str, Figure], copied: float | None, peak: float | None
) -> Iterator[tuple[str, float | None]]:
    """The constants that the plan assumes, by "file: NAME"; of a copy's bandwidth, or of a square product's flop/s."""

    def share(names: str, what: str = "bytes", ceiling: float | None = copied) -> float | None:
        found = [figure for figure in figures if re.fullmatch(names, figure.name)]
        if not found or ceiling is None or any(figure.seconds is None for figure in found):
            return None
        return round(median(getattr(figure, what) / figure.seconds / ceiling for figure in found), 3)

    launches = by_name.get(f"{LAUNCHES} launches in a graph", Figure("")).seconds
    yield "planning/problem.py: LAUNCH_SECONDS", None if launches is None else round(launches / LAUNCHES, 8)
    yield "planning/problem.py: LIBRARY_BANDWIDTH", share("relu bfloat16")
    yield "families/pytorch/plan.py: LIBRARY_MATRIX", share(r"product bfloat16 .. 23104.*", "flops", peak)
    yield "families/pytorch/plan.py: LIBRARY_DEPTHWISE_BANDWIDTH", share(r"cuDNN's depthwise forward .*")
    yield "families/depthwise/plan.py: BANDWIDTH_FRACTION", share(r"our depthwise forward 128@147 .* nhwc")


def apply(file: Path, package: Path) -> int:
    """Puts the fractions of a result in place of the plan's; prints what changed. 1 where it has none."""
    content = json.loads(file.read_text())
    missing = [name for name, value in content["fractions"].items() if value is None]
    for where, value in content["fractions"].items():
        if value is None:
            continue
        name, source = where.rpartition(": ")[2], package / where.partition(": ")[0]
        pattern = re.compile(rf"^{name} = ([\d.e-]+).*$", re.MULTILINE)
        text = source.read_text()
        found = pattern.search(text)
        if found is None:
            raise ValueError(f"{source}: has no line that begins with {name} = ")
        line = f"{name} = {value}  # measured on {content['device']}, torch {content['torch']}"
        source.write_text(text[: found.start()] + line + text[found.end() :])
        print(f"{where}: {found[1]} -> {value}")
    for name in missing:
        print(f"{name}: was not measured, stays")
    print("`python benchmarks/bench.py report` brings README's predictions along")
    return 1 if len(missing) == len(content["fractions"]) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="first_minutes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("first_minutes.json"), metavar="FILE", help="written")
    parser.add_argument("--apply", type=Path, metavar="FILE", help="measures nothing")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: make every call once, small")
    given = parser.parse_args(argv)
    if given.apply:
        return apply(given.apply, ROOT / "fused_sepconv")
    machine = Machine(given.rehearse)
    print(f"{machine.name}; floors and predictions for {machine.device.name}", flush=True)
    figures: list[Figure] = []
    try:
        for part in (ceilings, products, depthwise, fused):
            for figure in part(machine):
                figures.append(figure)
                print(figure, flush=True)
                given.json.write_text(json.dumps(summary(machine, figures), indent=1))
    except KeyboardInterrupt:
        print("interrupted: the rest was not measured", flush=True)
    result = summary(machine, figures)
    for name, value in result["fractions"].items():
        print(f"{name:58} {'missing' if value is None else value}")
    failed = [figure.name for figure in figures if figure.missing.startswith("failed")]
    measured = sum(figure.seconds is not None for figure in figures)
    print(f"{measured} of {len(figures)} figures measured, {len(failed)} failed; {given.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
