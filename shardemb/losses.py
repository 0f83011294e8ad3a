"""The loss that is trained: each task's, over the rows of all ranks, weighted and summed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    l1_loss,
    mse_loss,
)

from shardemb.data.batch import Batch
from shardemb.ranking_losses import bpr, listwise_softmax, rank_among_all
from shardemb.tasks import Columns, Task, columns_of, num_outputs

# Of outputs and labels [rows, columns]; none is reduced.
_Elementwise = Callable[..., torch.Tensor]
_ELEMENTWISE: dict[str, _Elementwise] = {
    "binary_cross_entropy": binary_cross_entropy_with_logits,
    "mse": mse_loss,
    "mae": l1_loss,
}
_RANKING = {"bpr": bpr, "listwise_softmax": listwise_softmax}


class Loss:
    """Of the tasks' columns of what a model gives: [batch_size, num_outputs]."""

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        self._columns = columns_of(tasks)
        self.num_outputs = num_outputs(tasks)

    def __call__(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """This rank's part of the loss: over all ranks and divided by `batch.global_rows`, it is
        the weighted sum of the tasks' losses.

        A task's loss is the mean over the rows of all ranks, padding left out; a ranking loss the
        mean over the pairs, or the groups, that these rows have.
        """
        first, *others = (_part(each, outputs, batch) for each in self._columns)
        return sum(others, first)


def _part(columns: Columns, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    task = columns.task
    outputs = outputs[:, columns.outputs].float()
    labels = batch.labels.view(len(outputs), -1)[:, columns.labels]
    scale = task.weight / len(task.labels)
    if task.is_ranking:
        rows = rank_among_all(outputs[:, 0], labels[:, 0], batch)
        return _RANKING[task.loss](rows) * (scale * batch.global_rows)
    if task.num_classes is not None:
        losses = cross_entropy(outputs, labels[:, 0].long(), reduction="none")[:, None]
    else:
        losses = _ELEMENTWISE[task.loss](outputs, labels, reduction="none")
    return (losses * batch.mask[:, None]).sum() * scale
