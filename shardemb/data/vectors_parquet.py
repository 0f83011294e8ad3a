"""Parquet files with a column of keys and one of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from planner import UserError
from planner.validation import nearest
from shardemb.data.ids import is_text
from shardemb.data.sources import files_below, first_line, matches_of, open_parquet
from shardemb.data.vector_blocks import BLOCK_BYTES, Block, Vectors, Wanted, row_of_file

# Which a row group is read by: it may be larger than the memory that is left beside the table.
_BUFFERED = {"pre_buffer": False, "buffer_size": 8 << 20}


class ParquetVectors:
    """A file, or all of a folder, with a column of keys and one of lists of numbers."""

    has_keys = True

    def __init__(
        self, path: str, text_keys: bool, key_column: str | None, vectors: str | None
    ) -> None:
        self.path, self._files = path, files_below(path, matches_of(path))
        try:
            with open_parquet(self._files[0], **_BUFFERED) as file:
                self._schema = file.schema_arrow
                kind = "text" if text_keys else "integers"
                fits = is_text if text_keys else pa.types.is_integer
                self._key = self._column("key_column", key_column, "id", kind, fits)
                self._vectors = self._column("vectors", vectors, None, "vectors", _is_vector)
                self.dim = self._dim(next(file.iter_batches(1, columns=[self._vectors]), None))
        except pa.ArrowInvalid as error:
            raise UserError(f"{self._files[0]} cannot be read ({first_line(error)})") from error

    @property
    def rows(self) -> int:
        rows = 0
        for path in self._files:
            with open_parquet(path) as file:
                rows += file.metadata.num_rows
        return rows

    def _column(
        self,
        option: str,
        named: str | None,
        usual: str | None,
        what: str,
        fits: Callable[[pa.DataType], bool],
    ) -> str:
        names = [field.name for field in self._schema if fits(field.type)]
        if named is not None:
            if named not in names:
                raise UserError(
                    f"{option}: {self.path} has no column {named} of {what}"
                    f"{nearest(named, names)}; it has {self._columns()}"
                )
            return named
        if usual in names:
            return str(usual)
        if len(names) != 1:
            found = f"columns {', '.join(names)}" if names else "no column"
            remedy = f"; name one with {option}" if names else f"; it has {self._columns()}"
            raise UserError(f"{self.path} has {found} of {what}{remedy}")
        return str(names[0])

    def _columns(self) -> str:
        return ", ".join(f"{field.name} ({field.type})" for field in self._schema)

    def _dim(self, first: pa.RecordBatch | None) -> int:
        if first is None or not first.num_rows or not first.column(0)[0].is_valid:
            raise UserError(f"{self.path} has no vector in its first row")
        return len(first.column(0)[0])

    def blocks(self, wanted: Wanted) -> Iterator[Block]:
        for path in self._files:
            try:
                with open_parquet(path, **_BUFFERED) as file:
                    yield from self._blocks(path, file, wanted)
            except (pa.ArrowInvalid, KeyError) as error:
                raise UserError(f"{path} cannot be read ({first_line(error)})") from error

    def _blocks(self, path: str, file: Any, wanted: Wanted) -> Iterator[Block]:
        first, size = 0, max(1, BLOCK_BYTES // (4 * self.dim))
        for group in range(file.num_row_groups):
            keys = file.read_row_group(group, [self._key])[self._key].combine_chunks()
            _no_nulls(keys, path, first, self._key)
            rows = wanted.rows(keys, row_of_file(path, first))
            if not wanted.any_of(rows):
                yield Block(rows, None, row_of_file(path, first))
            else:
                start = 0
                for batch in file.iter_batches(size, [group], [self._vectors]):
                    matrix = self._matrix(batch.column(0), path, first + start)
                    own = rows[start : start + len(matrix)]
                    yield Block(own, matrix, row_of_file(path, first + start))
                    start += len(matrix)
            first += len(keys)

    def _matrix(self, column: pa.Array, path: str, first: int) -> Vectors:
        _no_nulls(column, path, first, self._vectors)
        lengths = pc.list_value_length(column).to_numpy()
        if (lengths != self.dim).any():
            wrong = int(np.argmax(lengths != self.dim))
            raise UserError(
                f"{path}, row {first + wrong}: a vector of {lengths[wrong]}, others have {self.dim}"
            )
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, np.float32).reshape(len(column), self.dim)


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(
        (is_list or pa.types.is_fixed_size_list(kind)) and pa.types.is_floating(kind.value_type)
    )


def _no_nulls(column: pa.Array, path: str, first: int, name: str) -> None:
    if column.null_count:
        row = first + pc.index(column.is_null(), True).as_py()
        raise UserError(f"{path}, row {row}: column {name} is null")
