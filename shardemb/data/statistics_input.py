"""Which files, columns and rows statistics are of, and the stream of batches that they make."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa

from planner import RequestError, UserError
from shardemb.config import RunConfig
from shardemb.data.columns import element_type
from shardemb.data.ids import check_vocabularies, is_text
from shardemb.data.schema import BatchSchema, FeatureSchema
from shardemb.data.sources import (
    files_below,
    first_line,
    is_remote,
    matches_of,
    open_parquet,
)

# Work is cut into chunks of about so many rows, and of so many of the largest row group: a group
# that lies in two chunks is decoded for both.
CHUNK_ROWS = 1 << 18
ROW_GROUPS_IN_CHUNK = 4
_INTEGERS, _STRINGS = ("integer", "list of integer"), ("string", "list of string")
_SHOWN = 50  # names in one message
_UNREADABLE = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file that has rows."""

    file: str
    index: int
    rows: int


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a row group."""

    group: RowGroup
    start: int
    stop: int


Chunk = list[Part]
IdKind = Literal["as_is", "hash", "vocabulary"]


@dataclass(frozen=True)
class Footer:
    """What a file's footer says."""

    file: str
    schema: pa.Schema
    groups: list[RowGroup]


@dataclass(frozen=True)
class SparseFeature:
    """Where a feature's ids are and, where a config says it, which rows of its table they mean."""

    name: str
    column: str
    ids: IdKind
    schema: FeatureSchema | None = None

    @property
    def num_embeddings(self) -> int | None:
        return self.schema.num_embeddings if self.schema else None

    @property
    def null_row(self) -> int | None:
        return self.schema.null_row if self.schema else None

    @property
    def num_hashes(self) -> int:
        return self.schema.num_hashes if self.schema else 1


@dataclass(frozen=True)
class Columns:
    """What is counted; `tables` has the features of each table, `skipped` types by column."""

    sparse: tuple[SparseFeature, ...]
    dense: tuple[str, ...]
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the Parquet columns to read, each once."""
        return list(dict.fromkeys([*(feature.column for feature in self.sparse), *self.dense]))


def find_files(paths: Sequence[str | Path]) -> list[str]:
    """The Parquet files that files, folders and globs name, each once, in the order given."""
    if not paths:
        raise RequestError("name at least one Parquet file, folder of them, or glob")
    found: dict[str, str] = {}
    for file in (file for path in paths for file in _files_of(str(path))):
        found.setdefault(file if is_remote(file) else os.path.realpath(file), file)
    return list(found.values())


def _files_of(path: str) -> list[str]:
    matches = matches_of(path)
    if not matches:
        raise RequestError(f"{path}: there is no such file or folder, and no match of such a glob")
    return files_below(path, matches)


def read_footers(files: Sequence[str]) -> list[Footer]:
    """Of the files that have rows; UserError where none has, or one is no Parquet file."""
    footers = [footer for footer in map(_read_footer, files) if footer.groups]
    if not footers:
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise UserError(f"{files[0]}{others}: there are no rows to count")
    return footers


def _read_footer(path: str) -> Footer:
    try:
        with open_parquet(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    except _UNREADABLE as error:
        raise UserError(
            f"{path} is not a whole Parquet file ({first_line(error)}): write it again"
        ) from error
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has two columns {twice[0]}: rename one of them")
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    groups = [RowGroup(path, index, count) for index, count in enumerate(rows) if count]
    return Footer(path, schema, groups)


def columns_of_config(config: RunConfig, footers: Sequence[Footer]) -> Columns:
    """What a run of `config` reads; UserError where the files do not have it."""
    schema = BatchSchema.from_config(config)
    check_vocabularies(schema)
    sparse = tuple(SparseFeature(f.name, f.column, f.ids, f) for f in schema.features)
    for footer in footers:
        for name in schema.dense:
            _check_kind(footer, name, ("integer", "number"), "a dense feature needs numbers")
        for feature in sparse:
            _check_kind(footer, feature.column, *_needs(feature))
    _check_alike(footers, [feature.column for feature in sparse])
    tables = {table.name: table.feature_names for table in config.table_specs()}
    return Columns(sparse, schema.dense, tables)


def columns_of_files(footers: Sequence[Footer]) -> Columns:
    """Integers, strings and lists of them are sparse features, other numbers are dense."""
    _check_alike(footers, list(dict.fromkeys(n for f in footers for n in f.schema.names)))
    types = {column.name: column.type for column in footers[0].schema}
    kinds = {name: _kind(type_) for name, type_ in types.items()}
    columns = Columns(
        sparse=tuple(
            SparseFeature(name, name, "as_is" if "integer" in kind else "hash")
            for name, kind in kinds.items()
            if kind in (*_INTEGERS, *_STRINGS)
        ),
        dense=tuple(name for name, kind in kinds.items() if kind == "number"),
        skipped={name: str(types[name]) for name, kind in kinds.items() if kind == "other"},
    )
    if not columns.names:
        raise UserError(
            f"{footers[0].file} has no column of numbers, strings or lists of ids: it has "
            + ", ".join(f"{name} ({kind})" for name, kind in columns.skipped.items())
        )
    return columns


def _kind(column: pa.DataType) -> str:
    """What a column is to a model: `integer`, `string`, lists of these, `number` or `other`."""
    value = element_type(column)
    prefix = "" if value is column else "list of "
    if pa.types.is_integer(value):
        return f"{prefix}integer"
    if is_text(value):
        return f"{prefix}string"
    is_number = pa.types.is_floating(value) or pa.types.is_boolean(value)
    return "number" if is_number and not prefix else "other"


def _needs(feature: SparseFeature) -> tuple[tuple[str, ...], str]:
    """The kinds that the feature's column may be of, in words too."""
    if feature.ids != "as_is":
        need = f"feature {feature.name} needs integers, strings or lists of them"
        return (*_INTEGERS, *_STRINGS), need
    remedy = f"set data.features.{feature.name}.ids: hash for strings"
    return _INTEGERS, f"feature {feature.name} needs integer ids or lists of them ({remedy})"


