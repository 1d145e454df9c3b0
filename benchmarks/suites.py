"""What is measured: a suite is a list of steps, and a step gives result rows as it makes them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from check import RESULTS, Check
from layers import QUICK_TO_COMPUTE, Layer
from peers import Implementation, implementations
from predictions import choose
from problem import Inputs, Problem, convolution_precision, prepare
from record import TARGETS, Row, row
from timing import Timing, in_turn, sampler, summarize


@dataclass(frozen=True)
class Settings:
    """How to measure: what the command line decides."""

    device: str
    batch: int
    dtype: str
    layouts: tuple[str, ...]
    passes: tuple[str, ...]
    seconds: float
    """To spend on the samples of each row."""
    threads: int
    """That PyTorch uses on the CPU."""
    turns: int
    """In how many parts the samples are taken. A CPU's speed drifts with what else runs: taking turns shares that."""
    input_sets: int
    """On how many different inputs successive runs work."""


class Step(NamedTuple):
    label: str
    rows: int
    """How many rows it gives."""
    run: Callable[[], Iterator[Row]]


def layer_suite(settings: Settings, layers: Sequence[Layer]) -> list[Step]:
    """Every layer in every implementation and pass."""
    contestants = implementations(settings.device, settings.layouts)
    rows = len(settings.passes) * len(contestants)
    return [Step(layer.name, rows, partial(contest, "layers", layer, contestants, settings)) for layer in layers]


def overhead_suite(seconds: float) -> list[Step]:
    """The host's time for one call: a layer with next to nothing to compute, on one thread of the CPU."""
    settings = Settings(
        device="cpu",
        batch=1,
        dtype="float32",
        layouts=("nchw",),
        passes=tuple(TARGETS),
        seconds=seconds,
        threads=1,
        turns=20,
        input_sets=1,
    )
    contestants = implementations("cpu", settings.layouts)
    run = partial(contest, "overhead", QUICK_TO_COMPUTE, contestants, settings)
    return [Step("overhead of a call", len(settings.passes) * len(contestants), run)]


def contest(suite: str, layer: Layer, contestants: Sequence[Implementation], settings: Settings) -> Iterator[Row]:
    """Checks every implementation's answer for a layer, then times those that are right, pass by pass."""
    problems = {
        contestant.layout: Problem(layer, settings.batch, settings.dtype, contestant.layout, settings.device)
        for contestant in contestants
    }
    with convolution_precision(settings.dtype):
        refused = refusals(problems[contestants[0].layout], contestants, settings.passes)
        inputs = {
            layout: [problem.inputs(seed) for seed in range(settings.input_sets)]
            for layout, problem in problems.items()
        }
        for direction in settings.passes:
            errors = {who: refused[who, direction] for who in contestants if (who, direction) in refused}
            timings = race(
                direction, [who for who in contestants if who not in errors], inputs, layer.padding, settings
            )
            for contestant in contestants:
                own_inputs = inputs[contestant.layout][0]
                result = errors.get(contestant) or timings[contestant]
                yield row(
                    suite,
                    problems[contestant.layout],
                    direction,
                    contestant.name,
                    result,
                    plan=choose(own_inputs, layer.padding, direction).plan if contestant.is_ours else None,
                )


def refusals(
    problem: Problem, contestants: Sequence[Implementation], passes: Sequence[str]
) -> dict[tuple[Implementation, str], str]:
    """Which passes of which implementations are not timed, and why: the answer is wrong, or there is none."""
    errors = {}
    check = Check(problem, passes)
    for contestant in contestants:
        try:
            faults = check.faults(contestant.function, contestant.layout)
        except Exception as failure:  # whatever goes wrong with one must not stop the others
            faults = dict.fromkeys(RESULTS["both"], describe(failure))
        for direction in passes:
            wrong = dict.fromkeys(faults[name] for name in RESULTS[direction] if name in faults)
            if wrong:
                errors[contestant, direction] = "; ".join(wrong)
    return errors


def race(
    direction: str,
    contestants: Sequence[Implementation],
    inputs: dict[str, list[Inputs]],
    padding: int,
    settings: Settings,
) -> dict[Implementation, Timing | str]:
    """Times a pass of implementations that take turns: the result of each, or what went wrong with it.

    `inputs` are the input sets by layout.
    """
    sample = sampler(settings.device, settings.seconds / settings.turns, settings.threads)
    samples = {contestant: [] for contestant in contestants}
    failures = {}
    for contestant in [*contestants] * settings.turns:
        try:
            calls = [prepare(contestant.function, direction, tensors, padding) for tensors in inputs[contestant.layout]]
            samples[contestant] += sample(in_turn(calls))
        except Exception as failure:  # as above
            failures[contestant] = describe(failure)
    return {who: failures[who] if who in failures else summarize(samples[who]) for who in contestants}


def describe(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
