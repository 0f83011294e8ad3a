"""What a model is given: one rank's rows of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Batch(Pipelineable):
    """`batch_size` rows, the last of them padding where the data ended.

    Padding rows have no ids, zero dense features and zero `mask`: they have no part in loss or
    metrics. All ranks have batches of one size, because TorchRec's row-wise sharding needs that.
    """

    dense: torch.Tensor  # [batch_size, number of dense features] float32
    sparse: KeyedJaggedTensor  # one key for each feature; weights where a feature has them
    labels: torch.Tensor  # [batch_size] float32; [batch_size, columns] where there are several
    mask: torch.Tensor  # [batch_size] float32, 1 for a row of data and 0 for padding
    global_rows: int  # rows of data in this step over all ranks
    groups: torch.Tensor | None = None  # [batch_size] int64: equal in rows of one group

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """One copy where all tensors lie together in memory, as those of `ParquetReader` do on a
        machine with a GPU."""
        return self._moved(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._moved(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for tensor in (self.dense, self.labels, self.mask, self.groups):
            if tensor is not None:
                tensor.record_stream(stream)
        self.sparse.record_stream(stream)

    def _moved(self, move: Move) -> Batch:
        sparse = self.sparse
        tensors = [self.dense, self.labels, self.mask, sparse.values(), sparse.lengths()]
        optional = [sparse.weights_or_none(), self.groups]
        moved = iter(_move_together([t for t in (*tensors, *optional) if t is not None], move))
        dense, labels, mask, values, lengths = (next(moved) for _ in tensors)
        weights, groups = (None if tensor is None else next(moved) for tensor in optional)
        jagged = KeyedJaggedTensor(
            keys=sparse.keys(),
            values=values,
            lengths=lengths,
            weights=weights,
            stride=sparse.stride(),
        )
        return Batch(dense, jagged, labels, mask, self.global_rows, groups)


def _move_together(tensors: list[torch.Tensor], move: Move) -> list[torch.Tensor]:
    """`tensors` moved: views of one storage with the bytes from the first to the last of them."""
    storage = tensors[0].untyped_storage()
    if any(t.untyped_storage().data_ptr() != storage.data_ptr() for t in tensors):
        return [move(tensor) for tensor in tensors]
    starts = [tensor.storage_offset() * tensor.itemsize for tensor in tensors]
    first = min(starts)
    last = max(start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True))
    whole = torch.empty(0, dtype=torch.uint8).set_(storage, first, (last - first,), (1,))
    moved = move(whole)
    return [
        moved[start - first :][: tensor.nbytes]
        .view(tensor.dtype)
        .as_strided(tensor.shape, tensor.stride())
        for start, tensor in zip(starts, tensors, strict=True)
    ]
