"""Bytes that shards take: weights, optimizer state, caches and the buffers of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from planner.shards import KERNEL_CODE, OPTIMIZERS, TYPE_CODE, Floats, ShardColumns, row_sharers
from planner.tables import TableOptimizerName, TableSpec
from planner.topology import Topology

# fp32 values a row, and an element: FBGEMM keeps them in fp32 whatever the table's dtype.
OPTIMIZER_STATE: dict[TableOptimizerName, tuple[int, int]] = {
    "sgd": (0, 0),
    "adagrad": (0, 1),
    "rowwise_adagrad": (1, 0),
    "adam": (0, 2),
    "partial_rowwise_adam": (1, 1),
    "lamb": (0, 2),
    "partial_rowwise_lamb": (1, 1),
}
STATE_BYTES = 4
ID_BYTES = 8
OUTPUT_BYTES = 4  # TorchRec's kernels give fp32 embeddings, whatever the table's dtype
CACHE_SET_ROWS = 32  # FBGEMM's DEFAULT_ASSOC: its caches are made of sets of so many rows
CACHE_SLOT_BYTES = 16  # FBGEMM's lxu_cache_state and lxu_state: an int64 each
CACHE_MAP_BYTES = 4  # its cache_index_table_map: an int32 a row
BATCHES_IN_FLIGHT = 2  # the ids of the next batch are sent while this one trains


class Memory(NamedTuple):
    """Bytes of each shard, in device memory and in its host's memory."""

    device: Floats
    host: Floats


def shard_bytes(table: TableSpec, rows: int, columns: int) -> int:
    """Weights and optimizer state of a `rows` x `columns` shard."""
    per_row, per_element = OPTIMIZER_STATE[table.optimizer]
    weights = rows * columns * table.bytes_per_element
    return weights + (rows * per_row + rows * columns * per_element) * STATE_BYTES


def table_memory(shards: ShardColumns) -> Memory:
    """Weights and optimizer state, and the caches of tables in host memory.

    FBGEMM keeps the states that have one value a row on the device, also of tables in host memory.
    """
    states = np.array([OPTIMIZER_STATE[name] for name in OPTIMIZERS])
    per_row, per_element = states[shards.of_table("optimizer")].T
    rows = shards.rows.astype(np.float64)
    row_states = rows * per_row * STATE_BYTES
    element_bytes = shards.of_table("element_bytes") + per_element * STATE_BYTES
    elements = rows * shards.columns * element_bytes
    is_cached = shards.compute_kernel == KERNEL_CODE["fused_uvm_caching"]
    in_host = is_cached | (shards.compute_kernel == KERNEL_CODE["fused_uvm"])
    on_device = np.where(is_cached, _cache_bytes(shards), np.where(in_host, 0.0, elements))
    return Memory(row_states + on_device, np.where(in_host, elements, 0.0))


def _cache_bytes(shards: ShardColumns) -> Floats:
    """The cache of each shard in a kernel of its own, as FBGEMM lays it out.

    Tables that share a kernel share a cache as wide as the widest of them, which takes more.
    """
    sets = np.ceil(np.floor(shards.rows * shards.cache_load_factor) / CACHE_SET_ROWS)
    slots = np.where(shards.rows > 0, np.maximum(sets, 1), 0) * CACHE_SET_ROWS
    slot_bytes = shards.columns * shards.of_table("element_bytes") + CACHE_SLOT_BYTES
    return np.asarray(slots * slot_bytes + shards.rows * CACHE_MAP_BYTES)


def buffer_bytes(shards: ShardColumns, topology: Topology, batch_size: int) -> Floats:
    """Ids received and embeddings sent, or their gradients, for `batch_size` rows a rank.

    Embeddings are sent, and freed, before their gradients arrive. A replicated table has a
    gradient of its own size instead.
    """
    replicated = shards.sharding_type == TYPE_CODE["data_parallel"]
    sharers = row_sharers(shards.sharding_type, topology)
    bags = shards.of_table("num_features") * batch_size * topology.world_size
    ids = shards.of_table("pooling_factor") * bags / sharers
    outputs = np.where(shards.of_table("pooled"), bags, ids)
    id_bytes = ID_BYTES + np.where(shards.of_table("weighted"), 4, 0)
    sent = outputs * shards.columns * OUTPUT_BYTES + ids * id_bytes * BATCHES_IN_FLIGHT
    gradient = shards.rows * shards.columns * shards.of_table("element_bytes")
    return np.asarray(np.where(replicated, gradient, sent))


def received_bytes(tables: Sequence[TableSpec], batch_size: int) -> int:
    """Embeddings that every rank gets for its rows, and their gradients, under any plan."""
    total = 0.0
    for table in tables:
        ids = 1.0 if table.pooled else table.pooling_factor
        total += ids * table.num_features * table.embedding_dim
    return round(2 * total * OUTPUT_BYTES * batch_size)
