"""`bench.py plan`: what the plan would run on a device, layer by layer, and why. Nothing is measured."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from layers import NETWORKS, Layer
from problem import DTYPES, LAYOUTS, Problem, convolution_flags

import fused_sepconv
from fused_sepconv.explain import Explanation
from fused_sepconv.planning.devices import DEVICES


class Total(NamedTuple):
    """Of layers, each as often as its network has it: predicted seconds, and those of perfect fused kernels."""

    count: int
    forward: float
    forward_floor: float
    backward: float
    backward_floor: float

    def __str__(self) -> str:
        return (
            f"{self.count} layers, predicted: "
            f"forward {self.forward * 1e6:.0f} us (floor {self.forward_floor * 1e6:.0f}), "
            f"backward {self.backward * 1e6:.0f} us (floor {self.backward_floor * 1e6:.0f})"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py plan", description=__doc__.partition(": ")[2])
    parser.add_argument("--device", choices=tuple(DEVICES), default="H200", help="default: %(default)s")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="xception", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images; default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="nhwc", help="default: %(default)s")
    given = parser.parse_args(argv)
    if given.batch < 1:
        parser.error(f"argument --batch: expected 1 or more, got {given.batch}")
    return given


def main(argv: Sequence[str]) -> int:
    given = parse(argv)
    layers = NETWORKS[given.network]
    plans = list(explanations(layers, given.device, given.batch, given.dtype, given.layout))
    for layer, explanation in zip(layers, plans, strict=True):
        print(f"{layer.count} x {layer.name}\n{explanation}\n")
    print(
        f"{given.network} on {given.device}, batch {given.batch}, {given.dtype}, {given.layout}: {total(layers, plans)}"
    )
    return 0


def explanations(
    layers: Iterable[Layer], device: str, batch: int, dtype: str, layout: str = "nhwc"
) -> Iterator[Explanation]:
    """The plans of each layer on a device that need not be here."""
    for layer in layers:
        problem = Problem(layer, batch, dtype, layout, "meta")
        with convolution_flags(dtype):
            yield fused_sepconv.explain(*problem.meta_inputs()[:3], None, *problem.geometry, device=device)


def total(layers: Sequence[Layer], plans: Sequence[Explanation]) -> Total:
    def sum_of(direction: str, what: str) -> float:
        chosen = [getattr(plan, direction) for plan in plans]
        seconds = [plan.floor_seconds if what == "floor" else plan.chosen.predicted_seconds for plan in chosen]
        return sum(layer.count * each for layer, each in zip(layers, seconds, strict=True))

    figures = (sum_of(direction, what) for direction in ("forward", "backward") for what in ("predicted", "floor"))
    return Total(sum(layer.count for layer in layers), *figures)
