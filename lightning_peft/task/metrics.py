"""What is measured beside the loss, per task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.task.kinds import Task
from lightning_peft.task.losses import IGNORE


class Perplexity(MeanMetric):
    """``exp`` of the mean loss over all labels; update with (loss, number of labels)."""

    def compute(self) -> Tensor:
        """The perplexity so far."""
        return super().compute().exp()


class Pearson(PearsonCorrCoef):
    """Pearson's correlation; 0 while it is not defined (fewer than two rows, or all values equal)."""

    def compute(self) -> Tensor:
        """The correlation so far."""
        total, spread = self.n_total.sum(), torch.minimum(self.var_x.min(), self.var_y.min())
        several = self.n_total.numel() > 1  # gathered from several processes; their variances add up in there
        if total < 2 or (not several and spread <= 0):
            return torch.zeros((), device=self.device)
        return super().compute().nan_to_num()


def build_metrics(task: Task, num_labels: int | None, stage: str) -> MetricCollection:
    """Metrics named ``{stage}_{name}``: accuracy and macro F1 for classes, MAE and Pearson's r, or perplexity.

    >>> from lightning_peft.task.kinds import find_task
    >>> sorted(build_metrics(find_task("regression"), 1, "val").keys())
    ['val_mae', 'val_pearson']
    """
    metrics: dict[str, Metric] = {}
    if task.target in ("class", "token") and num_labels:
        options = {"num_classes": num_labels, "ignore_index": IGNORE, "validate_args": False}
        metrics["accuracy"] = MulticlassAccuracy(average="micro", **options)
        metrics["f1"] = MulticlassF1Score(average="macro", **options)
    elif task.target == "number":
        metrics = {"mae": MeanAbsoluteError(), "pearson": Pearson()}
    elif task.target == "text":
        metrics["perplexity"] = Perplexity()
    return MetricCollection({f"{stage}_{name}": metric for name, metric in metrics.items()}, compute_groups=False)


def stages(task: Task, num_labels: int | None) -> nn.ModuleDict:
    """One collection each for train, val and test (a ModuleDict takes no key called ``train``)."""
    return nn.ModuleDict({f"{stage}_": build_metrics(task, num_labels, stage) for stage in ("train", "val", "test")})
