"""How each sharding type cuts a table: offsets and sizes, exactly TorchRec's."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from planner.errors import PlannerError
from planner.tables import TableSpec
from planner.topology import Topology

ShardingType = Literal[
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
]
SHARDING_TYPES: tuple[ShardingType, ...] = get_args(ShardingType)

# FBGEMM's kernels read rows in vectors of four elements.
COLUMN_MULTIPLE = 4


class Block(NamedTuple):
    """A rectangle of a table."""

    row_offset: int
    rows: int
    column_offset: int
    columns: int


def row_blocks(num_embeddings: int, parts: int) -> list[tuple[int, int]]:
    """(offset, rows) of `parts` row shards: ceil(n / parts) each, the last ones short or empty.

    TorchRec's ids find their rank by `id // ceil(n / parts)`, so no other split is possible.
    """
    block = -(-num_embeddings // parts)
    offsets = [min(i * block, num_embeddings) for i in range(parts)]
    return [(offset, min(block, num_embeddings - offset)) for offset in offsets]


def column_shard_count(embedding_dim: int, at_most: int) -> int:
    """The largest number of equal column shards, whole vectors each, that is <= `at_most`."""
    return max(k for k in column_shard_counts(embedding_dim) if k <= at_most)


def cut(
    table: TableSpec, sharding_type: ShardingType, topology: Topology, column_shards: int = 1
) -> list[Block]:
    """The blocks of `table`, in TorchRec's order (grid: row blocks of the first columns first).

    `column_shards` counts for column_wise, table_column_wise and grid_shard.
    """
    rows, dim = table.num_embeddings, table.embedding_dim
    if sharding_type == "data_parallel":
        return [Block(0, rows, 0, dim)] * topology.world_size
    if sharding_type == "table_wise":
        return [Block(0, rows, 0, dim)]
    if sharding_type == "row_wise":
        return [Block(o, n, 0, dim) for o, n in row_blocks(rows, topology.world_size)]
    if sharding_type == "table_row_wise":
        return [Block(o, n, 0, dim) for o, n in row_blocks(rows, topology.local_world_size)]
    columns = _column_blocks(table, column_shards)
    if sharding_type == "grid_shard":
        parts = row_blocks(rows, topology.local_world_size)
        return [Block(o, n, c, width) for c, width in columns for o, n in parts]
    return [Block(0, rows, c, width) for c, width in columns]


def _column_blocks(table: TableSpec, column_shards: int) -> list[tuple[int, int]]:
    possible = column_shard_counts(table.embedding_dim)
    if column_shards not in possible:
        raise PlannerError(
            f"table {table.name}: {table.embedding_dim} columns cannot be cut into "
            f"{column_shards} equal shards of a multiple of {COLUMN_MULTIPLE} columns; "
            f"choose {' or '.join(map(str, possible))} shards"
        )
    width = table.embedding_dim // column_shards
    return [(i * width, width) for i in range(column_shards)]


def column_shard_counts(embedding_dim: int) -> list[int]:
    """The counts of equal column shards, whole vectors each, that a width can be cut into."""
    vectors, rest = divmod(embedding_dim, COLUMN_MULTIPLE)
    return [1] if rest else [k for k in range(1, vectors + 1) if vectors % k == 0]
