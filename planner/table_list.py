"""A table list: the tables to plan for, without a run config, as a JSON or YAML file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.errors import RequestError
from planner.strict_yaml import read_yaml
from planner.tables import TableSpec
from planner.validation import explain, shorten

_SHOWN = 10  # mistakes and names in one message
_POOLINGS = re.compile(r"([0-9]+)(?:\*([0-9]+))?")
_COUNTS = ("num_embeddings", "embedding_dim", "num_features")


class TableList(BaseModel):
    """Tables and the batch they are looked up for; at most one of the batch sizes is needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size_per_rank: int | None = None
    batch_size_global: int | None = None
    tables: tuple[TableSpec, ...]


class _Document(BaseModel):
    """The top of the file; the keys of type Any say where it is from and change no plan."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tables: list[Any] = Field(min_length=1)
    batch_size_per_rank: int | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0, description="of all ranks together")
    name: Any = None
    source: Any = None
    world_size: Any = None
    reported: Any = None


def load_table_list(path: str | Path) -> TableList:
    """Read a table list.

    `pooling_factor` counts the ids of a row over all features that look the table up, as in
    TorchRec's reports; `TableSpec.pooling_factor` is the mean of one feature. `batch_sizes`, also
    from these reports, repeats what batch_size_per_rank and num_features say.

    RequestError names the file and each wrong table and key.
    """
    path = Path(path)
    try:
        document = _Document.model_validate(_read(path))
    except ValidationError as error:
        raise _refused(path, explain(error, _Document)) from error
    tables, mistakes = _tables(document)
    if mistakes:
        raise _refused(path, mistakes)
    return TableList(
        batch_size_per_rank=document.batch_size_per_rank,
        batch_size_global=document.batch_size,
        tables=tables,
    )


def _refused(path: Path, mistakes: list[str]) -> RequestError:
    lines = [f"  {mistake}" for mistake in mistakes[:_SHOWN]]
    if len(mistakes) > _SHOWN:
        lines.append(f"  ... and {len(mistakes) - _SHOWN} more")
    return RequestError("\n".join([f"{path} is not a valid table list:", *lines]))


def _read(path: Path) -> Any:
    if path.suffix.lower() != ".json":
        return read_yaml(path, "table list")
    document = _read_json(path)
    if not isinstance(document, dict):
        found = type(document).__name__
        raise RequestError(f"{path} must hold an object with the key `tables`, found a {found}")
    return document


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except OSError as error:
        raise RequestError(f"cannot read the table list {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not a text file: {error}") from error
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise RequestError(f"{path} is nested too deeply") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{twice[0]!r} is given twice")
    return mapping


def _tables(document: _Document) -> tuple[tuple[TableSpec, ...], list[str]]:
    """The tables, and what is wrong with those that are left out of them."""
    tables, mistakes = [], []
    for position, entry in enumerate(document.tables):
        try:
            tables.append(_table(entry, document.batch_size_per_rank))
        except ValidationError as error:
            where = _where(position, entry)
            mistakes += [where + line for line in explain(error, TableSpec)]
        except ValueError as error:
            mistakes.append(_where(position, entry) + str(error))
    return tuple(tables), mistakes + _repeated(table.name for table in tables)


def _where(position: int, entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    return f"table {name} (tables.{position}): " if name else f"tables.{position}: "


def _repeated(names: Iterable[str]) -> list[str]:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if not twice:
        return []
    more = f" and {len(twice) - _SHOWN} more" if len(twice) > _SHOWN else ""
    return [f"more than one table is named {', '.join(twice[:_SHOWN])}{more}: give each its own"]


def _table(entry: Any, batch_size: int | None) -> TableSpec:
    """The table of one entry; ValueError (ValidationError is one) where it is none."""
    if not isinstance(entry, dict):
        raise ValueError(f"must be the keys of one table (found {shorten(entry)})")
    if not isinstance(entry.get("feature_names", []), list):
        found = shorten(entry["feature_names"])
        raise ValueError(f"feature_names: must be a list of names (found {found})")
    fields = {key: _plain(key, value) for key, value in entry.items() if key != "batch_sizes"}
    table = TableSpec.model_validate(fields, strict=True)
    if "batch_sizes" in entry:
        _check_batch_sizes(entry["batch_sizes"], table.num_features, batch_size)
    if table.num_features == 1:
        return table
    each = table.pooling_factor / table.num_features
    return table.model_copy(update={"pooling_factor": each})


def _plain(key: str, value: Any) -> Any:
    """What a file's types cannot say: tuples, and counts written as 1e6."""
    if isinstance(value, list):
        return tuple(value)
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check_batch_sizes(text: Any, num_features: int, batch_size: int | None) -> None:
    """`2560*4`: four features, looked up for 2,560 rows each; `n/a` where it was not known."""
    if text == "n/a":
        return
    match = _POOLINGS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            "batch_sizes: write ROWS*FEATURES, for example 2560*4; a table cannot be planned for "
            f"batches of several sizes (found {shorten(text)})"
        )
    rows, features = int(match[1]), int(match[2] or 1)
    if features != num_features:
        raise ValueError(
            f"batch_sizes: {text} is of {features} features, num_features says {num_features}"
        )
    if batch_size is not None and rows != batch_size:
        raise ValueError(
            f"batch_sizes: {text} is of {rows} rows, batch_size_per_rank says {batch_size}"
        )
