"""What Parquet footers say: which row groups there are and whether they have the columns.

Imports no torch, so that a mistake is told before workers start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from planner import UserError
from shardemb.data.columns import element_type
from shardemb.data.ids import is_text, load_vocabulary
from shardemb.data.order import Window
from shardemb.data.schema import BatchSchema
from shardemb.data.sources import first_line, open_parquet

# A row group is decoded whole, unless its values take more than this.
WINDOW_BYTES = 16 << 20
_THREADS = 8  # footers are read at a time


def read_windows(files: Sequence[str | Path], schema: BatchSchema) -> list[Window]:
    """The rows of the files, row group by row group; UserError where there are none."""
    with ThreadPoolExecutor(_THREADS) as pool:
        footers = list(pool.map(partial(_read_footer, schema=schema), map(str, files)))
    for footer in footers[1:]:
        _check_same_kinds(footers[0], footer, schema)
    windows: list[Window] = []
    for footer in footers:
        windows += _windows(footer, schema, len(windows))
    if not windows:
        folder = Path(files[0]).parent if files else "the data"
        raise UserError(f"{folder} has no rows")
    return windows


class _Footer(NamedTuple):
    path: str
    metadata: pq.FileMetaData
    schema: pa.Schema


def _read_footer(path: str, schema: BatchSchema) -> _Footer:
    """UserError where the file is damaged or lacks a column."""
    try:
        with open_parquet(path) as file:
            footer = _Footer(path, file.metadata, file.schema_arrow)
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    except (ValueError, pa.ArrowException) as error:  # ValueError: a name that is no text
        raise UserError(
            f"{path} is not a whole Parquet file ({first_line(error)}): write it again"
        ) from error
    _check_columns(path, footer.schema, schema)
    return footer


def _windows(footer: _Footer, schema: BatchSchema, number: int) -> Iterator[Window]:
    """The file's row groups that have rows, huge ones in pieces; `number` windows come before."""
    first_row = 0
    for group in range(footer.metadata.num_row_groups):
        metadata = footer.metadata.row_group(group)
        if group == 0:  # others are taken to be like it: to ask them all takes seconds
            bytes_of_row = _bytes_of_row(metadata, schema)
            most = max(1, int(WINDOW_BYTES / bytes_of_row))
        for start in range(0, metadata.num_rows, most):
            rows = min(most, metadata.num_rows - start)
            yield Window(
                number=number,
                file=footer.path,
                row_group=group,
                start=start,
                rows=rows,
                first_row=first_row + start,
                is_whole=rows == metadata.num_rows,
                bytes=int(rows * bytes_of_row),
            )
            number += 1
        first_row += metadata.num_rows


def _bytes_of_row(group: pq.RowGroupMetaData, schema: BatchSchema) -> float:
    """What a row takes when it is decoded, of the columns that are read."""
    columns = set(schema.columns)
    total = 0.0
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.partition(".")[0] in columns:
            is_text = column.physical_type == "BYTE_ARRAY"
            text = max(column.total_uncompressed_size, 16 * column.num_values) if is_text else 0
            total += 8 * column.num_values + text
    return max(1.0, total / max(group.num_rows, 1))


def _check_columns(path: str, found: pa.Schema, schema: BatchSchema) -> None:
    for name in schema.columns:
        if found.names.count(name) != 1:
            count = "two columns" if name in found.names else "no column"
            raise UserError(
                f"{path} has {count} {name}, which the config uses; "
                f"it has {', '.join(found.names[:50])}"
            )
    if schema.group:
        kind = found.field(schema.group).type
        if not (pa.types.is_integer(kind) or is_text(kind)):
            raise UserError(
                f"{path}, column {schema.group}: a group (data.group) is an integer or text, "
                f"found {kind}"
            )
    for name in (*(label.column for label in schema.labels), *schema.dense):
        kind = found.field(name).type
        if not (_is_float_or_integer(kind) or pa.types.is_boolean(kind)):
            raise UserError(f"{path}, column {name}: a number is needed, found {kind}")
    for feature in schema.features:
        kind = found.field(feature.column).type
        value = element_type(kind)
        if not (pa.types.is_integer(value) or (is_text(value) and feature.ids != "as_is")):
            remedy = f"; set data.features.{feature.name}.ids: hash" if is_text(value) else ""
            raise UserError(
                f"{path}, column {feature.column}: feature {feature.name} needs integer ids "
                f"or lists of them, found {kind}{remedy}"
            )
        if feature.vocabulary and load_vocabulary(feature.vocabulary).is_text != is_text(value):
            raise UserError(
                f"{path}, column {feature.column}: feature {feature.name} has values of {value}, "
                f"and its vocabulary {feature.vocabulary} has values of another kind; write both "
                "as text, or both as integers"
            )
        if feature.weights is not None:
            kind = found.field(feature.weights).type
            if not _is_float_or_integer(element_type(kind)):
                raise UserError(
                    f"{path}, column {feature.weights}: the weights of feature {feature.name} "
                    f"must be numbers or lists of them, found {kind}"
                )


def _check_same_kinds(first: _Footer, other: _Footer, schema: BatchSchema) -> None:
    """A number and a text do not hash to the same row, however alike they look."""
    for feature in schema.features:
        kinds = [
            pa.types.is_integer(element_type(footer.schema.field(feature.column).type))
            for footer in (first, other)
        ]
        if kinds[0] != kinds[1]:
            types = [footer.schema.field(feature.column).type for footer in (first, other)]
            raise UserError(
                f"{other.path}, column {feature.column}: the ids of feature {feature.name} are "
                f"{types[1]} here and {types[0]} in {first.path}; write both alike"
            )


def _is_float_or_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
