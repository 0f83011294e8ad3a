"""The published rules put tables where their definitions say, and plans of theirs are costed."""

from __future__ import annotations

import numpy as np
import pytest

from planner import Plan, PlannerError, RequestError, TableSpec, Topology
from planner.constraints import TableConstraint
from planner.cost.predict import predict
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.hardware import preset
from planner.search.baselines import BASELINES, plan_by_baseline
from planner.shards import Floats, ShardColumns

HARDWARE = preset("torchrec-80GB")
TWO = Topology(world_size=2, local_world_size=2, hardware=HARDWARE)
FOUR = Topology(world_size=4, local_world_size=2, hardware=HARDWARE)
BATCH_SIZE = 8


class CostOfRows:
    """A shard costs as many ms as it has rows, and as many bytes move: none."""

    name = "rows"

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        costs = np.zeros((len(shards), 4))
        costs[:, 0] = shards.rows
        return costs


def table(name: str, rows: int, dim: int, pooling_factor: float = 1.0) -> TableSpec:
    return TableSpec(
        name=name, num_embeddings=rows, embedding_dim=dim, pooling_factor=pooling_factor
    )


# Weights, in units of the smallest:
#              size       dim    dim x pooling   x log10(rows)
TABLES = [
    table("a", 10_000, 4, 50.0),  # 40,000      4      200             800
    table("b", 1_000, 32, 1.0),   # 32,000     32       32              96
    table("c", 1_000, 16, 10.0),  # 16,000     16      160             480
    table("d", 10, 8, 40.0),      #     80      8      320             320
]  # fmt: skip


def baseline(name: str, **more: object) -> Plan:
    settings = {
        "tables": TABLES,
        "topology": TWO,
        "cost_model": CostOfRows(),
        "batch_size": BATCH_SIZE,
        **more,
    }
    return plan_by_baseline(name, **settings)  # type: ignore[arg-type]


def ranks(plan: Plan) -> dict[str, list[int]]:
    return {name: [shard.rank for shard in table.shards] for name, table in plan.tables.items()}


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        # 40,000 | 32,000 + 16,000; d goes to the 40,000.
        ("size_greedy", ("ad", "bc")),
        # 32 | 16 + 8 + 4.
        ("dim_greedy", ("b", "acd")),
        # 320 + 32 | 200 + 160: 320, 200, 160 to the 200, 32 to the 320.
        ("lookup_greedy", ("bd", "ac")),
        # 800 | 480 + 320; the two are even, b goes to the device with fewer bytes: c and d's.
        ("size_lookup_greedy", ("a", "bcd")),
        # 10,000 | 1000 + 1000 + 10.
        ("all_table_wise", ("a", "bcd")),
    ],
)
def test_greedy_rules_by_hand(name: str, apart: tuple[str, str]) -> None:
    """The tables of each device, whichever of the two it is."""
    placed = ranks(baseline(name))
    groups = {"".join(t for t in placed if placed[t] == [rank]) for rank in range(2)}
    assert groups == set(apart)


def test_of_equal_devices_that_with_fewer_bytes() -> None:
    """dim x pooling ties: the third goes to the smaller of the first two, not to rank 0."""
    tables = [table("small", 10, 8), table("large", 1000, 8), table("third", 5, 4)]
    placed = ranks(baseline("dim_greedy", tables=tables))
    assert placed == {"large": [0], "small": [1], "third": [1]}


def test_features_count_as_lookups() -> None:
    """A table that two features look up has twice the lookups of one: 2 x 10 | 15 + 4."""
    two = table("two", 10, 4, 10.0).model_copy(update={"num_features": 2})
    tables = [two, table("one", 10, 4, 15.0), table("last", 10, 4, 4.0)]
    placed = ranks(baseline("lookup_greedy", tables=tables))
    assert placed == {"two": [0], "one": [1], "last": [1]}


