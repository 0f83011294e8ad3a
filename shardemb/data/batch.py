"""What a model is given: one rank's rows of one step."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """`batch_size` rows, the last of them padding where the data ended.

    Padding rows have no ids, zero dense features and zero `mask`: they have no part in loss or
    metrics. All ranks have batches of one size, because TorchRec's row-wise sharding needs that.
    """

    dense: torch.Tensor  # [batch_size, number of dense features] float32
    sparse: KeyedJaggedTensor  # one key for each feature; weights where a feature has them
    labels: torch.Tensor  # [batch_size] float32
    mask: torch.Tensor  # [batch_size] float32, 1 for a row of data and 0 for padding
    global_rows: int  # rows of data in this step over all ranks

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        moved = {
            field.name: getattr(self, field.name).to(device=device, non_blocking=non_blocking)
            for field in fields(self)
            if field.name != "global_rows"
        }
        return Batch(**moved, global_rows=self.global_rows)

    def pin_memory(self) -> Batch:
        return Batch(
            dense=self.dense.pin_memory(),
            sparse=self.sparse.pin_memory(),
            labels=self.labels.pin_memory(),
            mask=self.mask.pin_memory(),
            global_rows=self.global_rows,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.dense, self.labels, self.mask):
            tensor.record_stream(stream)
        self.sparse.record_stream(stream)
