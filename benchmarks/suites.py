"""The measurements of a run. A suite is a list of steps, and a step gives result rows as it makes them."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import host
import torch
from check import RESULTS, Check, network_faults
from floors import Ceilings
from layers import NETWORKS, Layer
from networks import IMAGE_SIZE, Network, Run, fusing_norm, networks, random_batch, recomputing
from peers import Implementation, implementations
from problem import Inputs, Problem, convolution_flags, prepare
from record import Row, layer_row, make_row
from timing import Timing, sampler, summarize
from torch import Tensor, nn

import fused_sepconv

Result = TypeVar("Result")

MODEL_PASSES = {"fwd": "inference", "both": "training step"}  # a backward alone is neither


@dataclass(frozen=True)
class Settings:
    """How to measure: what the command line and the machine decide."""

    suites: tuple[str, ...]
    device: str  # "cpu" or "cuda"
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    model_layouts: tuple[str, ...]  # layouts of whole networks
    passes: tuple[str, ...]
    networks: tuple[str, ...]  # networks whose layers are timed
    peers: tuple[str, ...]  # kinds of peers, see peers.py
    modes: tuple[str, ...]  # in which layers are sampled, see timing.py
    seconds: float  # to spend on the samples of each row
    host_seconds: float
    threads: int  # threads that PyTorch uses on the CPU
    turns: int
    """In how many parts the samples are taken. A CPU's speed drifts with what else runs: taking turns shares that."""
    ceilings: Ceilings


@dataclass(frozen=True)
class Step:
    label: str
    rows: int  # how many rows it gives, about
    run: Callable[[], Iterator[Row]]


