"""The metrics there are: what each fits, which way is better, what it needs. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from planner.validation import nearest
from shardemb.tasks import RANKING, Task

_BINARY = ("binary_cross_entropy",)
_NUMBERS = ("mse", "mae")
_ORDERS = (*_BINARY, *RANKING)


@dataclass(frozen=True)
class MetricKind:
    """`losses` are those it fits; `best` is None where neither more nor less is better."""

    title: str
    losses: tuple[str, ...]
    best: Literal["max", "min"] | None
    is_grouped: bool = False
    is_cut: bool = False  # at the K of `NAME@K`


METRICS = {
    "auc": MetricKind("AUC", _ORDERS, "max"),
    "gauc": MetricKind("GAUC", _ORDERS, "max", is_grouped=True),
    "logloss": MetricKind("log loss", (*_BINARY, "cross_entropy"), "min"),
    "normalized_entropy": MetricKind("normalized entropy", _BINARY, "min"),
    "calibration": MetricKind("calibration", (*_BINARY, *_NUMBERS), None),
    "accuracy": MetricKind("accuracy", (*_BINARY, "cross_entropy"), "max"),
    "mse": MetricKind("MSE", _NUMBERS, "min"),
    "mae": MetricKind("MAE", _NUMBERS, "min"),
    "hr": MetricKind("HR", _ORDERS, "max", is_grouped=True, is_cut=True),
    "recall": MetricKind("recall", _ORDERS, "max", is_grouped=True, is_cut=True),
    "precision": MetricKind("precision", _ORDERS, "max", is_grouped=True, is_cut=True),
    "mrr": MetricKind("MRR", _ORDERS, "max", is_grouped=True),
    "ndcg": MetricKind("nDCG", _ORDERS, "max", is_grouped=True, is_cut=True),
}
_DEFAULTS = {
    "binary_cross_entropy": ("auc", "logloss", "normalized_entropy"),
    "cross_entropy": ("logloss", "accuracy"),
    "mse": ("mse", "mae"),
    "mae": ("mae", "mse"),
    "bpr": ("ndcg@10", "hr@10", "mrr"),
    "listwise_softmax": ("ndcg@10", "hr@10", "mrr"),
}


@dataclass(frozen=True)
class TaskMetric:
    """A metric of one task: `key` is its name in results, with the task's where there are more."""

    key: str
    task: Task
    name: str
    k: int | None = None

    @property
    def kind(self) -> MetricKind:
        return METRICS[self.name]

    @property
    def title(self) -> str:
        prefix, slash, _ = self.key.rpartition("/")
        return f"{prefix}{slash}{self.kind.title}{f'@{self.k}' if self.k else ''}"


def metrics_of(tasks: tuple[Task, ...], names: tuple[str, ...] = ()) -> list[TaskMetric]:
    """Each of `names` for each task that it fits, or `TASK/NAME` for one; without names, those
    that go with the losses. ValueError where one is not known or fits no task."""
    if not names:
        return [_metric(task, name, tasks) for task in tasks for name in _DEFAULTS[task.loss]]
    found = [metric for name in names for metric in _metrics(name, tasks)]
    return list({metric.key: metric for metric in found}.values())


def _metrics(wanted: str, tasks: tuple[Task, ...]) -> list[TaskMetric]:
    of_task, slash, name = wanted.rpartition("/")
    if slash and of_task not in {task.name for task in tasks}:
        raise ValueError(
            f"{wanted}: there is no task {of_task}{nearest(of_task, [t.name for t in tasks])}"
        )
    losses = METRICS[_parse(name)[0]].losses
    asked = [task for task in tasks if not slash or task.name == of_task]
    fitting = [task for task in asked if task.loss in losses]
    if not fitting:
        has = " or ".join(sorted({task.loss for task in asked}))
        fit = [key for key, kind in METRICS.items() if any(t.loss in kind.losses for t in asked)]
        raise ValueError(
            f"{wanted} is a metric of {', '.join(losses)}, and the loss is {has}; choose from "
            f"{', '.join(fit)}"
        )
    return [_metric(task, name, tasks) for task in fitting]


def _metric(task: Task, name: str, tasks: tuple[Task, ...]) -> TaskMetric:
    key = name if len(tasks) == 1 else f"{task.name}/{name}"
    return TaskMetric(key, task, *_parse(name))


def _parse(text: str) -> tuple[str, int | None]:
    """`ndcg@10` to its name and cut."""
    name, at, cut = text.partition("@")
    if name not in METRICS:
        raise ValueError(f"{text} is no metric{nearest(name, METRICS)}")
    if METRICS[name].is_cut and not re.fullmatch("[1-9][0-9]*", cut):
        raise ValueError(f"{text}: how many of the first rows count? Write {name}@10, for example")
    if at and not METRICS[name].is_cut:
        raise ValueError(f"{text}: {name} has no cut; write {name}")
    return name, int(cut) if at else None
