"""Statistics of real data, as `shardemb data stats` writes them, put into tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ValidationError

from planner.errors import RequestError
from planner.tables import REUSE_BATCH_SIZE, TableSpec
from planner.validation import explain


class _Feature(BaseModel):
    pooling_factor: float
    reuse_histogram: tuple[float, ...] | None = None


class _Table(BaseModel):
    name: str
    reuse_histogram: tuple[float, ...] | None = None


class _TableList(BaseModel):
    tables: list[_Table]


class _Document(BaseModel):
    batch_size: int
    features: dict[str, _Feature]
    table_list: _TableList | None = None


def with_statistics(tables: Sequence[TableSpec], path: Path) -> tuple[TableSpec, ...]:
    """The tables with the pooling factors and reuse histograms that the data at hand have.

    Histograms are used where they are of batches of REUSE_BATCH_SIZE rows; a table of several
    features takes the one counted for all of them together. RequestError where the file is no
    statistics, or has none of the tables' features.
    """
    document = _read(path)
    found = [_with_statistics(table, document) for table in tables]
    if not any(found):
        raise RequestError(
            f"{path} has none of the tables' features: it has "
            f"{', '.join(list(document.features)[:20])}"
        )
    return tuple(new or table for new, table in zip(found, tables, strict=True))


def _read(path: Path) -> _Document:
    try:
        return _Document.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RequestError(f"cannot read the statistics {path}: {error.strerror}") from error
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, _Document)[:10])
        raise RequestError(
            f"{path} holds no statistics, which `shardemb data stats --out` writes:\n{lines}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from error


def _with_statistics(table: TableSpec, document: _Document) -> TableSpec | None:
    """None where there are none of its features."""
    names = table.feature_names or (table.name,)
    known = [document.features[name] for name in names if name in document.features]
    if not known:
        return None
    changed = {"pooling_factor": mean(feature.pooling_factor for feature in known)}
    histogram = known[0].reuse_histogram if len(names) == 1 else None
    if document.table_list is not None:
        histogram = next(
            (t.reuse_histogram for t in document.table_list.tables if t.name == table.name),
            histogram,
        )
    fields = table.model_dump() | changed
    if histogram is not None and document.batch_size == REUSE_BATCH_SIZE:
        fields["reuse_histogram"] = histogram
    return TableSpec.model_validate(fields)
