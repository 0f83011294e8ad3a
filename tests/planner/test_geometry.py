from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from planner import PlannerError, TableSpec, Topology
from planner.geometry import SHARDING_TYPES, ShardingType, column_shard_count, cut

# The types whose shards lie side by side; data_parallel has one copy on each rank.
TILING = [kind for kind in SHARDING_TYPES if kind != "data_parallel"]


def _table(rows: int, dim: int) -> TableSpec:
    return TableSpec(name="t", num_embeddings=rows, embedding_dim=dim)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[int, int, Topology, int]:
    """(rows, dim, topology, column shards), with a dim that can be cut so."""
    column_shards = draw(st.integers(1, 6))
    dim = 4 * column_shards * draw(st.integers(1, 6))
    local, hosts = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    topology = Topology(world_size=local * hosts, local_world_size=local)
    return draw(st.integers(1, 100)), dim, topology, column_shards


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
@settings(deadline=None, max_examples=200)
@given(case=_cases())
def test_cut_is_torchrecs(sharding_type: ShardingType, case: tuple[int, int, Topology, int]):
    """Sizes, offsets and order equal what TorchRec computes, also with fewer rows than ranks."""
    rows, dim, topology, column_shards = case
    blocks = cut(_table(rows, dim), sharding_type, topology, column_shards)
    sizes, offsets = calculate_shard_sizes_and_offsets(
        torch.empty(rows, dim, device="meta"),
        topology.world_size,
        topology.local_world_size,
        sharding_type,
        col_wise_shard_dim=dim // column_shards,
    )
    assert [[b.rows, b.columns] for b in blocks] == sizes
    assert [[b.row_offset, b.column_offset] for b in blocks] == offsets


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 6, 10, 13])
def test_a_dimension_that_is_no_multiple_of_four_is_not_cut(dim: int):
    """Such a table has one column shard, whole, for every number asked of it at most."""
    assert [column_shard_count(dim, at_most) for at_most in (1, 2, 8)] == [1, 1, 1]
    topology = Topology(world_size=2, local_world_size=2)
    assert cut(_table(7, dim), "column_wise", topology) == [(0, 7, 0, dim)]
    with pytest.raises(PlannerError, match=r"table t: .* into 2 equal shards.*choose 1 shards"):
        cut(_table(7, dim), "column_wise", topology, 2)


@pytest.mark.parametrize("sharding_type", TILING)
@settings(deadline=None, max_examples=100)
@given(case=_cases())
def test_shards_tile_the_table(sharding_type: ShardingType, case: tuple[int, int, Topology, int]):
    """Every cell of the table is in exactly one shard."""
    rows, dim, topology, column_shards = case
    covered = np.zeros((rows, dim), int)
    for row, height, column, width in cut(
        _table(rows, dim), sharding_type, topology, column_shards
    ):
        assert row + height <= rows and column + width <= dim
        covered[row : row + height, column : column + width] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("sharding_type", ["column_wise", "table_column_wise", "grid_shard"])
@pytest.mark.parametrize("dim", [4, 8, 12, 40, 128])
def test_impossible_column_counts_name_the_possible_ones(sharding_type: ShardingType, dim: int):
    """A count works exactly if its shards are equal multiples of four; the error lists those."""
    topology = Topology(world_size=4, local_world_size=2)
    works, refused = [], {}
    for count in range(-1, dim + 2):
        try:
            blocks = cut(_table(9, dim), sharding_type, topology, count)
        except PlannerError as error:
            refused[count] = str(error)
        else:
            assert {block.columns for block in blocks} == {dim // count}
            works.append(count)
    assert works == [k for k in range(1, dim) if dim % k == 0 and (dim // k) % 4 == 0]
    choices = " or ".join(map(str, works))
    for count, message in refused.items():
        assert message.startswith(f"table t: {dim} columns cannot be cut into {count} equal")
        assert message.endswith(f"choose {choices} shards")


@pytest.mark.parametrize(
    ("dim", "at_most", "count"), [(64, 4, 4), (64, 3, 2), (12, 4, 3), (12, 2, 1), (4, 9, 1)]
)
def test_the_column_count_is_the_largest_that_divides(dim: int, at_most: int, count: int):
    """As many column shards as ranks, or the next smaller number that cuts whole vectors."""
    assert column_shard_count(dim, at_most) == count
