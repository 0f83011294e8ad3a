"""Metrics that are sums over rows, of one column of labels each."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from shardemb.tasks import Task

# What is summed: rows, labels, labels above one half, predictions, losses, right classes, squared
# and absolute errors.
SUMS = ("rows", "labels", "positives", "predictions", "loss", "right", "squares", "absolutes")


def sums_of(task: Task, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[label columns, SUMS] of `outputs` [rows, task.num_outputs] and `labels` [rows, columns],
    both float64."""
    none = torch.zeros_like(labels)
    predictions = loss = right = none
    if task.loss == "binary_cross_entropy":
        predictions = outputs.sigmoid()
        loss = binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        right = (predictions > 0.5) == (labels > 0.5)
    elif task.num_classes is not None:
        classes = labels[:, 0].long()
        loss = cross_entropy(outputs, classes, reduction="none")[:, None]
        right = (outputs.argmax(dim=1) == classes)[:, None]
    else:
        predictions = outputs
    errors = predictions - labels
    rows = torch.ones_like(labels), labels, labels > 0.5, predictions, loss, right
    columns = [*rows, errors.square(), errors.abs()]
    return torch.stack([column.double().sum(dim=0) for column in columns], dim=1)


def metric_of_sums(name: str, sums: dict[str, float]) -> float:
    """NaN where it is undefined."""
    rows = sums["rows"]
    if name == "calibration":  # He et al., "Practical Lessons from Predicting Clicks", 2014
        return sums["predictions"] / sums["labels"] if sums["labels"] else math.nan
    if name == "normalized_entropy":
        return sums["loss"] / rows / _entropy(sums["labels"] / rows)
    total = {"logloss": "loss", "accuracy": "right", "mse": "squares", "mae": "absolutes"}[name]
    return sums[total] / rows


def _entropy(rate: float) -> float:
    """Of one label, in nats; NaN where all are alike, for nothing is measured in it."""
    if rate in (0.0, 1.0):
        return math.nan
    return -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
