"""What Parquet footers say: which row groups there are and whether they have the columns.

Imports no torch, so that a mistake is told before workers start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from planner import UserError
from shardemb.data.columns import BatchSchema, element_type
from shardemb.data.order import RowGroup


def read_row_groups(files: Sequence[Path], schema: BatchSchema, world_size: int) -> list[RowGroup]:
    """The row groups that have rows; UserError where they cannot feed `world_size` ranks."""
    groups = [group for file in files for group in _row_groups(file, schema)]
    folder = files[0].parent if files else "the data"
    if not groups:
        raise UserError(f"{folder} has no rows")
    if len(groups) < world_size:
        raise UserError(
            f"{folder}: {_count(len(groups), 'row group')} for {_count(world_size, 'rank')}, but "
            "each rank reads whole row groups. Write the data with smaller row groups "
            f"(--row-group-rows), or use at most {_count(len(groups), 'rank')}"
        )
    return groups


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


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
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    except (ValueError, pa.ArrowException) as error:  # ValueError: a name that is no text
        raise UserError(
            f"{path} is not a whole Parquet file ({first_line(error)}): write it again"
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
        if found.names.count(name) != 1:
            count = "two columns" if name in found.names else "no column"
            raise UserError(
                f"{path} has {count} {name}, which the config uses; "
                f"it has {', '.join(found.names[:50])}"
            )
    for name in (schema.label, *schema.dense):
        kind = found.field(name).type
        if not (_is_float_or_integer(kind) or pa.types.is_boolean(kind)):
            raise UserError(f"{path}, column {name}: a number is needed, found {kind}")
    for feature in schema.features:
        kind = found.field(feature.column).type
        value = element_type(kind)
        text = pa.types.is_string(value) or pa.types.is_large_string(value)
        if not (pa.types.is_integer(value) or (text and feature.ids == "hash")):
            remedy = f"; set data.features.{feature.name}.ids: hash" if text else ""
            raise UserError(
                f"{path}, column {feature.column}: feature {feature.name} needs integer ids "
                f"or lists of them, found {kind}{remedy}"
            )
        if feature.weights is not None:
            kind = found.field(feature.weights).type
            if not _is_float_or_integer(element_type(kind)):
                raise UserError(
                    f"{path}, column {feature.weights}: the weights of feature {feature.name} "
                    f"must be numbers or lists of them, found {kind}"
                )


def _is_float_or_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
