"""AUC, log loss and normalized entropy over the rows of all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC

from shardemb.data.batch import Batch


@dataclass(frozen=True)
class Evaluation:
    """`samples` rows; NaN where a metric is undefined (AUC of one class)."""

    auc: float
    logloss: float
    normalized_entropy: float
    samples: int


class Evaluator:
    """Collects predictions batch by batch; `compute` is a collective."""

    def __init__(self, device: torch.device) -> None:
        self._auc = BinaryAUROC(thresholds=None).to(device)
        # Summed loss, summed labels, rows: in float64, or large data would lose its last rows.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, batch: Batch) -> None:
        """`logits` [batch_size]; padding rows are left out."""
        real = batch.mask > 0
        logits, labels = logits.detach()[real].float(), batch.labels[real]
        self._auc.update(torch.sigmoid(logits.double()), labels.int())
        loss = binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")
        self._sums += torch.stack([loss, labels.double().sum(), real.double().sum()])

    def compute(self) -> Evaluation:
        sums = self._sums.clone()
        dist.all_reduce(sums)
        loss, positives, rows = sums.tolist()
        if rows == 0:
            return Evaluation(math.nan, math.nan, math.nan, 0)
        base = positives / rows
        if base in (0.0, 1.0) or not math.isfinite(loss):
            auc, entropy = math.nan, math.nan
        else:
            auc = float(self._auc.compute())
            entropy = -(base * math.log(base) + (1 - base) * math.log1p(-base))
        return Evaluation(auc, loss / rows, loss / rows / entropy, int(rows))
