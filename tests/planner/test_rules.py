from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import Plan, PlannerError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES

TABLE_WISE = ShardingRule(sharding_type="table_wise")
FOUR = Topology(world_size=4, local_world_size=2)  # hosts: ranks 0, 1 and ranks 2, 3


def _table(name: str, rows: int, dim: int = 4, **fields: Any) -> TableSpec:
    return TableSpec(name=name, num_embeddings=rows, embedding_dim=dim, **fields)


def _ranks(plan: Plan, table: str) -> list[int]:
    return [shard.rank for shard in plan.tables[table].shards]


def _one(sharding_type: str, topology: Topology = FOUR, dim: int = 16, **rule: Any) -> Plan:
    rule = ShardingRule.model_validate({"sharding_type": sharding_type, **rule})
    return plan_by_rule([_table("t", 10, dim)], topology, rule)


def test_largest_tables_go_to_the_lightest_ranks():
    """By hand: 10, 7, 6, 2 and 1 rows on two ranks give 10 + 2 and 7 + 6, then 1 on the first."""
    tables = [_table(f"t{rows}", rows, optimizer="sgd") for rows in (1, 7, 2, 10, 6)]
    plan = plan_by_rule(tables, Topology(world_size=2, local_world_size=2), TABLE_WISE)
    assert {name: _ranks(plan, name) for name in plan.tables} == {
        "t1": [0], "t7": [1], "t2": [0], "t10": [0], "t6": [1],
    }  # fmt: skip
    row_bytes = 4 * 4  # four fp32 columns
    assert [device.memory_bytes for device in plan.devices] == [13 * row_bytes, 13 * row_bytes]


def test_balance_counts_what_all_types_use():
    """A row-wise table of uneven blocks and a host-wide one weigh on where the next goes."""
    tables = [
        _table("rows", 9, optimizer="sgd"),
        _table("host", 8, optimizer="sgd"),
        _table("a", 1),
    ]
    rules = {
        "rows": ShardingRule(sharding_type="row_wise"),  # 3, 3, 3 and 0 rows
        "host": ShardingRule(sharding_type="table_row_wise"),  # 4 and 4, on the second host
    }
    plan = plan_by_rule(tables, FOUR, TABLE_WISE, rules)
    assert [shard.rows for shard in plan.tables["rows"].shards] == [3, 3, 3, 0]
    assert (_ranks(plan, "rows"), _ranks(plan, "host")) == ([0, 1, 2, 3], [2, 3])
    assert _ranks(plan, "a") == [0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"optimizer": "sgd"}, 10 * 8 * 4),
        ({"optimizer": "rowwise_adagrad"}, 10 * 8 * 4 + 10 * 4),
        ({"optimizer": "adagrad"}, 10 * 8 * 4 * 2),
        ({"optimizer": "adagrad", "dtype": "fp16"}, 10 * 8 * (2 + 4)),
        ({"optimizer": "sgd", "dtype": "bf16"}, 10 * 8 * 2),
    ],
)
def test_memory_is_weights_and_optimizer_state(fields: dict[str, Any], expected: int):
    """By hand for 10 rows of 8: weights in the table's dtype, state in fp32."""
    plan = plan_by_rule([_table("t", 10, 8, **fields)], FOUR, TABLE_WISE)
    assert plan.devices[0].memory_bytes == expected
    assert plan.tables["t"].shards[0].memory_bytes == expected


@pytest.mark.parametrize(
    ("sharding_type", "kernel", "ranks", "shape"),
    [
        ("table_wise", "fused", [0], (10, 16)),
        ("row_wise", "fused", [0, 1, 2, 3], (3, 16)),
        ("column_wise", "fused", [0, 1, 2, 3], (10, 4)),
        ("table_row_wise", "fused", [0, 1], (5, 16)),
        ("table_column_wise", "fused", [0, 1], (10, 8)),
        ("grid_shard", "fused", [0, 1, 2, 3], (5, 8)),
        ("data_parallel", "dense", [0, 1, 2, 3], (10, 16)),
    ],
)
def test_what_a_type_means_on_two_hosts_of_two(
    sharding_type: str, kernel: str, ranks: list[int], shape: tuple[int, int]
):
    """Ranks, kernel and the first shard's shape of a 10 x 16 table where nothing else is given."""
    plan = _one(sharding_type)
    table = plan.tables["t"]
    assert (table.compute_kernel, _ranks(plan, "t")) == (kernel, ranks)
    assert (table.shards[0].rows, table.shards[0].columns) == shape
    assert (table.num_embeddings, table.embedding_dim) == (10, 16)


