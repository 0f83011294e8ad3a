"""Metrics of the order of rows within groups, wherever the rows of a group are.

At the end each row goes to the rank that its group is hashed to: 16 bytes a row, of which a rank
has as many as it evaluated and then, but for chance and huge groups, its share of all. What is
worked out there takes about 150 bytes a row for a moment.

Rows of equal scores are ordered to the model's disadvantage: one that gives all rows the same score
earns nothing. A row is relevant if its label is above one half; groups without such a row, and for
GAUC those without another, are left out. NaN where none is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shardemb.data.hashing import mix64
from shardemb.metrics.catalog import TaskMetric

_Floats = NDArray[np.float64]


class GroupedRows:
    """Collects the scores, labels and groups of this rank's rows; `compute` is a collective."""

    def __init__(self) -> None:
        self._scores: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._groups: list[torch.Tensor] = []

    def update(self, scores: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> None:
        """[rows] each."""
        self._scores.append(scores.float().cpu())
        self._labels.append(labels.cpu())
        self._groups.append(groups.cpu())

    def compute(self, metrics: Sequence[TaskMetric], device: torch.device) -> list[float]:
        """`device` is that of collectives."""
        own = [torch.cat(parts) for parts in (self._groups, self._scores, self._labels)]
        groups, scores, labels = (values.numpy() for values in _to_ranks_of_groups(own, device))
        ranked = Ranked.of(groups, scores.astype(np.float64), labels.astype(np.float64))
        sums = torch.tensor(
            [_total(metric, ranked) for metric in metrics], dtype=torch.float64, device=device
        )
        dist.all_reduce(sums)
        return (sums[:, 0] / sums[:, 1]).tolist()


def _to_ranks_of_groups(own: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """`own` [groups, ...] of rows, exchanged so that a group is on one rank."""
    world_size = dist.get_world_size()
    rank = torch.from_numpy((mix64(own[0].numpy()) % np.uint64(world_size)).astype(np.int64))
    order = rank.argsort()
    sent = rank.bincount(minlength=world_size).to(device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    exchanged = []
    for values in own:
        target = torch.empty(int(received.sum()), dtype=values.dtype, device=device)
        source = values[order].to(device)
        dist.all_to_all_single(target, source, received.tolist(), sent.tolist())
        exchanged.append(target.cpu())
    return exchanged


@dataclass(frozen=True)
class Ranked:
    """Rows by group, the best score first: `place` is 0 for a group's best row."""

    scores: _Floats
    labels: _Floats
    group: NDArray[np.int64]  # from 0
    place: NDArray[np.int64]
    sizes: NDArray[np.int64]  # rows of each group

    @classmethod
    def of(cls, groups: NDArray[np.int64], scores: _Floats, labels: _Floats) -> Ranked:
        order = np.lexsort((labels, -scores, groups))
        _, group, sizes = np.unique(groups[order], return_inverse=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return cls(scores[order], labels[order], group, place, sizes)

    def sums(self, values: NDArray[Any]) -> _Floats:
        """Of each group."""
        return _sums(self.group, values, len(self.sizes))


def _sums(index: NDArray[np.int64], values: NDArray[Any], size: int) -> _Floats:
    """Of the values of each index below `size`."""
    return np.bincount(index, values, minlength=size).astype(np.float64)  # integers where none is


def _total(metric: TaskMetric, ranked: Ranked) -> tuple[float, float]:
    """The weighted sum of a metric over this rank's groups, and of the weights."""
    relevant = ranked.sums(ranked.labels > 0.5)
    if metric.name == "gauc":
        return _gauc(ranked, relevant)
    has_relevant = relevant > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        values = _OF_GROUPS[metric.name](ranked, relevant, metric.k or 0)
    return float(values[has_relevant].sum()), float(has_relevant.sum())


def _hits(ranked: Ranked, k: int) -> _Floats:
    """Relevant rows among the first `k` of each group."""
    return ranked.sums((ranked.labels > 0.5) & (ranked.place < k))


def _hit_rate(ranked: Ranked, relevant: _Floats, k: int) -> _Floats:
    return (_hits(ranked, k) > 0).astype(np.float64)


def _recall(ranked: Ranked, relevant: _Floats, k: int) -> _Floats:
    return _hits(ranked, k) / relevant


def _precision(ranked: Ranked, relevant: _Floats, k: int) -> _Floats:
    """A group with fewer than `k` rows still counts as `k`."""
    return _hits(ranked, k) / k


def _reciprocal_rank(ranked: Ranked, relevant: _Floats, k: int) -> _Floats:
    best = np.full(len(ranked.sizes), np.inf)
    is_relevant = ranked.labels > 0.5
    np.minimum.at(best, ranked.group[is_relevant], ranked.place[is_relevant])
    return 1 / (best + 1)


def _ndcg(ranked: Ranked, relevant: _Floats, k: int) -> _Floats:
    """With the label itself as the gain (Järvelin and Kekäläinen, TOIS 2002)."""
    discounts = np.where(ranked.place < k, 1 / np.log2(ranked.place + 2), 0)
    ideal = ranked.labels[np.lexsort((-ranked.labels, ranked.group))]
    return ranked.sums(ranked.labels * discounts) / ranked.sums(ideal * discounts)


_OF_GROUPS = {
    "hr": _hit_rate,
    "recall": _recall,
    "precision": _precision,
    "mrr": _reciprocal_rank,
    "ndcg": _ndcg,
}


def _gauc(ranked: Ranked, relevant: _Floats) -> tuple[float, float]:
    """The mean of the groups' AUC, weighted by their rows (Zhou et al., "Deep Interest Network",
    KDD 2018); ties count half."""
    others = ranked.sizes - relevant
    new = np.diff(ranked.group, prepend=-1) != 0
    new |= np.diff(ranked.scores, prepend=0) != 0
    run = np.cumsum(new) - 1  # of rows of one group and score, the best scores first
    runs = int(run[-1]) + 1 if len(run) else 0
    positive = _sums(run, ranked.labels > 0.5, runs)
    negative = _sums(run, ranked.labels <= 0.5, runs)
    group = ranked.group[new]
    before = np.cumsum(negative) - negative  # negatives in all runs before
    before -= (np.cumsum(others) - others)[group]  # of these, in the group
    right = positive * (others[group] - before - negative / 2)
    defined = (relevant > 0) & (others > 0)
    with np.errstate(invalid="ignore"):
        auc = _sums(group, right, len(ranked.sizes)) / (relevant * others)
    return float((auc * ranked.sizes)[defined].sum()), float(ranked.sizes[defined].sum())
