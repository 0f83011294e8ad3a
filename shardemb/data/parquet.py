"""Parquet files to batches: each rank reads its own row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor

from planner import UserError
from shardemb.data.batch import Batch
from shardemb.data.columns import (
    Bags,
    BatchSchema,
    Origin,
    Piece,
    concatenate,
    convert,
)
from shardemb.data.footers import first_line, parquet_files, read_row_groups
from shardemb.data.order import Part, RowGroup, Schedule


class ParquetReader:
    """The batches of one rank, in an order that depends on `seed` and the epoch alone.

    `data` is a folder of Parquet files, or the files; `rank` and `world_size` are those of the
    process group where they are not given.

    A rank reads its own row groups; what a step is trained on does not depend on the number of
    ranks (see `order`). Every rank makes the same number of steps: where one has no rows left its
    batches are padding, so no rank waits for another and no row is dropped. How many rows a step
    has on all ranks follows from the files' footers, without communication.
    """

    def __init__(
        self,
        data: str | Path | Sequence[Path],
        schema: BatchSchema,
        *,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        files = parquet_files(Path(data)) if isinstance(data, str | Path) else list(data)
        self.schema = schema
        self.batch_size = batch_size
        self.rank = _rank() if rank is None else rank
        world_size = _world_size() if world_size is None else world_size
        self.shuffle = shuffle
        self.seed = seed
        groups = read_row_groups(files, schema, world_size)
        self._schedule = Schedule(groups, batch_size, world_size)

    @property
    def steps_per_epoch(self) -> int:
        return self._schedule.steps

    @property
    def rows_per_epoch(self) -> int:
        """Rows of data in an epoch, over all ranks."""
        return self._schedule.num_rows

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """`steps_per_epoch` batches."""
        pieces = self._pieces(epoch)
        for step in range(self._schedule.steps):
            yield self._batch(next(pieces, None), self._schedule.rows_of_step(step))

    def _pieces(self, epoch: int) -> Iterator[Piece]:
        """This rank's rows of one step after the other, while it has any."""
        schedule = self._schedule
        groups = np.arange(len(schedule.groups))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(groups)
        lanes = [
            _Lane(
                self._read_parts(schedule.parts_of_lane(lane, groups)),
                rows_per_step=int(schedule.shares[lane]),
                generator=np.random.default_rng([self.seed, epoch, lane]) if self.shuffle else None,
            )
            for lane in schedule.lanes_of_rank(self.rank)
        ]
        while taken := [part for lane in lanes if (part := lane.take(schedule.steps_per_chunk))]:
            step_of_row = np.concatenate([steps for _, steps in taken])
            rows = concatenate([rows for rows, _ in taken])
            rows = rows.take(np.argsort(step_of_row, kind="stable"))
            ends = np.cumsum(np.bincount(step_of_row)).tolist()
            for start, stop in zip([0, *ends], ends, strict=False):
                yield rows.slice(start, stop)

    def _read_parts(self, parts: Sequence[Part]) -> Iterator[Piece]:
        for part in parts:
            yield self._read(part.group).slice(part.start, part.stop)

    def _read(self, group: RowGroup) -> Piece:
        try:
            with pq.ParquetFile(group.file, page_checksum_verification=True) as file:
                table = file.read_row_group(group.index, columns=self.schema.columns)
            if table.num_rows != group.rows:
                raise pa.ArrowInvalid(f"it has {table.num_rows} rows instead of {group.rows}")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{group.file}, row group {group.index}: cannot be read ({first_line(error)}); "
                "the file is damaged: write it again"
            ) from error
        return convert(table, self.schema, Origin(str(group.file), group.first_row))

    def _batch(self, piece: Piece | None, global_rows: int) -> Batch:
        """`piece`, padded to `batch_size` rows."""
        size, rows = self.batch_size, 0 if piece is None else len(piece)
        dense = np.zeros((size, len(self.schema.dense)), np.float32)
        labels = np.zeros(size, np.float32)
        mask = np.zeros(size, np.float32)
        if piece is not None:
            dense[:rows], labels[:rows], mask[:rows] = piece.dense, piece.labels, 1
        return Batch(
            dense=torch.from_numpy(dense),
            sparse=self._jagged(piece.bags if piece else ()),
            labels=torch.from_numpy(labels),
            mask=torch.from_numpy(mask),
            global_rows=global_rows,
        )

    def _jagged(self, bags: Sequence[Bags]) -> KeyedJaggedTensor:
        features = self.schema.features
        lengths = np.zeros((len(features), self.batch_size), np.int64)
        for row, bag in zip(lengths, bags, strict=bool(bags)):
            row[: len(bag.offsets) - 1] = bag.offsets[1:] - bag.offsets[:-1]
        ids = [bag.ids for bag in bags] or [np.zeros(0, np.int64)]
        weights = None
        if self.schema.is_weighted:
            parts = [bag.weights for bag in bags if bag.weights is not None]
            weights = torch.from_numpy(np.concatenate(parts or [np.zeros(0, np.float32)]))
        return KeyedJaggedTensor(
            keys=[feature.name for feature in features],
            values=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            weights=weights,
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _Lane:
    """The rows of a lane, taken some steps at a time, shuffled among these steps."""

    def __init__(
        self, pieces: Iterator[Piece], rows_per_step: int, generator: np.random.Generator | None
    ) -> None:
        self._pieces = pieces
        self._rows_per_step = rows_per_step
        self._generator = generator
        self._rest: Piece | None = None

    def take(self, steps: int) -> tuple[Piece, NDArray[np.int64]] | None:
        """The rows of the next `steps` steps, and the step of each; None where none are left."""
        wanted = steps * self._rows_per_step
        gathered: list[Piece] = []
        while wanted:
            piece = next(self._pieces, None) if self._rest is None else self._rest
            if piece is None:
                break
            gathered.append(piece.slice(0, min(wanted, len(piece))))
            wanted -= len(gathered[-1])
            used = len(gathered[-1])
            self._rest = piece.slice(used, len(piece)) if used < len(piece) else None
        if not gathered:
            return None
        rows = concatenate(gathered)
        step_of_row = np.arange(len(rows)) // self._rows_per_step
        if self._generator is not None:
            self._generator.shuffle(step_of_row)
        return rows, step_of_row
