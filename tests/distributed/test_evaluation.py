"""Metrics over all ranks are those of all rows together."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from shardemb.data.batch import Batch
from shardemb.metrics.evaluation import Evaluation, Evaluator
from tests.distributed.pool import WorkerPool

BATCH_SIZE = 50


def draw(ranks: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits and labels of each rank: rank 0 has all its rows, the last rank none."""
    generator = torch.Generator().manual_seed(ranks)
    counts = [BATCH_SIZE * (ranks - 1 - rank) // max(ranks - 1, 1) for rank in range(ranks)]
    counts = counts if ranks > 1 else [37]
    labels = [(torch.rand(n, generator=generator) < 0.3).float() for n in counts]
    # Rounded, so that there are ties.
    logits = [
        (torch.randn(n, generator=generator) + y).round(decimals=1)
        for n, y in zip(counts, labels, strict=True)
    ]
    return logits, labels


def evaluate(logits: list[torch.Tensor], labels: list[torch.Tensor]) -> Evaluation:
    rank = dist.get_rank()
    padding = BATCH_SIZE - len(logits[rank])
    padded = torch.nn.functional.pad(logits[rank], (0, padding), value=9.0)
    empty = KeyedJaggedTensor(
        keys=["f"], values=torch.zeros(0), lengths=torch.zeros(BATCH_SIZE).int()
    )
    batch = Batch(
        dense=torch.zeros(BATCH_SIZE, 0),
        sparse=empty,
        labels=torch.nn.functional.pad(labels[rank], (0, padding)),
        mask=torch.tensor([1.0] * len(logits[rank]) + [0.0] * padding),
        global_rows=sum(map(len, logits)),
    )
    evaluator = Evaluator(torch.device("cpu"))
    evaluator.update(padded, batch)
    return evaluator.compute()


def test_ranks_with_unequal_rows(pool: WorkerPool) -> None:
    """AUC by counting pairs, log loss and entropy by hand; padding and empty ranks add nothing."""
    logits, labels = draw(pool.world_size)
    scores, clicks = torch.cat(logits).double().numpy(), torch.cat(labels).numpy()
    positive, negative = scores[clicks == 1], scores[clicks == 0]
    above = (positive[:, None] > negative[None, :]).mean()
    ties = (positive[:, None] == negative[None, :]).mean()
    probability = 1 / (1 + np.exp(-scores))
    logloss = -np.mean(clicks * np.log(probability) + (1 - clicks) * np.log(1 - probability))
    rate = clicks.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    for found in pool.run(evaluate, logits, labels):
        assert found.samples == len(scores)
        assert math.isclose(found.metrics["auc"], above + ties / 2, rel_tol=1e-6)
        assert math.isclose(found.metrics["logloss"], logloss, rel_tol=1e-6)
        assert math.isclose(found.metrics["normalized_entropy"], logloss / entropy, rel_tol=1e-6)