def describe(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"


def steps_of(settings: Settings) -> list[Step]:
    """The steps of a run, in its order: an interruption costs what comes last."""
    suites = {"layers": layer_suite, "host": host_suite, "memory": memory_suite, "model": model_suite}
    return [step for name, make in suites.items() if name in settings.suites for step in make(settings)]


# Layers


def layer_suite(settings: Settings) -> list[Step]:
    """Every layer in every dtype, batch, implementation, pass and mode."""
    contestants = implementations(settings.device, settings.layouts, settings.peers)
    rows = len(settings.passes) * len(contestants) * len(settings.modes)
    return [
        Step(layer.name, rows, partial(contest, layer, dtype, batch, contestants, settings))
        for dtype in settings.dtypes
        for batch in settings.batches
        for network in settings.networks
        for layer in NETWORKS[network]
    ]


def contest(
    layer: Layer, dtype: str, batch: int, contestants: Sequence[Implementation], settings: Settings
) -> Iterator[Row]:
    """Checks every implementation's answer for a layer, then times those that are right, pass by pass."""
    problems = {who.layout: Problem(layer, batch, dtype, who.layout, settings.device) for who in contestants}
    if any(who.is_compiled for who in contestants):
        torch.compiler.reset()  # of the last layer nothing is used again
    refused = refusals(problems[contestants[0].layout], contestants, settings.passes)
    inputs = {layout: problem.inputs(seed=0) for layout, problem in problems.items()}
    for direction in settings.passes:
        right = [who for who in contestants if (who, direction) not in refused]
        for mode in settings.modes:
            timings = race(direction, mode, right, problems, inputs, settings)
            for who in contestants:
                problem = problems[who.layout]
                result = refused.get((who, direction)) or timings[who]
                about = {"suite": "layers", "impl": who.name, "mode": mode}
                if who.is_ours:
                    about |= planned(problem, inputs[who.layout], direction)
                yield layer_row(problem, direction, settings.ceilings, result, **about)


def refusals(
    problem: Problem, contestants: Sequence[Implementation], passes: Sequence[str]
) -> dict[tuple[Implementation, str], str]:
    """The passes of implementations that are not timed, and why: the answer is wrong, or there is none."""
    errors = {}
    with convolution_flags(problem.dtype):
        check = Check(problem, passes)
    for who in contestants:
        faults: dict[str, str] = {}
        for results in (RESULTS["fwd"], RESULTS["bwd"]):  # each for itself: what has no backward may have a forward
            try:
                with who.settings(problem.dtype):
                    faults |= check.faults(who.function, who.layout, results)
            except Exception as failure:  # whatever goes wrong with one must not stop the others
                faults |= dict.fromkeys(results, describe(failure))
        for direction in passes:
            if wrong := dict.fromkeys(faults[name] for name in RESULTS[direction] if name in faults):
                errors[who, direction] = "; ".join(wrong)
    return errors


def race(
    direction: str,
    mode: str,
    contestants: Sequence[Implementation],
    problems: dict[str, Problem],
    inputs: dict[str, Inputs],
    settings: Settings,
) -> dict[Implementation, Timing | str]:
    """Times a pass of implementations that take turns: the result of each, or what went wrong with it.

    `problems` and `inputs` are by layout.
    """
    sample = sampler(settings.device, mode, settings.seconds / settings.turns, settings.threads)
    samples: dict[Implementation, list[float]] = {who: [] for who in contestants}
    failures: dict[Implementation, str] = {}
    for who in [*contestants] * settings.turns:
        problem = problems[who.layout]
        try:
            with who.settings(problem.dtype):
                samples[who] += sample(prepare(who.function, direction, inputs[who.layout], problem.geometry))
        except Exception as failure:  # as above
            failures[who] = describe(failure)
    return {who: failures[who] if who in failures else summarize(samples[who]) for who in contestants}


def planned(problem: Problem, inputs: Inputs, direction: str) -> dict[str, Any]:
    """The kernels that the plan chose, and, on a GPU, the time that it expects of them."""
    with convolution_flags(problem.dtype):
        plan = fused_sepconv.explain(*inputs[:3], None, *problem.geometry)
    halves = {"fwd": [plan.forward], "bwd": [plan.backward], "both": [plan.forward, plan.backward]}[direction]
    found: dict[str, Any] = {"plan": " + ".join(dict.fromkeys(half.chosen.name for half in halves))}
    if problem.device == "cuda":
        found["predicted_ms"] = sum(half.chosen.predicted_seconds for half in halves) * 1e3
        found["predicted_device"] = torch.cuda.get_device_name()
    return found


# The host's time


def host_suite(settings: Settings) -> list[Step]:
    """See host.py. The null build is made where this suite alone is asked for: it takes minutes."""
    rows = (2 + len(host.FAMILIES)) * len(host.PASSES)
    return [Step("the host's time", rows, partial(time_host, settings))]


def time_host(settings: Settings) -> Iterator[Row]:
    channels, features, size = host.SHAPE
    layer = Layer(channels, features, size, network="none")
    for found in host.measure(settings.host_seconds, build=settings.suites == ("host",)):
        problem = Problem(layer, 1, found["dtype"], found["layout"], "cpu")
        result = found["error"] or summarize(found["seconds"])
        about = {"suite": "host", "impl": found["impl"], "mode": "plain", "python_calls": found["python_calls"]}
        yield layer_row(problem, found["pass"], settings.ceilings, result, **about)


# Whole networks


def network_steps(
    run: Callable[..., Iterator[Row]], rows: int, settings: Settings, compared: Sequence[Network]
) -> list[Step]:
    return [
        Step(f"{network.name} {network.impl}", rows, partial(run, network, dtype, batch, settings))
        for dtype in settings.dtypes
        for batch in settings.batches
        for network in compared
    ]


def network_row(network: Network, dtype: str, batch: int, direction: str, settings: Settings, **named: Any) -> Row:
    named |= {"network": network.key, "case": network.case, "count": 1, "dtype": dtype, "batch": batch, "mode": "plain"}
    named |= {"layout": network.layout, "impl": network.impl, "device": settings.device}
    floors = network.floors(batch, dtype, direction, settings.ceilings)
    return make_row(direction, floors, settings.ceilings, **named)


@contextmanager
def network_and_batch(network: Network, dtype: str, batch: int, device: str) -> Iterator[tuple[nn.Module, Any]]:
    """The network on a device with images and labels, under a dtype's settings; leaves no memory behind."""
    with convolution_flags(dtype):
        yield network.on(device), random_batch(batch, IMAGE_SIZE, network.layout, device)
    if device == "cuda":
        torch.cuda.empty_cache()


def model_suite(settings: Settings) -> list[Step]:
    """Every network in every dtype and batch, in inference and in training, where these passes are asked for."""
    rows = len(MODEL_PASSES.keys() & set(settings.passes))
    compared = networks(settings.model_layouts, settings.peers)
    if settings.device == "cuda":  # elsewhere a fused BatchNorm runs by itself
        compared += [fusing_norm(network) for network in compared if network.is_ours and not network.is_compiled]
    return network_steps(time_network, rows, settings, compared)


def time_network(network: Network, dtype: str, batch: int, settings: Settings) -> Iterator[Row]:
    """Checks a network where it is ours, then times it."""
    try:
        faults = network_faults(network, dtype, settings.device) if network.is_ours else {}
    except Exception as failure:  # as above
        faults = dict.fromkeys(MODEL_PASSES, describe(failure))
    for direction in (direction for direction in MODEL_PASSES if direction in settings.passes):
        result = faults.get(direction) or timed(network, direction, batch, dtype, settings)
        yield network_row(network, dtype, batch, direction, settings, suite="model", result=result)


def timed(network: Network, direction: str, batch: int, dtype: str, settings: Settings) -> Timing | str:
    """The timing of a network, or what went wrong."""
    run = Run(settings.device, dtype, network.backend)
    sample = sampler(settings.device, "plain", settings.seconds / settings.turns, settings.threads)
    try:
        with network_and_batch(network, dtype, batch, settings.device) as (model, (x, target)):
            call = run.inference(model, x) if direction == "fwd" else run.step(model, x, target)
            return summarize([seconds for _ in range(settings.turns) for seconds in sample(call)])
    except Exception as failure:
        return describe(failure)


# Memory


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that PyTorch's allocator hands out during a call, beyond those that it held before."""
    call()  # what stays after a first call (workspaces, an optimizer's state) is not counted
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines into every progress bar
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], Result], parameters: Collection[Tensor]) -> int:
    """Bytes that a forward keeps for its backward: the bytes of the distinct storages that autograd saves.

    Parameters are there anyway and are not counted. A layer's input is: it stays because the layer needs it.
    """
    own = {parameter.untyped_storage()._cdata for parameter in parameters}  # a meta tensor has no address
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until the sum is taken, so that no storage's number is used twice
    total = sum(saved.values())
    del kept
    return total


