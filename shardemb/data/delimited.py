"""CSV and TSV: values between delimiters, one row a line."""

from __future__ import annotations

import csv as python_csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from planner.validation import nearest
from shardemb.data.declared import ARROW_BLOCK_BYTES, Column, DeclaredFormat, map_values
from shardemb.data.text_files import LineError


@dataclass(frozen=True)
class DelimitedFormat(DeclaredFormat):
    """`names` are those of all columns; None where a header line has them."""

    delimiter: str
    quote: str | None
    names: tuple[str, ...] | None
    separator: str
    null_values: tuple[str, ...]

    @property
    def has_header(self) -> bool:
        return self.names is None

    def check_header(self, header: bytes) -> None:
        names = self._names(header)
        for column in self.columns:
            if column.name not in names:
                raise LineError(1, f" has no column {column.name}{nearest(column.name, names)}")
            if names.count(column.name) > 1:
                raise LineError(1, f" has two columns {column.name}: rename one of them")

    def read(self, lines: bytes, header: bytes, columns: Sequence[Column]) -> pa.Table:
        names = self._names(header)
        # A quote that is left open at the end of the block would go unnoticed.
        guard = lines[: lines.find(b"\n") + 1] if self.quote else b""
        table = csv.read_csv(
            pa.BufferReader(lines + guard),
            csv.ReadOptions(column_names=names, block_size=ARROW_BLOCK_BYTES),
            csv.ParseOptions(
                delimiter=self.delimiter, quote_char=self.quote or False, ignore_empty_lines=False
            ),
            csv.ConvertOptions(
                include_columns=[column.name for column in columns],
                column_types={c.name: pa.string() if c.is_list else c.type for c in columns},
                null_values=list(self.null_values),
                strings_can_be_null=True,
            ),
        )
        table = table.slice(0, table.num_rows - (1 if guard else 0))
        for index, column in enumerate(columns):
            if column.is_list:
                table = table.set_column(
                    index, column.name, self._lists(table[column.name], column)
                )
        return table

    def _lists(self, texts: pa.ChunkedArray, column: Column) -> pa.ChunkedArray:
        nulls, kind = pa.array(self.null_values, pa.string()), column.type.value_type

        def convert(values: pa.Array) -> pa.Array:
            known = pc.if_else(pc.is_in(values, nulls), pa.scalar(None, pa.string()), values)
            return known.cast(kind)

        lists = (pc.split_pattern(chunk, self.separator) for chunk in texts.chunks)
        return pa.chunked_array([map_values(part, convert) for part in lists], column.type)

    def values(self, line: bytes, header: bytes) -> Mapping[str, object]:
        names = self._names(header)
        try:
            values = self._split(line.decode("utf-8", "backslashreplace"))
        except python_csv.Error as error:
            raise LineError(
                1, " has a quote that does not end on it; such rows are not read"
            ) from error
        if len(values) != len(names):
            found = f"has {len(values)} columns" if line.strip() else "is empty"
            raise LineError(
                1, f" {found}: {len(names)} are expected, separated by {self.delimiter!r}"
            )
        return dict(zip(names, values, strict=True))

    def _names(self, header: bytes) -> list[str]:
        if self.names is not None:
            return list(self.names)
        return self._split(header.decode("utf-8-sig", "backslashreplace"))

    def _split(self, line: str) -> list[str]:
        text = [line.rstrip("\r\n")]
        if self.quote is None:
            return text[0].split(self.delimiter)
        reader = python_csv.reader(
            text, delimiter=self.delimiter, quotechar=self.quote, strict=True
        )
        return next(reader, [])
