"""A plan is whole, within its limits, as good as it says, and the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planner import Plan, PlannerError, TableSpec
from planner.constraints import TableConstraint
from planner.cost.predict import predict
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.make_plan import make_plan
from planner.plan import Objective
from planner.table_list import load_table_list
from planner.topology import parse_topology

BATCH_SIZE = 512
TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise")


def random_tables(count: int, seed: int = 0) -> list[TableSpec]:
    generator = np.random.default_rng(seed)
    return [
        TableSpec(
            name=f"t{i}",
            num_embeddings=int(10 ** generator.uniform(2, 6.5)),
            embedding_dim=int(generator.choice([8, 32, 64, 128])),
            pooling_factor=float(generator.uniform(1, 60)),
        )
        for i in range(count)
    ]


def plan(tables: list[TableSpec], topology: str, **options: object) -> Plan:
    return make_plan(
        tables, parse_topology(topology), TorchRecEstimate(BATCH_SIZE), BATCH_SIZE, **options
    )


@pytest.mark.parametrize("objective", ["stages", "max_total"])
@pytest.mark.parametrize("topology", ["1x1xA100-80GB", "1x8xA100-80GB", "4x4xH100"])
def test_every_table_is_covered_once(objective: str, topology: str) -> None:
    """The shards of a table cover it exactly (replicated: on every rank), and the predictions
    are those of `predict` on the plan that was made."""
    tables = random_tables(40)
    made = plan(tables, topology, objective=objective)
    made.check_fits(tables, made.topology)
    for table in tables:
        planned = made.tables[table.name]
        cells = sum(shard.rows * shard.columns for shard in planned.shards)
        copies = made.topology.world_size if planned.sharding_type == "data_parallel" else 1
        assert cells == table.num_embeddings * table.embedding_dim * copies
    again = predict(made, TorchRecEstimate(BATCH_SIZE), BATCH_SIZE, objective)
    assert again.predicted.step_ms == pytest.approx(made.predicted.step_ms)
    assert made.predicted.bound_ms <= made.predicted.step_ms
    assert made.predicted.gap_percent == pytest.approx(
        100 * (made.predicted.step_ms / made.predicted.bound_ms - 1)
    )
    for device in made.devices:
        assert device.memory_bytes <= device.memory_limit_bytes


def test_the_same_seed_gives_the_same_plan(tmp_path) -> None:
    tables = random_tables(60)
    first, second = plan(tables, "2x4xA100-80GB"), plan(tables, "2x4xA100-80GB")
    assert first.fingerprint == second.fingerprint
    first.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == first


def test_constraints_hold() -> None:
    """Pinned ranks, fixed types and counts, and groups on the same ranks."""
    tables = random_tables(30)
    constraints = {
        **{f"t{i}": TableConstraint(sharding_types=(kind,)) for i, kind in enumerate(TYPES)},
        "t5": TableConstraint(ranks=(3, 5)),
        "t6": TableConstraint(sharding_types=("column_wise",), column_shards=2, ranks=(0, 7)),
        "t7": TableConstraint(sharding_types=("table_row_wise",), ranks=(4, 5, 6, 7)),
        **{f"t{i}": TableConstraint(group="g") for i in (8, 9, 10)},
    }
    made = plan(tables, "2x4xA100-80GB", constraints=constraints)
    for i, kind in enumerate(TYPES):
        assert made.tables[f"t{i}"].sharding_type == kind
    ranks = {name: [shard.rank for shard in t.shards] for name, t in made.tables.items()}
    assert set(ranks["t5"]) <= {3, 5}
    assert sorted(ranks["t6"]) == [0, 7]
    assert ranks["t7"] == [4, 5, 6, 7]
    assert ranks["t8"] == ranks["t9"] == ranks["t10"]
    assert len({rank // 4 for rank in ranks["t4"]}) == 1
    assert made.tables["t6"].constraint == constraints["t6"]


def test_tables_too_large_for_device_memory_go_to_host_memory() -> None:
    """Forty tables of 12.8 GB on two devices of 80 GB: most are in host memory, and fit it."""
    tables = [
        TableSpec(name=f"t{i}", num_embeddings=25_000_000, embedding_dim=128) for i in range(40)
    ]
    made = plan(tables, "1x2xA100-80GB")
    kernels = {table.compute_kernel for table in made.tables.values()}
    assert kernels & {"fused_uvm", "fused_uvm_caching"}
    assert all(d.memory_bytes <= d.memory_limit_bytes for d in made.devices)
    assert 0 < made.hosts[0].memory_bytes <= made.hosts[0].memory_limit_bytes


def test_a_time_budget_ends_the_search() -> None:
    """Twice the time finds no worse plan."""
    tables = random_tables(200)
    short = plan(tables, "8x8xA100-80GB", time_budget=0.0)
    longer = plan(tables, "8x8xA100-80GB", time_budget=4.0)
    assert longer.predicted.step_ms <= short.predicted.step_ms


def test_a_time_budget_ends_a_search_in_vain() -> None:
    """Three tables of 0.6 of a device each, whole, on two devices: given up when time is over."""
    tables = [
        TableSpec(name=f"t{i}", num_embeddings=80_000_000, embedding_dim=128) for i in range(3)
    ]
    whole = TableConstraint(sharding_types=("table_wise",), compute_kernels=("fused",))
    with pytest.raises(PlannerError, match="no plan fits 1x2xA100-80GB"):
        plan(tables, "1x2xA100-80GB", constraints={t.name: whole for t in tables}, time_budget=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "objective", "gap_percent", "max_over_mean"),
    [("H200", "max_total", 5, 1.03), ("torchrec-80GB", "stages", 40, 1.2)],
)
def test_tables_that_fill_memory(
    shared_data: Path, kind: str, objective: Objective, gap_percent: float, max_over_mean: float
) -> None:
    """TorchRec's published example on 96 ranks, of which it reports a balance of 1.296: on devices
    that have some room for it, and on those that it fills."""
    listed = load_table_list(shared_data / "planner" / "torchrec_wiki_1935.json")
    batch_size = listed.batch_size_per_rank
    assert batch_size is not None
    topology = parse_topology(f"12x8x{kind}")
    model = TorchRecEstimate(batch_size)
    plan = make_plan(listed.tables, topology, model, batch_size, objective=objective)
    plan.check_fits(listed.tables, topology)
    assert plan.predicted.gap_percent is not None and plan.predicted.max_over_mean is not None
    assert plan.predicted.gap_percent < gap_percent
    assert plan.predicted.max_over_mean < max_over_mean
