"""Is our network right? Asked before it is timed, as `check.py` asks of a layer.

The oracle is the same network with the same weights in float64 on the CPU, on PyTorch's own convolutions; the
yardstick is that network in the dtype that is measured. Ours may be at most twice as far from the oracle, plus the
rounding of one result. It is asked on small images: every channel count is there, and a float64 answer takes a second.
The layer suite checks each layer at its full size. Networks of other libraries have other weights, and are not checked.
"""

from dataclasses import replace

import torch
from check import UNIT_ROUNDOFF, distance
from models import Network, Run, random_batch
from problem import LAYOUTS, convolution_flags
from torch import Tensor, nn

CHECKED_SIZE = 96
"""Pixels a side: 3 x 3 are left of it behind the last pooling."""
CHECKED_BATCH = 2


def model_faults(network: Network, dtype: str, device: str) -> dict[str, str]:
    """What is wrong with a network of ours in inference ("fwd") and in training ("both"); empty where all is right."""
    x, target = random_batch(CHECKED_BATCH, CHECKED_SIZE, network.layout, "cpu")
    plain = replace(network, backend="reference", is_compiled=False)
    ours, reference, exact = network.on(device), plain.on(device), plain.on("cpu").double()

    faults = {}
    for direction, result, called in (("fwd", outputs, "the output"), ("both", gradients, "the gradient")):
        oracle = result(exact, Run("cpu", "float32", "reference"), x.double(), target)
        answers = []
        with convolution_flags(dtype):
            for model, backend in ((reference, "reference"), (ours, network.backend)):
                images = x.to(device, memory_format=LAYOUTS[network.layout])
                answers.append(result(model, Run(device, dtype, backend), images, target.to(device)).cpu())
        yardstick, measured = (distance(answer[None], oracle[None]).l2 for answer in answers)
        allowed = 2 * yardstick + UNIT_ROUNDOFF[dtype]
        if not measured <= allowed:  # NaN is refused too
            faults[direction] = f"wrong answer: {called} is off by {measured:.1e} in L2 norm ({allowed:.1e} allowed)"
    return faults


def outputs(model: nn.Module, run: Run, x: Tensor, target: Tensor) -> Tensor:
    """Without training."""
    return run.inference(model, x)().detach().flatten()


def gradients(model: nn.Module, run: Run, x: Tensor, target: Tensor) -> Tensor:
    """Of the training loss, of all parameters in a row."""
    model.train()
    parameters = list(model.parameters())
    found = torch.autograd.grad(run.forward(model, x, target), parameters)
    return torch.cat([gradient.flatten() for gradient in found])