def _check_kind(footer: Footer, column: str, kinds: Sequence[str], need: str) -> None:
    if column not in footer.schema.names:
        names = ", ".join(footer.schema.names[:_SHOWN])
        raise UserError(
            f"{footer.file} has no column {column}, which the config uses; it has {names}"
        )
    found = footer.schema.field(column).type
    if _kind(found) not in kinds:
        raise UserError(f"{footer.file}, column {column}: {need}, found {found}")


def _check_alike(footers: Sequence[Footer], columns: Sequence[str]) -> None:
    """The columns are in all files and mean the same in them."""
    first = footers[0]
    for footer, name in ((footer, name) for footer in footers for name in columns):
        if name not in footer.schema.names:
            raise UserError(
                f"{footer.file} has no column {name}, which other files have: all need the same "
                "columns; choose some with --config, or count the files separately"
            )
        found, wanted = footer.schema.field(name).type, first.schema.field(name).type
        if _kind(found) != _kind(wanted):
            raise UserError(
                f"{footer.file}, column {name}: the type is {found}, in {first.file} it is "
                f"{wanted}; write the column with one type, or count the files separately"
            )


def cut_into_chunks(
    groups: Sequence[RowGroup], batch_size: int, max_rows: int | None = None
) -> list[Chunk]:
    """The first `max_rows` rows in order, cut where batches end."""
    largest = max(group.rows for group in groups)
    rows = batch_size * -(-max(CHUNK_ROWS, ROW_GROUPS_IN_CHUNK * largest) // batch_size)
    total = sum(group.rows for group in groups)
    total = total if max_rows is None else min(total, max_rows)
    chunks: list[Chunk] = [[] for _ in range(-(-total // rows))]
    first = 0  # the number of the group's first row among all rows
    for group in groups:
        start, end = 0, min(group.rows, total - first)
        while start < end:
            chunk = (first + start) // rows
            stop = min(end, (chunk + 1) * rows - first)
            chunks[chunk].append(Part(group, start, stop))
            start = stop
        first += group.rows
    return chunks


def read_batches(
    chunk: Chunk, columns: Sequence[str], batch_size: int
) -> Iterator[list[pa.RecordBatch]]:
    """The rows of a chunk by `batch_size`, the last batch shorter; a batch is in pieces."""
    batch: list[pa.RecordBatch] = []
    room = batch_size
    for part in chunk:
        for rest in _read(part, columns, batch_size):
            while rest.num_rows:
                batch.append(rest.slice(0, room))
                rest = rest.slice(batch[-1].num_rows)
                room -= batch[-1].num_rows
                if not room:
                    yield batch
                    batch, room = [], batch_size
    if batch:
        yield batch


def _read(part: Part, columns: Sequence[str], batch_size: int) -> Iterator[pa.RecordBatch]:
    group, row = part.group, 0
    try:
        with open_parquet(group.file, page_checksum_verification=True) as file:
            pieces = file.iter_batches(batch_size, row_groups=[group.index], columns=columns)
            for piece in pieces:
                start, stop = max(part.start - row, 0), min(part.stop - row, piece.num_rows)
                row += piece.num_rows
                if stop > start:
                    yield piece.slice(start, stop - start)
                if row >= part.stop:
                    return
        raise pa.ArrowInvalid(f"it has {row} rows instead of {group.rows}")
    except _UNREADABLE as error:
        raise UserError(
            f"{group.file}, row group {group.index}{_damaged_column(group, columns)}: cannot be "
            f"read ({first_line(error)}); the file is damaged: write it again"
        ) from error


def _damaged_column(group: RowGroup, columns: Sequence[str]) -> str:
    """The first column that cannot be read by itself, for a message."""
    for name in columns:
        try:
            with open_parquet(group.file, page_checksum_verification=True) as file:
                file.read_row_group(group.index, columns=[name])
        except _UNREADABLE:
            return f", column {name}"
    return ""
