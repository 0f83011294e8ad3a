"""Bytes that a shard takes on its device."""

from __future__ import annotations

from planner.tables import BYTES_PER_ELEMENT, TableSpec


def optimizer_state_bytes(table: TableSpec, rows: int, columns: int) -> int:
    """Optimizer state of a shard; FBGEMM keeps it in fp32 whatever the table's dtype."""
    if table.optimizer == "sgd":
        return 0
    if table.optimizer == "rowwise_adagrad":
        return rows * 4
    return rows * columns * 4


def shard_bytes(table: TableSpec, rows: int, columns: int) -> int:
    """Weights and optimizer state of a `rows` x `columns` shard."""
    weights = rows * columns * BYTES_PER_ELEMENT[table.dtype]
    return weights + optimizer_state_bytes(table, rows, columns)
