"""Many shards at once, as columns: what cost and storage models compute on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from planner.geometry import SHARDING_TYPES
from planner.tables import REUSE_BINS, TableOptimizerName, TableSpec
from planner.topology import Topology

ComputeKernel = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]
COMPUTE_KERNELS: tuple[ComputeKernel, ...] = get_args(ComputeKernel)
OPTIMIZERS: tuple[TableOptimizerName, ...] = get_args(TableOptimizerName)

TYPE_CODE = {name: code for code, name in enumerate(SHARDING_TYPES)}
KERNEL_CODE = {name: code for code, name in enumerate(COMPUTE_KERNELS)}

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TableColumns:
    """The tables, one entry each."""

    num_embeddings: Ints
    embedding_dim: Ints
    num_features: Ints
    pooling_factor: Floats
    element_bytes: Ints
    weighted: Bools
    pooled: Bools
    optimizer: Ints  # index into OPTIMIZERS
    reuse_histogram: Floats  # [tables, REUSE_BINS]; NaN where it is unknown

    @classmethod
    def of(cls, tables: Sequence[TableSpec]) -> TableColumns:
        unknown = (np.nan,) * REUSE_BINS
        return cls(
            num_embeddings=np.array([t.num_embeddings for t in tables], dtype=np.int64),
            embedding_dim=np.array([t.embedding_dim for t in tables], dtype=np.int64),
            num_features=np.array([t.num_features for t in tables], dtype=np.int64),
            pooling_factor=np.array([t.pooling_factor for t in tables], dtype=np.float64),
            element_bytes=np.array([t.bytes_per_element for t in tables], dtype=np.int64),
            weighted=np.array([t.weighted for t in tables], dtype=np.bool_),
            pooled=np.array([t.pooled for t in tables], dtype=np.bool_),
            optimizer=np.array([OPTIMIZERS.index(t.optimizer) for t in tables], dtype=np.int64),
            reuse_histogram=np.array([t.reuse_histogram or unknown for t in tables]),
        )


@dataclass(frozen=True)
class ShardColumns:
    """Shards, one entry each; `table` indexes `tables`."""

    tables: TableColumns
    table: Ints
    sharding_type: Ints  # index into SHARDING_TYPES
    compute_kernel: Ints  # index into COMPUTE_KERNELS
    rows: Ints
    columns: Ints
    cache_load_factor: Floats  # share of the rows in the device's cache; fused_uvm_caching only

    def __len__(self) -> int:
        return len(self.table)

    def select(self, chosen: Bools | Ints) -> ShardColumns:
        """Some of the shards."""
        return ShardColumns(
            tables=self.tables,
            table=self.table[chosen],
            sharding_type=self.sharding_type[chosen],
            compute_kernel=self.compute_kernel[chosen],
            rows=self.rows[chosen],
            columns=self.columns[chosen],
            cache_load_factor=self.cache_load_factor[chosen],
        )

    def of_table(self, column: str) -> npt.NDArray[Any]:
        """A column of `tables`, for each shard."""
        values: npt.NDArray[Any] = getattr(self.tables, column)[self.table]
        return values


def row_sharers(sharding_type: Ints, topology: Topology) -> Ints:
    """Ranks that share the rows of a shard's columns: each looks up that part of the ids."""
    sharers = np.ones(len(sharding_type), dtype=np.int64)
    sharers[sharding_type == TYPE_CODE["row_wise"]] = topology.world_size
    for name in ("table_row_wise", "grid_shard"):
        sharers[sharding_type == TYPE_CODE[name]] = topology.local_world_size
    return sharers