def memory_suite(settings: Settings) -> list[Step]:
    """A training step of each network, in one layout: memory does not depend on it; ours with the depthwise results
    saved, where that is faster, and without, and on a GPU with its BatchNorms fused."""
    compared = networks(settings.layouts[-1:], ())
    ours = [compared[-1]]
    if settings.device == "cuda":  # as above
        ours.append(fusing_norm(compared[-1]))
    return network_steps(network_memory, 1, settings, [*compared, *ours[1:], *map(recomputing, ours)])


def network_memory(network: Network, dtype: str, batch: int, settings: Settings) -> Iterator[Row]:
    run = Run(settings.device, dtype, network.backend)
    measured, error = {}, None
    try:
        with network_and_batch(network, dtype, batch, settings.device) as (model, (x, target)):
            train = run.step(model, x, target)

            def step() -> None:
                """From nothing to nothing: gradients are part of what a training step holds."""
                train()
                model.zero_grad(set_to_none=True)

            measured["peak_bytes"] = peak_bytes(step, settings.device)
            kept = [*model.parameters(), *model.buffers()]
            measured["saved_bytes"] = saved_bytes(partial(run.forward, model, x, target), parameters=kept)
    except Exception as failure:
        error, measured = describe(failure), {}
    yield network_row(network, dtype, batch, "both", settings, suite="memory", result=error, **measured)
