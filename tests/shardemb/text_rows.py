"""Rows of every kind of column, as text files, and their conversion."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardemb.data.conversion import convert
from shardemb.data.convert_schema import ConvertSchema
from shardemb.data.dataset import DatasetInfo
from shardemb.data.generic import generic_conversion
from tests.shardemb.splits import split_files

NAMES = ["click", "age", "user", "city", "tags", "genres", "strength", "ignored"]
SCHEMA: dict[str, Any] = {
    "label": "click",
    "dense": ["age"],
    "sparse": {
        "user": None,
        "city": {"kind": "string", "vocabulary": {"min_count": 2}},
        "tags": {"list": True, "vocabulary": {"max_size": 5, "oov_rows": 3}},
        "genres": {"kind": "string", "list": True, "weights": "strength"},
    },
}
ROWS = 3000


def make_rows(count: int = ROWS) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    cities = ["", "Paris", "São Paulo", "東京", 'a "b", c']
    rows = []
    for number in range(count):
        genres = [f"g{i}" for i in random.integers(9, size=random.integers(4))]
        rows.append(
            {
                "click": int(random.random() < 0.3),
                "age": None if number % 7 == 0 else float(random.integers(99)) / 2,
                "user": None if number % 11 == 0 else number * 2**40,
                "city": cities[random.integers(5)] or None,
                "tags": random.zipf(1.5, random.integers(4)).clip(max=10**9).tolist() or None,
                "genres": genres or None,
                "strength": [float(i) for i in range(len(genres))] or None,
                "ignored": "x",
            }
        )
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(str, value))
    return "" if value is None else str(value)


def write_csv(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **{"lineterminator": "\n", **options})
        writer.writerow(NAMES)
        writer.writerows([_text(row[name]) for name in NAMES] for row in rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Nulls are left out."""
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def make_schema(**changes: Any) -> ConvertSchema:
    return ConvertSchema.model_validate(SCHEMA | changes)


def without_vocabularies() -> ConvertSchema:
    sparse = SCHEMA["sparse"].items()
    plain = {name: {k: v for k, v in (f or {}).items() if k != "vocabulary"} for name, f in sparse}
    return make_schema(sparse=plain)


def convert_text(
    out: Path,
    *sources: Path,
    kind: Any = "csv",
    schema: ConvertSchema | None = None,
    **options: Any,
) -> DatasetInfo:
    driver = {k: options.pop(k) for k in ("processes", "overwrite", "on_progress") if k in options}
    made = generic_conversion(kind, sources, schema or make_schema(), **options)
    return convert(made, out, **driver)


def read_split(out: Path, split: str) -> list[dict[str, Any]]:
    return pa.concat_tables(map(pq.read_table, split_files(out, split))).to_pylist()


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def gzip_file(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))
