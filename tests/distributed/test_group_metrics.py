"""Metrics of groups, which lie on several ranks, are those of all rows together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)
from torchrec import KeyedJaggedTensor

from shardemb.data.batch import Batch
from shardemb.metrics.catalog import metrics_of
from shardemb.metrics.evaluation import Evaluator
from shardemb.tasks import Task
from tests.distributed.pool import WorkerPool

NAMES = ("gauc", "hr@3", "recall@3", "precision@3", "mrr", "ndcg@3", "ndcg@400", "auc")
RANKING = (Task("relevance", "bpr", ("relevance",)),)
BATCH_SIZE = 64
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores, labels, groups


def evaluate(rows: Rows, deal: list[int], tasks: tuple[Task, ...] = RANKING) -> dict[str, float]:
    """Of the rows that `deal` gives to this rank, in batches with padding."""
    evaluator = Evaluator(torch.device("cpu"), tasks, metrics_of(tasks, NAMES))
    mine = np.flatnonzero(np.array(deal) == dist.get_rank())
    for first in range(0, len(deal), BATCH_SIZE - 3):  # as many batches on each rank
        part = mine[first : first + BATCH_SIZE - 3]
        padding = BATCH_SIZE - len(part)
        columns = [torch.from_numpy(np.pad(values[part], (0, padding))) for values in rows]
        lengths = torch.zeros(BATCH_SIZE, dtype=torch.int64)
        batch = Batch(
            dense=torch.zeros(BATCH_SIZE, 0),
            sparse=KeyedJaggedTensor(["f"], torch.zeros(0, dtype=torch.int64), lengths),
            labels=columns[1].float(),
            mask=torch.tensor([1.0] * len(part) + [0.0] * padding),
            global_rows=len(part),
            groups=columns[2],
        )
        evaluator.update(columns[0].float(), batch)
    return evaluator.compute().metrics


def draw(seed: int, groups: int, grades: int) -> Rows:
    """Groups of all sizes, some without a relevant row; no two scores are equal."""
    random = np.random.default_rng(seed)
    group = np.floor(groups * random.random(400) ** 2).astype(np.int64) - groups // 2
    scores = random.permutation(400) / 400 - 0.5
    labels = random.integers(0, grades, 400) * (random.random(400) < 0.3)
    return scores, labels.astype(np.float64), group * 2**40


def by_torchmetrics(rows: Rows) -> dict[str, float]:
    """Group by group, without those that have no relevant row; for GAUC, or no other."""
    scores, labels, groups = (torch.from_numpy(values) for values in rows)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    weights = []
    for group in groups.unique():
        score, gain = scores[groups == group], labels[groups == group].long()
        hit = (gain > 0).long()
        if not hit.any():
            continue
        found["hr@3"].append(retrieval_hit_rate(score, hit, 3).item())
        found["recall@3"].append(retrieval_recall(score, hit, 3).item())
        found["precision@3"].append(retrieval_precision(score, hit, 3).item())
        found["mrr"].append(retrieval_reciprocal_rank(score, hit).item())
        found["ndcg@3"].append(retrieval_normalized_dcg(score, gain, 3).item())
        found["ndcg@400"].append(retrieval_normalized_dcg(score, gain).item())
        if not hit.all():
            found["gauc"].append(binary_auroc(score + 0.5, hit).item())
            weights.append(len(hit))
    found["auc"] = [binary_auroc(scores + 0.5, (labels > 0).long()).item()]
    weighted = float(np.average(found.pop("gauc"), weights=weights))
    return {"gauc": weighted, **{name: float(np.mean(v)) for name, v in found.items()}}


@pytest.mark.parametrize(("groups", "grades"), [(30, 2), (30, 5), (4, 2), (300, 2)])
def test_group_metrics_are_torchmetrics(pool: WorkerPool, groups: int, grades: int) -> None:
    """With binary and graded labels, groups of one row and of hundreds, dealt to ranks at random,
    of which one has no row: the numbers of torchmetrics, group by group."""
    rows = draw(groups, groups, grades)
    deal = np.random.default_rng(1).integers(0, max(1, pool.world_size - 1), 400).tolist()
    expected = by_torchmetrics(rows)
    for found in pool.run(evaluate, rows, deal):
        assert found.keys() == set(NAMES)
        for name, value in found.items():
            assert value == pytest.approx(expected[name], rel=1e-5), name


TIES = {"gauc": 0.5, "hr@3": 0.5, "recall@3": 0.5, "precision@3": 1 / 6, "mrr": (1 / 4 + 1 / 2) / 2}


def test_ties_earn_nothing(pool: WorkerPool) -> None:
    """All scores equal, groups of four rows and two with a relevant one each: as if it came last in
    its group; half the pairs for GAUC."""
    labels = np.array([1.0, 0, 0, 0, 1, 0])
    rows = np.zeros(6), labels, np.array([7, 7, 7, 7, 9, 9])
    deal = [n % pool.world_size for n in range(6)]
    for found in pool.run(evaluate, rows, deal):
        for name, value in TIES.items():
            assert found[name] == pytest.approx(value), name
        assert found["ndcg@3"] == pytest.approx((0 + 1 / math.log2(3)) / 2)


def test_what_is_undefined_is_no_number(pool: WorkerPool) -> None:
    """No relevant row at all, and scores that are no numbers."""
    rows = np.zeros(6), np.zeros(6), np.arange(6)
    deal: Any = [n % pool.world_size for n in range(6)]
    for found in pool.run(evaluate, rows, deal):
        assert all(map(math.isnan, found.values()))
    broken = np.full(6, np.nan), np.ones(6), np.arange(6) // 3
    for found in pool.run(evaluate, broken, deal):
        assert all(map(math.isnan, found.values()))