@pytest.mark.parametrize(
    ("sharding_type", "ranks"),
    [
        ("table_wise", [3]),
        ("column_wise", [2, 0]),
        ("column_wise", [1, 1, 3, 0]),
        ("table_row_wise", [2, 3]),
        ("table_column_wise", [3, 2]),
        ("grid_shard", [2, 3, 0, 1]),
        ("grid_shard", [2, 3]),
    ],
)
def test_given_ranks_are_kept(sharding_type: str, ranks: list[int]):
    """Ranks that TorchRec can use are used, and say how many column shards there are."""
    assert _ranks(_one(sharding_type, ranks=ranks), "t") == ranks


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("table_wise", [0, 1]), r"ranks \[0, 1\]: 1 shards need 1 ranks"),
        (("table_wise", []), r"ranks \[\]: 1 shards need 1 ranks"),
        (("table_wise", [4]), "there are ranks 0 to 3 only"),
        (("column_wise", [0, -1]), "there are ranks 0 to 3 only"),
        (("column_wise", [0, 1, 2]), "cannot be cut into 3 .* choose 1 or 2 or 4 shards"),
        (("row_wise", [0, 1]), "4 shards need 4 ranks"),
        (("row_wise", [3, 2, 1, 0]), r"takes its ranks in order, here \[0, 1, 2, 3\]"),
        (("data_parallel", [0, 0, 0, 0]), r"takes its ranks in order, here \[0, 1, 2, 3\]"),
        (("table_row_wise", [3, 2]), r"takes its ranks in order, here \[2, 3\]"),
        (("table_row_wise", [1, 2]), r"takes its ranks in order, here \[0, 1\]"),
        (("table_column_wise", [1, 2]), "the ranks must be of one host"),
        (("grid_shard", [0, 1, 2]), "2 shards need 2 ranks"),
        (("grid_shard", [0, 2, 1, 3]), r"takes its ranks in order, here \[0, 1, 0, 1\]"),
    ],
)
def test_impossible_ranks_are_told(rule: tuple[str, list[int]], message: str):
    """The error names the table and what ranks would do."""
    with pytest.raises(PlannerError, match=f"table t.*{message}"):
        _one(rule[0], ranks=rule[1])


def test_column_shards_can_be_given():
    """The number of column shards is the one asked for, more than ranks if need be."""
    plan = _one("column_wise", Topology(world_size=2, local_world_size=2), column_shards=4)
    assert _ranks(plan, "t") == [0, 1, 0, 1]
    with pytest.raises(PlannerError, match="choose 1 or 2 or 4 shards"):
        _one("column_wise", column_shards=8)


def test_names_must_be_clear():
    """No tables, equal names and rules for other tables are refused by name."""
    a, b = _table("a", 1), _table("b", 1)
    with pytest.raises(PlannerError, match="there are no tables"):
        plan_by_rule([], FOUR, TABLE_WISE)
    with pytest.raises(PlannerError, match="more than one table is named a, b"):
        plan_by_rule([b, a, b, a], FOUR, TABLE_WISE)
    with pytest.raises(PlannerError, match="names table c, which does not exist"):
        plan_by_rule([a, b], FOUR, TABLE_WISE, {"a": TABLE_WISE, "c": TABLE_WISE})


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    kinds=st.lists(st.sampled_from(SHARDING_TYPES), min_size=12, max_size=12),
    local=st.integers(1, 4),
    hosts=st.integers(1, 3),
)
def test_devices_add_up_to_their_shards(rows: list[int], kinds: list[Any], local: int, hosts: int):
    """For any tables and types, tables keep their order, a device's bytes are those of its
    shards, and weights are all there: once, or once a rank for data_parallel."""
    topology = Topology(world_size=local * hosts, local_world_size=local)
    tables = [_table(f"t{i}", n, 8, optimizer="sgd") for i, n in enumerate(rows)]
    rules = {t.name: ShardingRule(sharding_type=k) for t, k in zip(tables, kinds, strict=False)}
    plan = plan_by_rule(tables, topology, TABLE_WISE, rules)
    assert list(plan.tables) == [table.name for table in tables]
    assert [device.rank for device in plan.devices] == list(range(topology.world_size))
    for device in plan.devices:
        shards = [s for t in plan.tables.values() for s in t.shards if s.rank == device.rank]
        assert device.memory_bytes == sum(shard.memory_bytes for shard in shards)
    for table, kind in zip(tables, kinds, strict=False):
        copies = topology.world_size if kind == "data_parallel" else 1
        found = sum(shard.memory_bytes for shard in plan.tables[table.name].shards)
        assert found == copies * table.num_embeddings * 8 * 4


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 6))
def test_table_wise_is_greedy(rows: list[int], ranks: int):
    """Taking its last, smallest table off the heaviest rank leaves it no heavier than any other:
    what largest-first promises, and with it at most 4/3 of the best balance."""
    tables = [_table(f"t{i}", n, optimizer="sgd") for i, n in enumerate(rows)]
    plan = plan_by_rule(tables, Topology(world_size=ranks, local_world_size=ranks), TABLE_WISE)
    used = [device.memory_bytes for device in plan.devices]
    shards = [shard for table in plan.tables.values() for shard in table.shards]
    smallest = min(s.memory_bytes for s in shards if used[s.rank] == max(used))
    assert max(used) - smallest <= min(used)
