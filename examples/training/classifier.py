"""What is trained, and how: the network with its losses, optimiser, learning rate, scores and averaged weights."""

import math
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from .data import derive
from .errors import UserError

AUXILIARY_WEIGHT = 0.3
"""Of each auxiliary head's loss, as GoogLeNet has it."""
RMSPROP_DECAY = 0.9
"""Of the mean square: Inception's, which the paper's RMSprop comes from. PyTorch's default is 0.99."""
TOP = 5
MAP_DEPTH = 100
"""The paper's measure on JFT is the mean average precision of the first 100 answers."""
IDENTITY = ("model", "model_kwargs", "multi_label", "model_ema", "seed", "opt", "lr", "momentum", "weight_decay")
"""Flags that must be the same in a run that is resumed, or it would be another run."""


class Classifier(lightning.LightningModule):
    """Args:
    steps, images_per_step: of an epoch; 0 for an evaluation.
    class_weights: of each class in MAP@100; None for 1.
    """

    def __init__(
        self,
        network: nn.Module,
        options: Namespace,
        steps: int = 0,
        images_per_step: int = 0,
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        self.network, self.options, self.class_weights = network, options, class_weights
        self.steps, self.images_per_step = steps, images_per_step
        self.losses, self.clock, self.rate = [], (0.0, 0), 0.0
        names = ("loss", "top1", "top5", *(("map100",) if options.multi_label else ()))
        self.scores = nn.ModuleDict({name: MeanMetric() for name in names})
        self.identity = {name: getattr(options, name) for name in IDENTITY} | {"images_per_step": images_per_step}

    def forward(self, images: Tensor) -> Any:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        return self.network(images.contiguous(memory_format=layout))

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        if self.options.multi_label:  # a sigmoid for each label
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets, _ = batch
        turns, trainer = self.options.grad_accum_steps, self.trainer
        place = (trainer.global_step * turns + batch_idx % turns) * trainer.world_size + trainer.global_rank
        torch.manual_seed(derive(self.options.seed, "dropout", place))
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]
        outputs = self(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self.loss(logits, targets, self.options.smoothing)
        for head in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * self.loss(head, targets, self.options.smoothing)
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `log_interval` steps a row: the mean loss of the steps since the row before, of all ranks."""
        step = self.trainer.global_step
        if (batch_idx + 1) % self.options.grad_accum_steps or step % self.options.log_interval:
            return
        loss = float(self.trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        if not math.isfinite(loss):
            raise UserError(f"--lr: the loss is {loss} after step {step}: the training has diverged")
        began, first = self.clock
        speed = (step - first) * self.images_per_step / (time.perf_counter() - began)
        self._note("train", {"loss": loss, "lr": self.rate, "images_per_second": speed})
        self.log_dict({"loss": loss, "images/s": speed}, prog_bar=True, logger=False)
        if self.trainer.progress_bar_callback is None:
            self.print(f"step {step}  loss {loss:.4f}  {speed:.0f} images/s")
        self._start_clock()

    def on_train_epoch_start(self) -> None:
        self._start_clock()

    def on_validation_end(self) -> None:
        self._start_clock()

    def _start_clock(self) -> None:
        self.losses, self.clock = [], (time.perf_counter(), self.trainer.global_step)

    def _note(self, stage: str, figures: dict[str, float]) -> None:
        """Into the logs, at the number of steps that are done: Lightning's own rows are one behind after an epoch."""
        for logger in self.loggers:
            row = {f"{stage}/{name}": value for name, value in figures.items()}
            logger.log_metrics({"epoch": self.trainer.global_step / self.steps, **row}, self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets, counts = batch
        logits, targets = self(images).float()[counts], targets[counts]
        if not len(logits):
            return
        self.scores["loss"].update(self.loss(logits, targets), weight=len(logits))
        order = logits.topk(min(MAP_DEPTH, logits.shape[1])).indices
        if not self.options.multi_label:
            hits = order == targets[:, None]
        else:
            labelled = targets.any(1)  # no label, no score
            order, targets = order[labelled], targets[labelled]
            hits = targets.gather(1, order).bool()
            if len(hits):
                self.scores["map100"].update(100 * average_precision(order, targets, self.class_weights))
        if len(hits):
            self.scores["top1"].update(100.0 * hits[:, :1].any(1))
            self.scores["top5"].update(100.0 * hits[:, :TOP].any(1))

    def on_validation_epoch_end(self) -> None:
        results = {name: float(score.compute()) for name, score in self.scores.items()}
        for score in self.scores.values():
            score.reset()
        self.log_dict({f"val/{name}": value for name, value in results.items()}, logger=False)
        if self.trainer.state.fn == "fit":
            self._note("val", results)
            text = "  ".join(f"{name} {figure}" for name, figure in shown(results).items())
            self.print(f"epoch {self.trainer.global_step / self.steps:g}  evaluation {text}")

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        there = checkpoint.get("identity", {})
        if different := [
            f"{k} {there.get(k)!r} there, {v!r} here" for k, v in self.identity.items() if there.get(k) != v
        ]:
            raise UserError(f"--resume: the checkpoint is of another run: {'; '.join(different)}")


class ShardedClassifier(Classifier):
    """For FSDP2: parameters, gradients and the optimiser's state divided among the ranks."""

    def configure_model(self) -> None:
        """Gathered together is a block, never half a separable convolution: its parent's kernel reads both weights."""
        mesh = self.device_mesh["data_parallel"]
        for block in _blocks(self.network):
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = []
    for child in module.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            blocks += _blocks(child)
        elif next(child.children(), None) is not None and next(child.parameters(), None) is not None:
            blocks.append(child)
    return blocks


def averaged(decay: float) -> WeightAveraging:
    """Polyak averaging: an exponential moving average of weights and BatchNorm statistics, for evaluation.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage has it, so
    that short runs are not all about the first weights.
    """

    def update(average: list[Tensor], current: list[Tensor], updates: Tensor) -> None:
        if not average[0].is_floating_point():  # BatchNorm counts its batches
            torch._foreach_copy_(average, current)
            return
        n = int(updates)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return WeightAveraging(multi_avg_fn=update)


def learning_rate_factor(step: int, options: Namespace, steps_per_epoch: int, images_per_step: int) -> float:
    """What the initial learning rate is multiplied by at a step, counted from 0; a warm-up rises evenly."""
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


def average_precision(order: Tensor, targets: Tensor, class_weights: Tensor | None) -> Tensor:
    """Of each image's first answers: the sum of the precisions at the right ones, over as many as could be right.

    `order`: (n, depth) classes, the likeliest first; `targets`: (n, classes) of zeros and ones.
    """
    hits = targets.gather(1, order)
    precision = hits.cumsum(1) / torch.arange(1, order.shape[1] + 1, device=order.device)
    worth = targets if class_weights is None else targets * class_weights.to(targets)
    most = worth.topk(order.shape[1]).values.sum(1)
    return (precision * worth.gather(1, order)).sum(1) / most.clamp(min=1e-12)


def shown(results: Mapping[str, Any]) -> dict[str, str]:
    """The figures of an evaluation under the names that people read."""
    names = {"loss": "loss", "top1": "top-1", "top5": "top-5", "map100": "MAP@100"}
    figures = {name.removeprefix("val/"): float(value) for name, value in results.items()}
    return {names[k]: f"{v:.4f}" if k == "loss" else f"{v:.1f}" for k, v in figures.items() if k in names}
