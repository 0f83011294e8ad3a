"""What learned costs are told of shards, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from planner.cost.features import (
    DREAMSHARD_FEATURES,
    FEATURES,
    ShardWork,
    dreamshard_features,
    sum_by,
    whole_tables,
)
from planner.shards import TYPE_CODE, ShardColumns, TableColumns
from planner.tables import REUSE_BINS, TableSpec
from planner.topology import Topology

TABLE = TableSpec(name="t", num_embeddings=1000, embedding_dim=32, pooling_factor=5, dtype="fp16")
RANKS, BATCH_SIZE = 4, 100


def _shards(table: TableSpec, sharding_type: str, rows: int) -> ShardColumns:
    whole = whole_tables(TableColumns.of([table]))
    kind = np.array([TYPE_CODE[sharding_type]])
    return ShardColumns(
        whole.tables, whole.table, kind, whole.compute_kernel, np.array([rows]), whole.columns,
        whole.cache_load_factor,
    )  # fmt: skip


def _feature(work: ShardWork, name: str) -> float:
    return float(np.exp(work.features[0, FEATURES.index(name)]))


@pytest.mark.parametrize(
    ("sharding_type", "rows", "bags", "lookups"),
    [
        ("table_wise", 1000, 400, 2000),
        ("row_wise", 250, 400, 500),
        ("data_parallel", 1000, 100, 500),
    ],
)
def test_a_shard_looks_up_what_its_type_brings_it(
    sharding_type: str, rows: int, bags: int, lookups: int
) -> None:
    """A whole table the rows of all ranks, a row shard its part of their ids, a replica its own."""
    topology = Topology(world_size=RANKS, local_world_size=RANKS)
    work = ShardWork.of(_shards(TABLE, sharding_type, rows), topology, BATCH_SIZE)
    assert _feature(work, "bags") == pytest.approx(bags)
    assert _feature(work, "lookups") == pytest.approx(lookups)
    assert _feature(work, "gathered_bytes") == pytest.approx(lookups * (32 * 2 + 8))
    assert _feature(work, "output_bytes") == pytest.approx(bags * 32 * 4)


def test_unique_rows_follow_the_reuse() -> None:
    """A table whose lookups all go to hot rows has far fewer different ones than uniform draws."""
    hot = TABLE.model_copy(
        update={"num_embeddings": 10**6, "reuse_histogram": (0.0,) * 10 + (1.0,) + (0.0,) * 6}
    )
    cold = hot.model_copy(update={"reuse_histogram": None})
    unique = [_feature(ShardWork.of_tables([t], 65_536), "unique_rows") for t in (hot, cold)]
    assert unique[0] < 65_536 * 5 / 512 and unique[1] > 200_000


def test_sums_can_be_changed_shard_by_shard() -> None:
    """Moving a shard takes its part from one sum to the other: nothing else changes."""
    values = np.random.default_rng(0).uniform(size=(6, 3))
    before = sum_by(values, np.array([0, 0, 1, 1, 1, 2]), 4)
    after = sum_by(values, np.array([0, 0, 1, 3, 1, 2]), 4)
    moved = before.copy()
    moved[1] -= values[3]
    moved[3] += values[3]
    assert after == pytest.approx(moved)


def test_dreamshards_features_are_the_published_ones() -> None:
    """21 of them: rows, pooling and size z-scored over the task, bins as shares of unique ids."""
    half = tuple(0.5 if i in (0, 2) else 0.0 for i in range(REUSE_BINS))
    tables = [
        TABLE.model_copy(update={"num_embeddings": n, "pooling_factor": p, "reuse_histogram": half})
        for n, p in ((10, 1.0), (20, 2.0), (90, 9.0))
    ]
    found = dreamshard_features(whole_tables(TableColumns.of(tables)))
    assert found.shape == (3, DREAMSHARD_FEATURES) == (3, 21)
    assert found[:, 0] == pytest.approx([32, 32, 32])
    assert found[:, 1:4].mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert found[:, 1:4].std(axis=0) == pytest.approx(1)
    bins = found[0, 4:]
    assert bins.sum() == pytest.approx(1)
    # Rows looked up 3 or 4 times are as many lookups' worth, so 2 / (1/3 + 1/4) times fewer.
    assert bins[0] / bins[2] == pytest.approx(2 / (1 / 3 + 1 / 4))
