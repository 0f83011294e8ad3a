"""CSV, TSV and JSON-lines files with a declared schema -> a data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from planner.errors import RequestError
from shardemb.data.conversion import Conversion
from shardemb.data.convert_schema import ConvertSchema
from shardemb.data.declared import DeclaredFormat, declared_columns
from shardemb.data.delimited import DelimitedFormat
from shardemb.data.json_lines import JsonLinesFormat
from shardemb.data.splitting import TestRows
from shardemb.data.text_files import expand_sources

GenericFormat = Literal["csv", "tsv", "jsonl"]

_BLOCK_BYTES = 16 << 20
_OF_DELIMITED_TEXT = ("columns", "delimiter", "separator", "null_values")


def generic_conversion(
    kind: GenericFormat,
    sources: Iterable[str | Path],
    schema: ConvertSchema,
    *,
    test_rows: int = 0,
    test_fraction: float = 0.0,
    test_sources: Iterable[str | Path] = (),
    row_group_rows: int | None = None,
) -> Conversion:
    """The rows of `sources`, files or globs, in this order.

    The test split is the last `test_rows` of them, a `test_fraction` drawn by row number, or all
    rows of `test_sources`.
    """
    sources = list(sources)
    paths = expand_sources([*sources, *test_sources])
    train_paths = paths[: len(expand_sources(sources))]
    return Conversion(
        format=kind,
        lines=_line_format(kind, schema),
        sources=train_paths,
        label=schema.label,
        dense=tuple(schema.dense),
        sparse=tuple(schema.sparse),
        test=TestRows(test_rows, test_fraction, paths[len(train_paths) :]),
        vocabularies={name: s.vocabulary for name, s in schema.sparse.items() if s.vocabulary},
        row_group_rows=row_group_rows,
    )


def _line_format(kind: GenericFormat, schema: ConvertSchema) -> DeclaredFormat:
    columns = declared_columns(schema)
    if kind == "jsonl":
        for key in _OF_DELIMITED_TEXT:
            if key in schema.model_fields_set:
                raise RequestError(f"{key}: this is for csv and tsv; JSON lines have none")
        return JsonLinesFormat(columns, _BLOCK_BYTES)
    return DelimitedFormat(
        columns,
        _BLOCK_BYTES,
        delimiter=schema.delimiter or ("," if kind == "csv" else "\t"),
        quote='"' if kind == "csv" else None,
        names=None if schema.columns is None else tuple(schema.columns),
        separator=schema.separator,
        null_values=tuple(schema.null_values),
    )
