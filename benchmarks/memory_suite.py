"""The suite of memory: what a layer's forward and backward, and a network's training step, hold and keep."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from layers import XCEPTION, Layer
from memory import peak_bytes, saved_bytes
from model_suite import floors
from models import IMAGE_SIZE, Network, Run, networks, random_batch
from peers import Implementation, implementations
from problem import Problem, convolution_flags, prepare
from record import Row, layer_row, model_row
from settings import Settings
from suites import Step, describe
from torch import nn

DIRECTION = "both"
MODE = "plain"


def memory_suite(settings: Settings) -> list[Step]:
    """Xception's layers and the whole networks, in one layout: memory does not depend on it."""
    layouts = settings.layouts[-1:]
    contestants = [who for who in implementations(settings.device, layouts) if who.layout in layouts]
    whole = networks(layouts, ())
    return [
        *(
            Step(
                f"memory of {layer.name}",
                len(contestants),
                partial(layer_memory, layer, dtype, batch, contestants, settings),
            )
            for dtype in settings.dtypes
            for batch in settings.batches
            for layer in XCEPTION
        ),
        *(
            Step(f"memory of {network.name}", 1, partial(network_memory, network, dtype, batch, settings))
            for dtype in settings.dtypes
            for batch in settings.batches
            for network in whole
        ),
    ]


def layer_memory(
    layer: Layer, dtype: str, batch: int, contestants: list[Implementation], settings: Settings
) -> Iterator[Row]:
    for contestant in contestants:
        problem = Problem(layer, batch, dtype, contestant.layout, settings.device)
        measured: dict[str, int] = {}
        error = None
        try:
            with contestant.settings(dtype):
                inputs = problem.inputs(seed=0)
                leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
                measured["peak_bytes"] = peak_bytes(
                    prepare(contestant.function, DIRECTION, inputs, problem.geometry), settings.device
                )
                measured["saved_bytes"] = saved_bytes(
                    partial(contestant.function, *leaves, problem.geometry), parameters=leaves[1:]
                )
        except Exception as failure:  # whatever goes wrong with one must not stop the others
            error, measured = describe(failure), {}
        yield layer_row("memory", problem, DIRECTION, contestant.name, MODE, settings.ceilings, error, **measured)


def step(model: nn.Module, train: Callable[[], object]) -> None:
    """One training step from nothing to nothing: its gradients are part of what it holds."""
    train()
    model.zero_grad(set_to_none=True)


def network_memory(network: Network, dtype: str, batch: int, settings: Settings) -> Iterator[Row]:
    run = Run(settings.device, dtype, network.backend)
    measured: dict[str, int] = {}
    error = None
    try:
        with convolution_flags(dtype):
            model = network.on(settings.device)
            x, target = random_batch(batch, IMAGE_SIZE, network.layout, settings.device)
            measured["peak_bytes"] = peak_bytes(partial(step, model, run.step(model, x, target)), settings.device)
            measured["saved_bytes"] = saved_bytes(
                partial(run.forward, model, x, target), parameters=[*model.parameters(), *model.buffers()]
            )
    except Exception as failure:
        error, measured = describe(failure), {}
    finally:
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    yield model_row(
        suite="memory",
        network=network.key,
        case=network.case,
        dtype=dtype,
        layout=network.layout,
        batch=batch,
        direction=DIRECTION,
        impl=network.impl,
        device=settings.device,
        mode=MODE,
        floors=floors(network, batch, dtype, DIRECTION, settings),
        ceilings=settings.ceilings,
        result=error,
        **measured,
    )
