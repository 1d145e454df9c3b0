"""How good the answers are, by torchmetrics; counted on every rank and put together at the end."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

TOP = 5
MAP_DEPTH = 100
"""The paper's measure on JFT is the mean average precision of the first 100 answers."""


@dataclass(frozen=True)
class Result:
    """Of one evaluation. Shares are in percent."""

    loss: float
    top1: float
    top5: float
    map100: float | None = None
    """Only where an image has many labels."""

    def __str__(self) -> str:
        return f"top-1 {self.top1:.1f} top-5 {self.top5:.1f}"


class Score:
    """One class an image: top-1 and top-5 accuracy. Many labels: whether one of the first 1, 5 answers is a label,
    and the mean average precision of the first 100.
    """

    def __init__(self, classes: int, multi_label: bool, device: torch.device) -> None:
        self.multi_label = multi_label
        self.loss = MeanMetric().to(device)
        if multi_label:
            metrics = {"top1": MeanMetric(), "top5": MeanMetric(), "map100": MeanMetric()}
        else:
            metrics = {
                "top1": MulticlassAccuracy(classes, 1, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(classes, min(TOP, classes), average="micro", validate_args=False),
            }
        self.metrics = MetricCollection(metrics, compute_groups=False).to(device)

    def add(self, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        """logits (n, classes), targets (n,) or (n, classes), loss their mean."""
        if not len(logits):
            return
        self.loss.update(loss, weight=len(logits))
        if not self.multi_label:
            self.metrics.update(logits, targets)
            return
        for answer, labels in zip(logits, targets.bool(), strict=True):
            if labels.any():
                depth = min(MAP_DEPTH, len(answer))
                self.metrics["top1"].update(retrieval_hit_rate(answer, labels, top_k=1))
                self.metrics["top5"].update(retrieval_hit_rate(answer, labels, top_k=min(TOP, len(answer))))
                self.metrics["map100"].update(retrieval_average_precision(answer, labels, top_k=depth))

    def result(self) -> Result:
        """Over all ranks, all of which must ask."""
        return Result(float(self.loss.compute()), **{k: 100 * float(v) for k, v in self.metrics.compute().items()})
