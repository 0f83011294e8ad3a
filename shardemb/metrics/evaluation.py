"""Metrics over the rows of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import softsign
from torchmetrics.classification import BinaryAUROC

from shardemb.data.batch import Batch
from shardemb.metrics.catalog import TaskMetric, metrics_of
from shardemb.metrics.grouped import GroupedRows
from shardemb.metrics.sums import SUMS, metric_of_sums, sums_of
from shardemb.tasks import Columns, Task, columns_of, num_outputs


@dataclass(frozen=True)
class Evaluation:
    """Metrics by their keys, of `samples` rows; NaN where one is undefined (AUC of one class)."""

    metrics: dict[str, float]
    samples: int

    def to_json(self) -> dict[str, Any]:
        return {**self.metrics, "samples": self.samples}


class Evaluator:
    """Collects predictions batch by batch; `compute` is a collective."""

    def __init__(
        self,
        device: torch.device,
        tasks: tuple[Task, ...] = (Task(),),
        metrics: Sequence[TaskMetric] | None = None,
    ) -> None:
        metrics = metrics_of(tasks) if metrics is None else metrics
        self._keys = [metric.key for metric in metrics]
        self._num_outputs = num_outputs(tasks)
        self._num_labels = sum(len(task.labels) for task in tasks)
        self._tasks = [
            _TaskMetrics(columns, [m for m in metrics if m.task == columns.task], device)
            for columns in columns_of(tasks)
        ]
        self._rows = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, outputs: torch.Tensor, batch: Batch) -> None:
        """`outputs` [batch_size, number of outputs]; padding rows are left out."""
        real = batch.mask > 0
        outputs = outputs.detach().view(len(real), self._num_outputs)[real].float().double()
        labels = batch.labels.view(len(real), self._num_labels)[real].double()
        groups = None if batch.groups is None else batch.groups[real]
        self._rows += real.sum()
        for task in self._tasks:
            task.update(outputs, labels, groups)

    def compute(self) -> Evaluation:
        dist.all_reduce(self._rows)
        rows = int(self._rows)
        if rows == 0:
            return Evaluation(dict.fromkeys(self._keys, math.nan), 0)
        found = {key: value for task in self._tasks for key, value in task.compute().items()}
        return Evaluation({key: found[key] for key in self._keys}, rows)


class _TaskMetrics:
    """Of one task; the mean over its columns of labels, of those where a metric is defined."""

    def __init__(
        self, columns: Columns, metrics: Sequence[TaskMetric], device: torch.device
    ) -> None:
        self._columns, self._device, self._metrics = columns, device, metrics
        labels = len(columns.task.labels)
        # In float64, or large data would lose its last rows.
        self._sums = torch.zeros(labels, len(SUMS), dtype=torch.float64, device=device)
        self._grouped = [m for m in metrics if m.kind.is_grouped]
        self._rows_of_groups = [GroupedRows() for _ in range(labels if self._grouped else 0)]
        has_auc = any(metric.name == "auc" for metric in metrics)
        self._auc = [BinaryAUROC(thresholds=None).to(device) for _ in range(labels * has_auc)]

    def update(
        self, outputs: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor | None
    ) -> None:
        outputs, labels = outputs[:, self._columns.outputs], labels[:, self._columns.labels]
        self._sums += sums_of(self._columns.task, outputs, labels)
        for column, auc in enumerate(self._auc):
            # Any order-keeping map to probabilities will do; a sigmoid makes large scores equal.
            scores = softsign(outputs[:, column]) / 2 + 0.5
            auc.update(scores, (labels[:, column] > 0.5).int())
        for column, rows in enumerate(self._rows_of_groups):
            if groups is None:
                key = self._grouped[0].key
                raise ValueError(f"{key} needs groups: name the column in the reader's schema")
            rows.update(outputs[:, column], labels[:, column], groups)

    def compute(self) -> dict[str, float]:
        dist.all_reduce(self._sums)
        columns = [dict(zip(SUMS, sums, strict=True)) for sums in self._sums.tolist()]
        if (
            not self._sums.isfinite().all()
        ):  # outputs without an order: no number looks like a score
            return {metric.key: math.nan for metric in self._metrics}
        grouped = [rows.compute(self._grouped, self._device) for rows in self._rows_of_groups]
        of_groups = dict(
            zip((m.key for m in self._grouped), zip(*grouped, strict=True), strict=True)
        )
        found: dict[str, float] = {}
        values: Sequence[float]
        for metric in self._metrics:
            if metric.kind.is_grouped:
                values = of_groups[metric.key]
            elif metric.name == "auc":
                values = [self._auc_of(*pair) for pair in zip(self._auc, columns, strict=True)]
            else:
                values = [metric_of_sums(metric.name, sums) for sums in columns]
            found[metric.key] = _mean_of_defined(values)
        return found

    @staticmethod
    def _auc_of(auc: BinaryAUROC, sums: dict[str, float]) -> float:
        return float(auc.compute()) if 0 < sums["positives"] < sums["rows"] else math.nan


def _mean_of_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan
