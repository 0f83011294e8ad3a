"""Parquet files to batches: each rank reads its own row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec import KeyedJaggedTensor

from planner import UserError
from shardemb.data.batch import Batch
from shardemb.data.columns import BatchSchema, Origin, Piece, convert


@dataclass(frozen=True)
class RowGroup:
    file: Path
    index: int
    first_row: int  # number within the file
    rows: int


class ParquetReader:
    """The batches of one rank, in an order that depends on `seed` and the epoch alone.

    Row groups are dealt out so that ranks have nearly the same number of rows. Every rank makes
    the same number of steps: where one has no rows left its batches are padding, so no rank
    waits for another and no row is dropped. How many rows a step has on all ranks follows from
    the files' footers, without communication.
    """

    def __init__(
        self,
        files: Sequence[Path],
        schema: BatchSchema,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.schema = schema
        self.batch_size = batch_size
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        groups = [group for file in files for group in _row_groups(file, schema)]
        if len(groups) < world_size:
            folder = files[0].parent if files else "the data"
            raise UserError(
                f"{folder} has {len(groups)} row groups with rows for {world_size} ranks: each "
                "rank reads whole row groups. Write the data with smaller row groups "
                f"(--row-group-rows), or use at most {max(len(groups), 1)} ranks"
            )
        self._shares = _deal(groups, world_size)
        self._rows = np.array([sum(group.rows for group in share) for share in self._shares])

    @property
    def steps_per_epoch(self) -> int:
        return int(-(-self._rows.max() // self.batch_size))

    @property
    def rows_per_epoch(self) -> int:
        """Rows of data in an epoch, over all ranks."""
        return int(self._rows.sum())

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """`steps_per_epoch` batches."""
        generator = np.random.default_rng([self.seed, epoch, self.rank])
        rows_left = np.array(self._rows)
        pieces = self._pieces(generator)
        for _ in range(self.steps_per_epoch):
            global_rows = int(np.minimum(rows_left, self.batch_size).sum())
            rows_left = np.maximum(rows_left - self.batch_size, 0)
            yield self._batch(next(pieces, []), global_rows)

    def _pieces(self, generator: np.random.Generator) -> Iterator[list[Piece]]:
        """Pieces that add up to `batch_size` rows, the last time to what is left."""
        share = list(self._shares[self.rank])
        if self.shuffle:
            generator.shuffle(share)
        gathered: list[Piece] = []
        missing = self.batch_size
        for group in share:
            rest = self._read(group, generator)
            while len(rest):
                taken = rest.slice(0, min(missing, len(rest)))
                rest = rest.slice(len(taken), len(rest))
                gathered.append(taken)
                missing -= len(taken)
                if missing == 0:
                    yield gathered
                    gathered, missing = [], self.batch_size
        if gathered:
            yield gathered

    def _read(self, group: RowGroup, generator: np.random.Generator) -> Piece:
        try:
            with pq.ParquetFile(group.file) as file:
                table = file.read_row_group(group.index, columns=self.schema.columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{group.file}, row group {group.index}: cannot be read ({_first_line(error)}); "
                "the file is damaged: write it again"
            ) from error
        order = np.arange(group.rows)
        if self.shuffle:
            generator.shuffle(order)
            table = table.take(order)
        return convert(table, self.schema, Origin(str(group.file), group.first_row + order))

    def _batch(self, pieces: list[Piece], global_rows: int) -> Batch:
        size = self.batch_size
        rows = sum(len(piece) for piece in pieces)
        dense = np.zeros((size, len(self.schema.dense)), np.float32)
        labels = np.zeros(size, np.float32)
        mask = np.zeros(size, np.float32)
        if pieces:
            np.concatenate([piece.dense for piece in pieces], out=dense[:rows])
            np.concatenate([piece.labels for piece in pieces], out=labels[:rows])
        mask[:rows] = 1
        return Batch(
            dense=torch.from_numpy(dense),
            sparse=self._jagged(pieces),
            labels=torch.from_numpy(labels),
            mask=torch.from_numpy(mask),
            global_rows=global_rows,
        )

    def _jagged(self, pieces: list[Piece]) -> KeyedJaggedTensor:
        features = self.schema.features
        lengths = np.zeros((len(features), self.batch_size), np.int64)
        ids: list[np.ndarray] = [np.zeros(0, np.int64)]
        weights: list[np.ndarray] = [np.zeros(0, np.float32)]
        for f in range(len(features)):
            start = 0
            for piece in pieces:
                bags = piece.bags[f]
                lengths[f, start : start + len(piece)] = np.diff(bags.offsets)
                start += len(piece)
                ids.append(bags.ids)
                if bags.weights is not None:
                    weights.append(bags.weights)
        return KeyedJaggedTensor(
            keys=[feature.name for feature in features],
            values=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            weights=torch.from_numpy(np.concatenate(weights)) if self.schema.is_weighted else None,
        )


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files below `folder`, in order of name."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: data.dir must hold train/ and test/ folders of Parquet "
            "files, as `shardemb data convert` writes them"
        )
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no .parquet file")
    return files


def _row_groups(path: Path, schema: BatchSchema) -> list[RowGroup]:
    """The groups that have rows. UserError where the file is damaged or lacks a column."""
    try:
        with pq.ParquetFile(path) as file:
            metadata, arrow_schema = file.metadata, file.schema_arrow
    except OSError as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}") from error
    except pa.ArrowException as error:
        raise UserError(
            f"{path} is not a whole Parquet file ({_first_line(error)}): write it again"
        ) from error
    _check_columns(path, arrow_schema, schema)
    groups, first_row = [], 0
    for index in range(metadata.num_row_groups):
        rows = metadata.row_group(index).num_rows
        if rows:
            groups.append(RowGroup(path, index, first_row, rows))
        first_row += rows
    return groups


def _check_columns(path: Path, found: pa.Schema, schema: BatchSchema) -> None:
    for name in schema.columns:
        if name not in found.names:
            raise UserError(
                f"{path} has no column {name}, which the config uses; "
                f"it has {', '.join(found.names[:50])}"
            )
    for name in (schema.label, *schema.dense):
        kind = found.field(name).type
        if not (
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        ):
            raise UserError(f"{path}, column {name}: a number is needed, found {kind}")
    for feature in schema.features:
        kind = found.field(feature.column).type
        value = kind.value_type if pa.types.is_nested(kind) and kind.num_fields == 1 else kind
        text = pa.types.is_string(value) or pa.types.is_large_string(value)
        if not (pa.types.is_integer(value) or (text and feature.ids == "hash")):
            remedy = f"; set data.features.{feature.name}.ids: hash" if text else ""
            raise UserError(
                f"{path}, column {feature.column}: feature {feature.name} needs integer ids "
                f"or lists of them, found {kind}{remedy}"
            )


def _deal(groups: list[RowGroup], world_size: int) -> list[list[RowGroup]]:
    """Largest first to the rank with the fewest rows; each rank's share in file order."""
    shares: list[list[RowGroup]] = [[] for _ in range(world_size)]
    rows = [0] * world_size
    for group in sorted(groups, key=lambda g: -g.rows):
        rank = rows.index(min(rows))
        shares[rank].append(group)
        rows[rank] += group.rows
    return [sorted(share, key=lambda g: (g.file, g.index)) for share in shares]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
