"""JSON lines: one object a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError, loads

import pyarrow as pa
from pyarrow import json

from shardemb.data.declared import ARROW_BLOCK_BYTES, Column, DeclaredFormat
from shardemb.data.text_files import LineError


@dataclass(frozen=True)
class JsonLinesFormat(DeclaredFormat):
    """A key that a line lacks is a null."""

    @property
    def has_header(self) -> bool:
        return False

    def check_header(self, header: bytes) -> None:
        pass

    def read(self, lines: bytes, header: bytes, columns: Sequence[Column]) -> pa.Table:
        lines.decode()  # Arrow takes any bytes for text
        schema = pa.schema([(column.name, column.type) for column in columns])
        return json.read_json(
            pa.BufferReader(lines),
            json.ReadOptions(block_size=ARROW_BLOCK_BYTES),
            json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        ).select(schema.names)

    def values(self, line: bytes, header: bytes) -> Mapping[str, object]:
        try:
            values = loads(line.rstrip(b"\n"))
        except UnicodeDecodeError as error:
            raise LineError(
                1, f", byte {error.start + 1}: not UTF-8; convert the file to it"
            ) from error
        except JSONDecodeError as error:
            raise LineError(1, f", column {error.colno}: not valid JSON: {error.msg}") from error
        if not isinstance(values, dict):
            raise LineError(1, f" is {line[:60].decode(errors='replace').strip()}, not an object")
        return values
