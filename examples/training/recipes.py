"""How to learn: the presets, the optimiser, the learning rate, the loss, the averaged weights.

A recipe is a set of values for `train.py`'s flags; what the command line says comes before it.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

RECIPES = {
    # The everyday one.
    "adamw": {
        "opt": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "sched": "cosine",
        "warmup_epochs": 5,
        "epochs": 100,
        "smoothing": 0.1,
        "drop": 0.0,
        "model_ema": False,
    },
    # Section 4.3 to 4.5 of the paper, for one class an image. The paper trained on 60 GPUs for three days; it gives
    # no number of epochs and no batch size: those are ours.
    "imagenet": {
        "opt": "sgd",
        "lr": 0.045,
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "sched": "step",
        "decay_epochs": 2.0,
        "decay_rate": 0.94,
        "warmup_epochs": 0,
        "epochs": 100,
        "smoothing": 0.0,
        "drop": 0.5,
        "model_ema": True,
    },
    # The same sections, for many labels an image; the number of epochs is ours.
    "jft": {
        "opt": "rmsprop",
        "lr": 0.001,
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "sched": "step",
        "decay_images": 3_000_000,
        "decay_rate": 0.9,
        "warmup_epochs": 0,
        "epochs": 10,
        "smoothing": 0.0,
        "drop": 0.0,
        "model_ema": True,
        "multi_label": True,
    },
}

RMSPROP_DECAY = 0.9
"""Of the mean square: Inception's, which the paper's RMSprop comes from. PyTorch's default is 0.99."""


def optimizer(network: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    """Weight decay applies to the weights of convolutions and matrices alone, not to biases and BatchNorm."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kinds: dict[str, Callable] = {
        "sgd": partial(torch.optim.SGD, momentum=options.momentum),
        "rmsprop": partial(torch.optim.RMSprop, momentum=options.momentum, alpha=RMSPROP_DECAY),
        "adamw": torch.optim.AdamW,
    }
    return kinds[options.opt](groups, lr=options.lr)


def learning_rate_factor(step: int, options: Namespace, steps_per_epoch: int, images_per_step: int) -> float:
    """What the initial learning rate is multiplied by at a step, counted from 0.

    warm-up   rises evenly over `warmup_epochs`; the schedule begins after it
    step      x `decay_rate` after every `decay_epochs`, or every `decay_images` where that is given
    cosine    from 1 to 0 at the end of `epochs`
    none      1
    """
    warmup = options.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.sched == "step":
        if options.decay_images:
            decays = (step - warmup) * images_per_step // options.decay_images
        else:
            decays = (step - warmup) // (options.decay_epochs * steps_per_epoch)
        return options.decay_rate**decays
    if options.sched == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (options.epochs * steps_per_epoch - warmup)))
    return 1.0


def scheduler(
    optimizer: torch.optim.Optimizer, options: Namespace, steps_per_epoch: int, images_per_step: int
) -> LambdaLR:
    """To be stepped after every step of the optimiser."""
    return LambdaLR(
        optimizer,
        partial(
            learning_rate_factor, options=options, steps_per_epoch=steps_per_epoch, images_per_step=images_per_step
        ),
    )


def losses(options: Namespace) -> tuple[nn.Module, nn.Module]:
    """For training and for evaluation, which has no label smoothing. Multi-label: a sigmoid for each label."""
    if options.multi_label:
        return nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()
    return nn.CrossEntropyLoss(label_smoothing=options.smoothing), nn.CrossEntropyLoss()


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """Polyak averaging: an exponential moving average of weights and BatchNorm statistics, for evaluation.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage has it, so
    that short runs are not all about the first weights.
    """

    def update(average: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        if not average[0].is_floating_point():  # BatchNorm counts its batches
            torch._foreach_copy_(average, current)
            return
        n = int(updates)
        pairs = list(zip(average, current, strict=True))
        for sharded in (False, True):  # FSDP2's parameters and the buffers, which are whole, do not mix in one call
            if alike := [pair for pair in pairs if isinstance(pair[0], DTensor) == sharded]:
                torch._foreach_lerp_(*map(list, zip(*alike, strict=True)), 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
