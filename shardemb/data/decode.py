"""Windows of Parquet files, decoded and converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq

from planner import UserError
from shardemb.data.columns import Origin, Piece, convert
from shardemb.data.order import Window
from shardemb.data.schema import BatchSchema
from shardemb.data.sources import first_line, open_parquet

OPEN_FILES = 64


class OpenFiles:
    """Files kept open: to read a footer takes as long as to decode a row group."""

    def __init__(self) -> None:
        self._files: dict[str, pq.ParquetFile] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
        self._files.clear()

    def __getitem__(self, path: str) -> pq.ParquetFile:
        file = self._files.pop(path, None)
        if file is None or file.closed:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = open_parquet(path, page_checksum_verification=True)
        self._files[path] = file
        return file


class Decoder:
    """Reads windows; those of one huge row group quickly if one after the other."""

    def __init__(
        self,
        schema: BatchSchema,
        files: OpenFiles,
        on_damage: Callable[[Window, UserError], None] | None = None,
    ) -> None:
        """`on_damage` is told of windows that cannot be read, which are left out then."""
        self._schema, self._files, self._on_damage = schema, files, on_damage
        self._stream: _Stream | None = None

    def read(self, window: Window) -> Piece | None:
        """None where the file is damaged and that is no error; UserError where it is one, or a
        value is wrong."""
        try:
            table = self._table(window)
            if table.num_rows != window.rows:
                raise pa.ArrowInvalid(f"it has {table.num_rows} rows instead of {window.rows}")
        except (OSError, ValueError, StopIteration, pa.ArrowException) as error:
            self._stream = None
            damage = UserError(
                f"{window.file}, row group {window.row_group}: cannot be read "
                f"({first_line(error)}); the file is damaged: write it again"
            )
            if self._on_damage is None:
                raise damage from error
            self._on_damage(window, damage)
            return None
        return convert(table, self._schema, Origin(window.file, window.first_row))

    def _table(self, window: Window) -> pa.Table:
        columns = self._schema.columns
        if window.is_whole:
            return self._files[window.file].read_row_group(
                window.row_group, columns=columns, use_threads=pa.cpu_count() > 1
            )
        if self._stream is None or not self._stream.comes_to(window):
            self._stream = _Stream(window, columns)
        return self._stream.read(window)


class _Stream:
    """A row group that is too large to be decoded at once, from its start."""

    def __init__(self, window: Window, columns: list[str]) -> None:
        self._group = window.file, window.row_group
        self._position = 0
        self._file = open_parquet(window.file, page_checksum_verification=True)
        self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            window.rows, row_groups=[window.row_group], columns=columns
        )
        self._rest: pa.RecordBatch | None = None

    def comes_to(self, window: Window) -> bool:
        is_its = self._group == (window.file, window.row_group)
        return is_its and self._position <= window.start

    def read(self, window: Window) -> pa.Table:
        while self._position < window.start:
            self._take(window.start - self._position)
        batches, stop = [], window.start + window.rows
        while self._position < stop:
            batches.append(self._take(stop - self._position))
        return pa.Table.from_batches(batches)

    def _take(self, most: int) -> pa.RecordBatch:
        batch = next(self._batches) if self._rest is None else self._rest
        self._rest = batch.slice(most) if batch.num_rows > most else None
        batch = batch.slice(0, most)
        self._position += batch.num_rows
        return batch
