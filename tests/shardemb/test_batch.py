"""Batches go to a device by one copy where their tensors lie together."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import KeyedJaggedTensor

from shardemb.data.assembly import Assembler
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema, FeatureSchema


def _tensors(batch: Batch) -> list[torch.Tensor]:
    sparse = batch.sparse
    parts = [batch.dense, batch.labels, batch.mask, sparse.values(), sparse.lengths()]
    weights = sparse.weights_or_none()
    return parts if weights is None else [*parts, weights]


def _together(weighted: bool) -> Batch:
    """Tensors that are views of one buffer, at odd places, the dense ones transposed."""
    buffer = torch.zeros(4096, dtype=torch.uint8)

    def place(start: int, values: torch.Tensor) -> torch.Tensor:
        view = buffer[start : start + values.nbytes].view(values.dtype).view(values.shape)
        view.copy_(values)
        return view

    return Batch(
        dense=place(128, torch.randn(3, 4)).T,
        sparse=KeyedJaggedTensor(
            keys=["a", "b"],
            values=place(1024, torch.arange(11)),
            lengths=place(512, torch.tensor([1, 0, 2, 3, 1, 1, 1, 2])),
            weights=place(2048, torch.rand(11)) if weighted else None,
        ),
        labels=place(640, torch.rand(4)),
        mask=place(704, torch.tensor([1.0, 1, 1, 0])),
        global_rows=7,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_tensors_that_lie_together_are_moved_by_one_copy(weighted: bool) -> None:
    """One move; values, strides and keys are as before, and nothing is shared with the old."""
    batch, moves = _together(weighted), []

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moves.append(tensor.nbytes)
        return tensor.clone()

    moved = batch._moved(move)
    assert len(moves) == 1
    assert moves[0] < 4096
    for old, new in zip(_tensors(batch), _tensors(moved), strict=True):
        assert torch.equal(old, new)
        assert (old.dtype, old.stride()) == (new.dtype, new.stride())
        assert old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
    assert (moved.sparse.keys(), moved.sparse.stride(), moved.global_rows) == (["a", "b"], 4, 7)
    assert moved.sparse["b"].to_dense()[1].tolist() == batch.sparse["b"].to_dense()[1].tolist()


def test_tensors_that_lie_apart_are_moved_one_by_one() -> None:
    batch, moves = _together(weighted=False), []
    batch.labels = batch.labels.clone()
    moved = batch._moved(lambda tensor: moves.append(1) or tensor.clone())
    assert len(moves) == 5
    assert all(map(torch.equal, _tensors(batch), _tensors(moved)))


@pytest.mark.parametrize("lists", ["even", "uneven"])
def test_batches_for_a_gpu_lie_together(
    lists: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full and padded ones; they equal those for a CPU. Only the page lock is left out here, which
    needs a GPU."""
    bags = [[n, n + 1] if lists == "even" else [n] * (n % 3) for n in range(50)]
    columns = {"label": [0, 1] * 25, "I": [1.5, None] * 25, "C": bags, "D": range(50)}
    pq.write_table(pa.table(columns), tmp_path / "f.parquet", row_group_size=10)
    features = (FeatureSchema("C", "C", 100, "C"), FeatureSchema("D", "D", 100, "D"))
    schema = BatchSchema("label", ("I",), features=features)
    reader = ParquetReader(tmp_path, schema, batch_size=8, rank=0, world_size=1)
    on_cpu = list(reader._blocks(0, None))

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        Assembler, "_memory", lambda self, size: torch.full((size,), 255, dtype=torch.uint8)
    )
    for_gpu = list(reader._blocks(0, 0))
    assert len(for_gpu) == len(on_cpu) == 7
    for plain, packed in zip(on_cpu, for_gpu, strict=True):
        moves: list[int] = []
        moved = packed._moved(lambda tensor, moves=moves: moves.append(1) or tensor.clone())
        assert len(moves) == 1
        assert all(map(torch.equal, _tensors(plain), _tensors(moved)))