def test_row_wise_is_everywhere_and_table_row_wise_on_the_least_loaded_host() -> None:
    """a on one host; b, c and d, of 500 + 500 + 5 rows a device, on the other."""
    everywhere = baseline("all_row_wise", topology=FOUR)
    assert set(map(tuple, ranks(everywhere).values())) == {(0, 1, 2, 3)}
    on_hosts = ranks(baseline("all_table_row_wise", topology=FOUR))
    assert on_hosts == {"a": [0, 1], "b": [2, 3], "c": [2, 3], "d": [2, 3]}


@pytest.mark.parametrize("name", BASELINES)
def test_same_seed_same_plan(name: str) -> None:
    """The seed decides; other seeds change only the random rule."""
    plans = [baseline(name, topology=FOUR, seed=seed) for seed in (1, 1, *range(2, 6))]
    assert plans[0] == plans[1]
    assert (len({plan.fingerprint for plan in plans}) > 1) == (name == "random")


@pytest.mark.parametrize("objective", ["stages", "max_total"])
def test_plans_are_costed_as_by_predict(objective: str) -> None:
    """The same cost model, batch and dense bytes as for any other plan."""
    model = TorchRecEstimate(BATCH_SIZE)
    plan = baseline(
        "lookup_greedy", topology=FOUR, cost_model=model, objective=objective, dense_bytes=1_000
    )
    assert plan.predicted.step_ms
    assert plan == predict(plan, model, BATCH_SIZE, objective, 1_000)


def with_memory(topology: Topology, size: int) -> Topology:
    hardware = HARDWARE.model_copy(
        update={"device_memory_bytes": size, "reserved_memory_fraction": 0.0}
    )
    return topology.model_copy(update={"hardware": hardware})


@pytest.mark.parametrize("name", ["random", "lookup_greedy"])
def test_full_devices_are_skipped(name: str) -> None:
    """Four tables of 20 MB, room for two on a device: two each, though one has all the lookups."""
    tables = [table(f"t{i}", 1_000_000, 4, 1.0 if i else 100.0) for i in range(4)]
    for seed in range(5):
        plan = baseline(name, tables=tables, topology=with_memory(TWO, 50_000_000), seed=seed)
        assert sorted(rank for (rank,) in ranks(plan).values()) == [0, 0, 1, 1]
        assert all(device.memory_bytes <= 50_000_000 for device in plan.devices)


def test_no_room_names_the_table() -> None:
    """36 MB find no device of 30 MB; dense bytes count."""
    tables = [table("small", 10, 4), table("large", 1_000_000, 8)]
    with pytest.raises(PlannerError, match=r"no room for table large: table_wise it takes 0.0335"):
        baseline("size_greedy", tables=tables, topology=with_memory(TWO, 30_000_000))
    roomy = with_memory(TWO, 40_000_000)
    baseline("size_greedy", tables=tables, topology=roomy)
    with pytest.raises(PlannerError, match="large"):
        baseline("size_greedy", tables=tables, topology=roomy, dense_bytes=10_000_000)


def test_constraints_are_kept() -> None:
    """Ranks and groups hold for the rules too; a type they exclude is an error that says so."""
    constraints = {
        "a": TableConstraint(ranks=(3,)),
        "b": TableConstraint(group="g"),
        "c": TableConstraint(group="g"),
    }
    for seed in range(5):
        placed = ranks(baseline("random", topology=FOUR, constraints=constraints, seed=seed))
        assert placed["a"] == [3] and placed["b"] == placed["c"]
    constraints = {"c": TableConstraint(sharding_types=("row_wise",))}
    with pytest.raises(PlannerError, match="table c cannot be table_wise"):
        baseline("random", topology=FOUR, constraints=constraints)


def test_unknown_rule() -> None:
    """The error lists those there are."""
    with pytest.raises(RequestError, match="no baseline 'greedy'; choose random, size_greedy"):
        baseline("greedy")
