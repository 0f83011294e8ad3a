"""Losses of the order of rows within groups, which are of the whole step: rows of one group may
be on several ranks.

Every rank has the scores of all rows, 24 bytes a row of the step, and gradients flow back to where
they came from. It computes the part of its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import softplus

from shardemb.collectives import rows_of_all_ranks
from shardemb.data.batch import Batch


@dataclass(frozen=True)
class RankedRows:
    """The rows of a step on all ranks, by group and then by label, the smallest first."""

    scores: torch.Tensor  # [rows] float32, with gradients
    labels: torch.Tensor  # [rows] float32
    group: torch.Tensor  # [rows] int64, from 0
    is_own: torch.Tensor  # [rows] bool: on this rank


def rank_among_all(scores: torch.Tensor, labels: torch.Tensor, batch: Batch) -> RankedRows:
    """A collective; padding is left out. `scores` and `labels` are [batch_size]."""
    if batch.groups is None:
        raise ValueError("a ranking loss needs groups: name the column in the reader's schema")
    all_scores = rows_of_all_ranks(scores).flatten()
    labels, mask, groups = (_gather(values) for values in (labels, batch.mask, batch.groups))
    rank, size = dist.get_rank(), len(scores)
    is_own = torch.zeros(len(all_scores), dtype=torch.bool, device=scores.device)
    is_own[rank * size : (rank + 1) * size] = True
    rows = mask.nonzero()[:, 0]
    rows = rows[labels[rows].argsort(stable=True)]
    rows = rows[groups[rows].argsort(stable=True)]
    _, group = groups[rows].unique_consecutive(return_inverse=True)
    return RankedRows(all_scores[rows], labels[rows], group, is_own[rows])


def _gather(values: torch.Tensor) -> torch.Tensor:
    """Of all ranks, one after the other; without gradients."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def bpr(rows: RankedRows) -> torch.Tensor:
    """This rank's part of the mean of -log sigmoid(s_i - s_j) over all pairs of a group with
    label i above label j; 0 where there is none.

    A pair takes 40 bytes on the rank that has i. Rendle et al., "BPR: Bayesian Personalized Ranking
    from Implicit Feedback", UAI 2009.
    """
    number = torch.arange(len(rows.group), device=rows.group.device)
    group_start = _first_of_run(rows.group.diff() != 0, number)
    label_start = _first_of_run((rows.group.diff() != 0) | (rows.labels.diff() != 0), number)
    below = label_start - group_start  # rows of the group with a smaller label come before
    own = number[rows.is_own]
    above = own.repeat_interleave(below[own])
    ends = below[own].cumsum(0)
    offset = torch.arange(len(above), device=above.device)
    offset -= (ends - below[own]).repeat_interleave(below[own])
    others = group_start[above] + offset
    losses = softplus(rows.scores[others] - rows.scores[above])
    return losses.sum() / below.sum().clamp(min=1)


def _first_of_run(changes: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """For each row the first of its run; `changes` [rows - 1] is True where a run begins."""
    starts = number * torch.nn.functional.pad(changes, (1, 0))[: len(number)]
    return starts.cummax(0).values if len(starts) else starts


def listwise_softmax(rows: RankedRows) -> torch.Tensor:
    """This rank's part of the mean over groups of the cross-entropy between their labels, divided
    by their sum, and the softmax of their scores; groups without a label above 0 are left out.

    Bruch et al., "An Analysis of the Softmax Cross Entropy Loss for Learning-to-Rank with Binary
    Relevance", ICTIR 2019; for graded labels the top-one loss of ListNet (Cao et al., ICML 2007)
    with this distribution.
    """
    groups = int(rows.group[-1]) + 1 if len(rows.group) else 0
    zeros = rows.scores.new_zeros(groups)
    largest = zeros.scatter_reduce(0, rows.group, rows.scores.detach(), "amax", include_self=False)[
        rows.group
    ]
    normalizer = zeros.index_add(0, rows.group, (rows.scores - largest).exp()).log()[rows.group]
    total = zeros.index_add(0, rows.group, rows.labels)
    shares = rows.labels / total[rows.group].where(total[rows.group] > 0, 1)
    losses = shares * (largest + normalizer - rows.scores)
    return (losses * rows.is_own).sum() / (total > 0).sum().clamp(min=1)
