"""Statistics of data, put into tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.data_stats import with_statistics
from planner.errors import RequestError
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS, TableSpec

from .commands import MALFORMED, Bench

ONCE = (1.0,) + (0.0,) * (REUSE_BINS - 1)
HOT = (0.0,) * (REUSE_BINS - 1) + (1.0,)


def _stats(path: Path, features: dict[str, Any], **fields: Any) -> Path:
    document = {"version": 1, "batch_size": REUSE_BATCH_SIZE, "features": features, **fields}
    path.write_text(json.dumps(document))
    return path


def _table(name: str, **fields: Any) -> TableSpec:
    return TableSpec(name=name, num_embeddings=1000, embedding_dim=8, **fields)


def test_pooling_and_reuse_are_those_of_the_features(tmp_path: Path) -> None:
    """By hand: one feature of the table's name, two features, none; other fields stay."""
    path = _stats(
        tmp_path / "stats.json",
        {
            "a": {"pooling_factor": 2.5, "reuse_histogram": ONCE, "rows": 7},
            "b": {"pooling_factor": 4.0, "reuse_histogram": HOT},
            "c": {"pooling_factor": 2.0, "reuse_histogram": None},
        },
        table_list={"tables": [{"name": "bc", "reuse_histogram": HOT}]},
    )
    tables = [
        _table("a", dtype="fp16"),
        _table("bc", feature_names=("b", "c")),
        _table("other", pooling_factor=9.0),
    ]
    a, both, other = with_statistics(tables, path)
    assert a == _table("a", dtype="fp16", pooling_factor=2.5, reuse_histogram=ONCE)
    assert both.pooling_factor == 3.0 and both.reuse_histogram == HOT
    assert other == tables[2]


def test_histograms_of_other_batches_are_not_taken(tmp_path: Path) -> None:
    """They mean other shares; pooling factors hold for any batch."""
    features = {"a": {"pooling_factor": 2.0, "reuse_histogram": ONCE}}
    path = _stats(tmp_path / "stats.json", features, batch_size=100)
    (table,) = with_statistics([_table("a")], path)
    assert table.pooling_factor == 2.0 and table.reuse_histogram is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the statistics .*stats.json: No such file"),
        ("{", "is not valid JSON"),
        ("{}", "holds no statistics.*\\n  batch_size: required"),
        ('{"batch_size": 1, "features": {"x": {"pooling_factor": 1}}}', "has none .* it has x"),
    ],
)
def test_what_is_no_statistics(tmp_path: Path, content: str | None, message: str) -> None:
    """Each names the file, and what it was."""
    path = tmp_path / "stats.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=message):
        with_statistics([_table("a")], path)


def test_the_option(bench: Bench) -> None:
    """`plan --data-stats` plans for what was found: more ids cost more."""
    name = json.loads(Path("tables.json").read_text())["tables"][0]["name"]
    path = _stats(Path("stats.json"), {name: {"pooling_factor": 500.0}})
    on_four = ("tables.json", "--topology", "1x4xA100-80GB")
    plain, told = bench.made(*on_four), bench.made(*on_four, "--data-stats", str(path))
    assert told["predicted"]["bound_ms"] > plain["predicted"]["bound_ms"]
    ended = bench.plan(*on_four, "--data-stats", "absent.json")
    assert ended.code == MALFORMED and "absent.json" in ended.err
