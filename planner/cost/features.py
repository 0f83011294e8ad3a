"""What learned cost models are told of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.reuse import MEAN_COUNTS, unique_rows
from planner.shards import (
    KERNEL_CODE,
    OPTIMIZERS,
    TYPE_CODE,
    Floats,
    Ints,
    ShardColumns,
    TableColumns,
)
from planner.storage import ID_BYTES, OPTIMIZER_STATE, OUTPUT_BYTES, STATE_BYTES
from planner.tables import REUSE_BINS, TableSpec
from planner.topology import Topology

FEATURES = (
    "rows",
    "columns",
    "bags",
    "lookups",
    "unique_rows",
    "element_bytes",
    "row_state_bytes",
    "element_state_bytes",
    "gathered_bytes",
    "output_bytes",
    "updated_bytes",
    "table_bytes",
)
DREAMSHARD_FEATURES = 4 + REUSE_BINS
_BYTES_A_GB = 1024**3


@dataclass(frozen=True)
class ShardWork:
    """What each shard does in a step; [shards] each."""

    rows: Floats
    columns: Floats
    bags: Floats
    lookups: Floats
    unique: Floats
    element_bytes: Floats
    row_state_bytes: Floats
    element_state_bytes: Floats

    @classmethod
    def of(cls, shards: ShardColumns, topology: Topology, batch_size: int) -> ShardWork:
        """Of `batch_size` rows a rank; a replicated table is looked up for those of its rank."""
        tables, table = shards.tables, shards.table
        replicated = shards.sharding_type == TYPE_CODE["data_parallel"]
        every = _unique_and_lookups(tables, batch_size * topology.world_size)
        local = _unique_and_lookups(tables, batch_size)
        unique, lookups = np.where(replicated, local[:, table], every[:, table])
        share = shards.rows / tables.num_embeddings[table]
        ranks = np.where(replicated, 1, topology.world_size)
        states = np.array([OPTIMIZER_STATE[name] for name in OPTIMIZERS], dtype=np.float64)
        per_row, per_element = states[shards.of_table("optimizer")].T * STATE_BYTES
        return cls(
            rows=shards.rows.astype(np.float64),
            columns=shards.columns.astype(np.float64),
            bags=shards.of_table("num_features") * float(batch_size) * ranks,
            lookups=lookups * share,
            unique=unique * share,
            element_bytes=shards.of_table("element_bytes").astype(np.float64),
            row_state_bytes=per_row,
            element_state_bytes=per_element,
        )

    @classmethod
    def of_tables(cls, tables: Sequence[TableSpec], batch_size: int) -> ShardWork:
        """Of whole tables on one device that looks up `batch_size` rows."""
        alone = Topology(world_size=1, local_world_size=1)
        return cls.of(whole_tables(TableColumns.of(tables)), alone, batch_size)

    @property
    def features(self) -> Floats:
        """[shards, FEATURES]: logarithms, so that a network that is linear in them is a power law,
        which goes on beyond what was measured. Zeros are counted as ones."""
        row_bytes = self.columns * self.element_bytes
        state_bytes = self.row_state_bytes + self.columns * self.element_state_bytes
        columns = [
            self.rows,
            self.columns,
            self.bags,
            self.lookups,
            self.unique,
            self.element_bytes,
            1 + self.row_state_bytes,
            1 + self.element_state_bytes,
            self.lookups * (row_bytes + ID_BYTES),
            self.bags * self.columns * OUTPUT_BYTES,
            self.unique * (row_bytes + state_bytes),
            self.rows * (row_bytes + state_bytes),
        ]
        return np.log(np.maximum(np.stack(columns, axis=1), 1.0))


def _unique_and_lookups(tables: TableColumns, batch_size: int) -> Floats:
    """[2, tables]"""
    lookups = tables.pooling_factor * tables.num_features * batch_size
    return np.stack([unique_rows(tables, lookups), lookups])


def whole_tables(tables: TableColumns) -> ShardColumns:
    """Each table as one shard, in device memory."""
    count = len(tables.num_embeddings)
    return ShardColumns(
        tables=tables,
        table=np.arange(count),
        sharding_type=np.full(count, TYPE_CODE["table_wise"]),
        compute_kernel=np.full(count, KERNEL_CODE["fused"]),
        rows=tables.num_embeddings,
        columns=tables.embedding_dim,
        cache_load_factor=np.zeros(count),
    )


def sum_by(values: Floats, owner: Ints, owners: int) -> Floats:
    """[owners, columns]: sums of the rows of `values` that belong to each."""
    total = np.zeros((owners, values.shape[1]))
    np.add.at(total, owner, values)
    return total


def dreamshard_features(shards: ShardColumns) -> Floats:
    """[shards, 21]: dim, rows, pooling factor, size, and 17 bins of reuse (Zha et al., 2022).

    As published: rows, pooling factor and size are z-scored over the tables of the task, which
    are these shards; bins are shares of the unique ids. Nothing tells of batch, dtype or optimizer.
    """
    tables, table = shards.tables, shards.table
    histogram = tables.reuse_histogram.reshape(-1, REUSE_BINS)
    uniform = np.eye(1, REUSE_BINS)
    unique = np.where(np.isnan(histogram[:, :1]), uniform, histogram) / MEAN_COUNTS
    bins = unique / unique.sum(axis=1, keepdims=True)
    pooling = tables.pooling_factor * tables.num_features
    size = shards.rows * shards.columns * shards.of_table("element_bytes") / _BYTES_A_GB
    return np.column_stack(
        [
            shards.columns,
            _z_score(shards.rows.astype(np.float64)),
            _z_score(pooling[table]),
            _z_score(size),
            bins[table],
        ]
    )


def _z_score(values: Floats) -> Floats:
    spread = values.std()
    return np.asarray((values - values.mean()) / (spread if spread > 0 else 1.0))
