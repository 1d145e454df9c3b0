"""The suite of whole networks: images and training steps a second, the paper's table 3."""

from collections.abc import Iterator
from functools import partial

import torch
from model_check import model_faults
from models import IMAGE_SIZE, Network, Run, networks, random_batch
from problem import convolution_flags
from record import Row, model_row
from roofline import Floor
from settings import Settings
from suites import Step, describe
from timing import Timing, sampler, summarize

MODE = "plain"
PASSES = ("fwd", "both")
"""Inference and a training step: a backward alone is neither."""


def model_suite(settings: Settings) -> list[Step]:
    """Every network in every dtype and batch, in inference and in training, where these passes are asked for."""
    passes = [direction for direction in PASSES if direction in settings.passes]
    return [
        Step(f"{network.name} {network.impl}", len(passes), partial(time_network, network, dtype, batch, settings))
        for dtype in settings.dtypes
        for batch in settings.batches
        for network in networks(settings.model_layouts, settings.peers)
    ]


def time_network(network: Network, dtype: str, batch: int, settings: Settings) -> Iterator[Row]:
    """Checks a network where it is ours, then times it."""
    try:
        faults = model_faults(network, dtype, settings.device) if network.is_ours else {}
    except Exception as failure:  # whatever goes wrong with one must not stop the others
        faults = dict.fromkeys(PASSES, describe(failure))
    for direction in PASSES:
        if direction in settings.passes:
            yield model_row(
                suite="model",
                network=network.key,
                case=network.case,
                dtype=dtype,
                layout=network.layout,
                batch=batch,
                direction=direction,
                impl=network.impl,
                device=settings.device,
                mode=MODE,
                floors=floors(network, batch, dtype, direction, settings),
                ceilings=settings.ceilings,
                result=faults.get(direction) or timed(network, direction, batch, dtype, settings),
            )


def floors(network: Network, batch: int, dtype: str, direction: str, settings: Settings) -> tuple[Floor, Floor]:
    """Those of the network; nothing counted where the network isn't there to be counted."""
    try:
        return network.floors(batch, dtype, direction, settings.ceilings)
    except Exception:  # its row says what is missing
        return Floor(0, 0, 0, 0.0), Floor(0, 0, 0, 0.0)


def timed(network: Network, direction: str, batch: int, dtype: str, settings: Settings) -> Timing | str:
    """The timing of a network, or what went wrong."""
    run = Run(settings.device, dtype, network.backend)
    sample = sampler(settings.device, MODE, settings.seconds / settings.turns, settings.threads)
    try:
        with convolution_flags(dtype):
            model = network.on(settings.device)
            x, target = random_batch(batch, IMAGE_SIZE, network.layout, settings.device)
            call = run.inference(model, x) if direction == "fwd" else run.step(model, x, target)
            taken = sample(lambda: [call])
            for _ in range(settings.turns - 1):
                taken += sample(lambda: [call])
            return summarize(taken)
    except Exception as failure:
        return describe(failure)
    finally:
        if settings.device == "cuda":
            torch.cuda.empty_cache()
