"""The network to train, with its losses, scores, optimiser, learning rate and averaged weights."""

import math
from argparse import Namespace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from .data import ImageData, UserError, generator

AUXILIARY_WEIGHT = 0.3
"""Of each auxiliary head's loss, as GoogLeNet has it."""
RMSPROP_DECAY = 0.9
"""Decay of the mean square, which the paper leaves out: Inception V3's. PyTorch's default is 0.99."""
MAP_DEPTH = 100
"""The paper's measure on JFT is the mean average precision of the first 100 answers."""
IDENTITY = ("model", "model_kwargs", "multi_label", "model_ema", "seed", "opt", "lr", "momentum", "weight_decay")
"""Flags that must be the same in a run that is resumed, or it would be another run."""


class Classifier(lightning.LightningModule):
    """A network with its losses and scores; `loss` is the mean of training's since it was last reset."""

    def __init__(self, network: nn.Module, options: Namespace, data: ImageData) -> None:
        super().__init__()
        self.network, self.options, self.class_weights = network, options, data.class_weights
        self.steps, self.images_per_step = data.steps, data.images_per_step
        names = ("loss", "top-1", "top-5", *(["MAP@100"] if options.multi_label else []))
        self.scores = nn.ModuleDict({name: MeanMetric() for name in names})
        # No look for NaN at each step. (torchmetrics 1.9 drops the weights of an update then: here there are none.)
        self.loss = MeanMetric("disable")
        identity = {name: getattr(options, name) for name in IDENTITY} | {"images_per_step": data.images_per_step}
        self.save_hyperparameters(identity, logger=False)

    def configure_model(self) -> None:
        """For FSDP2 divides parameters, gradients and the optimiser's state among the ranks. Blocks are gathered whole,
        never half a separable convolution, whose kernel reads both.
        """
        if self.options.distributed == "fsdp":
            lists = [module for module in self.network.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
            blocks = [block for parent in reversed(lists) for block in parent if not isinstance(block, nn.ModuleList)]
            blocks = [block for block in blocks if len(list(block.parameters())) > 2]  # more than a layer
            for module in (*blocks, self.network):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits; then those of auxiliary heads, where the network gives them."""
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        outputs = self.network(images.contiguous(memory_format=layout))
        return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)

    def losses(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """One of each image."""
        if self.options.multi_label:  # a sigmoid for each label
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets, _ = batch
        options, turns = self.options, self.options.grad_accum_steps
        place = (self.trainer.global_step * turns + batch_idx % turns) * options.ranks + options.rank
        torch.manual_seed(int(generator(options.seed, "dropout", place).integers(2**63)))
        main, *auxiliary = (self.losses(y, targets, options.smoothing).mean() for y in self(images))
        loss = main + AUXILIARY_WEIGHT * sum(auxiliary)
        self.loss.update(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets, counts = batch
        logits = self(images)[0].float()
        right = targets if self.options.multi_label else F.one_hot(targets, logits.shape[1])
        order = logits.topk(min(MAP_DEPTH, logits.shape[1])).indices
        hits, labelled = right.gather(1, order).bool(), counts & right.any(1)  # no label, no score
        figures = {"loss": (self.losses(logits, targets), counts)}
        figures |= {f"top-{n}": (hits[:, :n].any(1) * 100.0, labelled) for n in (1, 5)}
        if self.options.multi_label:
            figures["MAP@100"] = 100 * average_precision(order, targets, self.class_weights), labelled
        for name, (values, where) in figures.items():
            self.scores[name].update(values, where.float())
            self.log(f"val/{name}", self.scores[name], prog_bar=True, logger=False)

    def configure_optimizers(self) -> dict[str, Any]:
        """Weight decay applies to the weights of convolutions and matrices alone, not to biases and BatchNorm."""
        options, parameters = self.options, [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        make, more = {
            "sgd": (torch.optim.SGD, {"momentum": options.momentum}),
            "rmsprop": (torch.optim.RMSprop, {"momentum": options.momentum, "alpha": RMSPROP_DECAY}),
            "adam": (torch.optim.Adam, {}),
            "adamw": (torch.optim.AdamW, {}),
        }[options.opt]
        optimizer, per = make(groups, lr=options.lr, **more), (self.steps, self.images_per_step)
        scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, options, *per))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        there, here = checkpoint.get("hyper_parameters", {}), self.hparams
        different = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
        if different:
            raise UserError(f"--resume: the checkpoint is of another run: {'; '.join(different)}")


def averaged(decay: float) -> WeightAveraging:
    """Polyak averaging: an exponential moving average of weights and BatchNorm statistics, for evaluation.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage has it, so
    that short runs are not all about the first weights.
    """
    return WeightAveraging(avg_fn=lambda mean, now, n: mean + (now - mean) * (9 / (10 + n)).clamp(min=1 - decay))


def learning_rate_factor(step: int, options: Namespace, steps_per_epoch: int, images_per_step: int) -> float:
    """What the initial learning rate is multiplied by at a step, counted from 0; a warm-up rises evenly."""
    warmup = options.warmup_epochs * steps_per_epoch
    done, left = step - warmup, options.epochs * steps_per_epoch - warmup
    if done < 0:
        return (step + 1) / (warmup + 1)
    if options.sched == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done / left))
    if options.sched == "none":
        return 1.0
    every = options.decay_epochs * steps_per_epoch * images_per_step
    return options.decay_rate ** (done * images_per_step // (options.decay_images or every))


def average_precision(order: Tensor, targets: Tensor, class_weights: Tensor | None) -> Tensor:
    """Of each image's first answers: the sum of the precisions at the right ones, over as many as could be right.

    `order`: (n, depth) classes, the likeliest first; `targets`: (n, classes) of zeros and ones.
    """
    precision = targets.gather(1, order).cumsum(1) / torch.arange(1, order.shape[1] + 1, device=order.device)
    worth = targets if class_weights is None else targets * class_weights.to(targets)
    most = worth.topk(order.shape[1]).values.sum(1)
    return (precision * worth.gather(1, order)).sum(1) / most.clamp(min=1e-12)
