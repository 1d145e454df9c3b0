"""The suites of layers. A suite is a list of steps, and a step gives result rows as it makes them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from check import RESULTS, Check
from layers import QUICK_TO_COMPUTE, Layer
from peers import Implementation, implementations
from predictions import DEVICE, choose, predict
from problem import Inputs, Problem, convolution_flags, prepare
from record import Row, layer_row
from settings import Settings
from summary import TARGETS
from timing import Samples, Timing, sampler, summarize

L2_BYTES = 2**26
"""Of the largest L2 caches at hand: an H200 has 50 MB."""
MOST_INPUT_SETS = 8


@dataclass(frozen=True)
class Step:
    label: str
    rows: int
    """How many rows it gives."""
    run: Callable[[], Iterator[Row]]


def layer_suite(settings: Settings) -> list[Step]:
    """Every layer in every dtype, batch, implementation, pass and mode."""
    contestants = implementations(settings.device, settings.layouts, settings.peers)
    rows = len(settings.passes) * len(contestants) * len(settings.modes)
    return [
        Step(layer.name, rows, partial(contest, "layers", layer, dtype, batch, contestants, settings))
        for dtype in settings.dtypes
        for batch in settings.batches
        for layer in settings.layers
    ]


def overhead_suite(settings: Settings, seconds: float) -> list[Step]:
    """The host's time for one call: a layer with next to nothing to compute, on one thread of the CPU."""
    settings = replace(
        settings,
        device="cpu",
        layouts=("nchw",),
        passes=tuple(TARGETS),
        modes=("plain",),
        seconds=seconds,
        threads=1,
        turns=20,
    )
    contestants = implementations("cpu", settings.layouts)
    run = partial(contest, "overhead", QUICK_TO_COMPUTE, "float32", 1, contestants, settings)
    return [Step("overhead of a call", len(settings.passes) * len(contestants), run)]


def contest(
    suite: str, layer: Layer, dtype: str, batch: int, contestants: Sequence[Implementation], settings: Settings
) -> Iterator[Row]:
    """Checks every implementation's answer for a layer, then times those that are right, pass by pass."""
    problems = {
        contestant.layout: Problem(layer, batch, dtype, contestant.layout, settings.device)
        for contestant in contestants
    }
    if any(contestant.is_compiled for contestant in contestants):
        torch.compiler.reset()  # of the last layer nothing is used again
    refused = refusals(problems[contestants[0].layout], contestants, settings.passes)
    inputs = {
        layout: [problem.inputs(seed) for seed in range(input_sets(problem))] for layout, problem in problems.items()
    }
    for direction in settings.passes:
        errors = {who: refused[who, direction] for who in contestants if (who, direction) in refused}
        right = [who for who in contestants if who not in errors]
        for mode in settings.modes:
            timings = race(direction, mode, right, problems, inputs, settings)
            for contestant in contestants:
                problem = problems[contestant.layout]
                yield layer_row(
                    suite,
                    problem,
                    direction,
                    contestant.name,
                    mode,
                    settings.ceilings,
                    errors.get(contestant) or timings[contestant],
                    **(planned(problem, inputs[contestant.layout][0], direction) if contestant.is_ours else {}),
                )


def planned(problem: Problem, inputs: Inputs, direction: str) -> dict[str, object]:
    """What the plan chose for a row of ours, and the time that it expects: of this GPU, or, on the CPU, of an H200."""
    with convolution_flags(problem.dtype):
        here = choose(inputs, problem.geometry, direction)
    if problem.device == "cuda":
        return {"plan": here.plan, "prediction": (here.milliseconds, torch.cuda.get_device_name())}
    return {"plan": here.plan, "prediction": (predict(problem, direction).milliseconds, DEVICE)}


def input_sets(problem: Problem) -> int:
    """On how many different inputs successive calls work: so many that a replayed graph doesn't find them in L2."""
    if problem.device == "cpu":
        return 1
    return min(max(ceil(2 * L2_BYTES / problem.tensor_bytes), 2), MOST_INPUT_SETS)


def refusals(
    problem: Problem, contestants: Sequence[Implementation], passes: Sequence[str]
) -> dict[tuple[Implementation, str], str]:
    """Which passes of which implementations are not timed, and why: the answer is wrong, or there is none."""
    errors = {}
    with convolution_flags(problem.dtype):
        check = Check(problem, passes)
    for contestant in contestants:
        faults: dict[str, str] = {}
        for results in (RESULTS["fwd"], RESULTS["bwd"]):  # each for itself: what has no backward may have a forward
            try:
                with contestant.settings(problem.dtype):
                    faults |= check.faults(contestant.function, contestant.layout, results)
            except Exception as failure:  # whatever goes wrong with one must not stop the others
                faults |= dict.fromkeys(results, describe(failure))
        for direction in passes:
            wrong = dict.fromkeys(faults[name] for name in RESULTS[direction] if name in faults)
            if wrong:
                errors[contestant, direction] = "; ".join(wrong)
    return errors


def race(
    direction: str,
    mode: str,
    contestants: Sequence[Implementation],
    problems: dict[str, Problem],
    inputs: dict[str, list[Inputs]],
    settings: Settings,
) -> dict[Implementation, Timing | str]:
    """Times a pass of implementations that take turns: the result of each, or what went wrong with it.

    `problems` and `inputs`, the input sets, are by layout.
    """
    sample = sampler(settings.device, mode, settings.seconds / settings.turns, settings.threads)
    samples = {contestant: Samples([]) for contestant in contestants}
    failures: dict[Implementation, str] = {}
    for contestant in [*contestants] * settings.turns:
        problem = problems[contestant.layout]

        def calls(who: Implementation = contestant, problem: Problem = problem) -> list[Callable[[], object]]:
            return [prepare(who.function, direction, tensors, problem.geometry) for tensors in inputs[who.layout]]

        try:
            with contestant.settings(problem.dtype):
                samples[contestant] += sample(calls)
        except Exception as failure:  # as above
            failures[contestant] = describe(failure)
    return {who: failures[who] if who in failures else summarize(samples[who]) for who in contestants}


def describe(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
