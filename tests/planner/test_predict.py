"""A plan's prediction is the sum of its shards, stage by stage, in time and in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planner import Plan, ShardingRule, TablePlan, TableSpec, Topology, plan_by_rule
from planner.cost.predict import predict
from planner.hardware import preset
from planner.shards import Floats, ShardColumns

GPUS = Topology(world_size=2, local_world_size=1, hardware=preset("torchrec-80GB"))
TABLES = [
    TableSpec(name="a", num_embeddings=10, embedding_dim=4, pooling_factor=3, optimizer="sgd"),
    TableSpec(name="b", num_embeddings=4, embedding_dim=8, optimizer="adagrad"),
]
ON_RANK = {
    name: ShardingRule(sharding_type="table_wise", ranks=(rank,))
    for name, rank in (("a", 0), ("b", 1))
}


class CostOfRows:
    """Forward compute as long as the shard has rows, backward communication by its columns."""

    name = "rows"

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        nothing = np.zeros(len(shards))
        return np.stack([shards.rows, nothing, nothing, shards.columns], axis=1).astype(float)


@pytest.mark.parametrize(
    ("objective", "step_ms"),
    # Every stage waits for its slowest device; or the slowest device's own stages.
    [("stages", 10.0 + 8.0), ("max_total", 10.0 + 4.0)],
)
def test_stages_add_up(objective: str, step_ms: float, tmp_path: Path) -> None:
    """Two tables on two devices, by hand, under both objectives."""
    plan = plan_by_rule(TABLES, GPUS, ON_RANK["a"], ON_RANK)
    predicted = predict(plan, CostOfRows(), batch_size=5, objective=objective)
    first, second = predicted.devices
    assert (first.forward_compute_ms, first.backward_comm_ms, first.total_ms) == (10, 4, 14)
    assert (second.forward_compute_ms, second.backward_comm_ms, second.total_ms) == (4, 8, 12)
    assert (first.forward_comm_ms, first.backward_compute_ms) == (0, 0)
    assert predicted.predicted.step_ms == step_ms
    assert predicted.predicted.max_over_mean == 14 / 13
    assert predicted.tables["b"].shards[0].cost_ms == 12.0
    assert (predicted.objective, predicted.cost_model, predicted.batch_size) == (
        objective, "rows", 5,
    )  # fmt: skip
    predicted.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == predicted


def test_shards_on_one_device_add_up() -> None:
    """Column shards of one table on one device, and another table there, by hand."""
    rules = {
        "a": ShardingRule(sharding_type="table_wise", ranks=(1,)),
        "b": ShardingRule(sharding_type="column_wise", column_shards=2, ranks=(1, 1)),
    }
    predicted = predict(plan_by_rule(TABLES, GPUS, rules["a"], rules), CostOfRows(), batch_size=5)
    assert [d.total_ms for d in predicted.devices] == [0, (10 + 4 + 4) + (4 + 4 + 4)]
    assert predicted.predicted.step_ms == 30
    assert predicted.predicted.max_over_mean == 2
    assert [s.cost_ms for s in predicted.tables["b"].shards] == [8, 8]


# What every rank receives for 5 rows of its own: 4 + 8 columns in fp32, and their gradients.
RECEIVED = 5 * (4 + 8) * 4 * 2
# Of a: 10 rows for 2 ranks, bags of 4 columns, 30 ids. Of b: 8 columns, 10 ids.
BUFFERS = (10 * 4 * 4 + 30 * 8 * 2, 10 * 8 * 4 + 10 * 8 * 2)
WEIGHTS = (10 * 4 * 4, 4 * 8 * 4)


def test_memory_by_hand() -> None:
    """Weights, optimizer state, a step's buffers, and what every device has besides."""
    plan = plan_by_rule(TABLES, GPUS, ON_RANK["a"], ON_RANK)
    predicted = predict(plan, CostOfRows(), batch_size=5, fixed_memory=1_000_000)
    states = (0, 4 * 8 * 4)
    everywhere = 1_000_000 + RECEIVED
    for rank in range(2):
        device = predicted.devices[rank]
        tables = WEIGHTS[rank] + states[rank]
        assert device.memory_bytes == tables + BUFFERS[rank] + everywhere
        assert device.memory_limit_bytes == int(80 * 2**30 * 0.85)
        assert predicted.tables["ab"[rank]].shards[0].memory_bytes == tables
        assert predicted.hosts[rank].memory_bytes == 0
        assert predicted.hosts[rank].memory_limit_bytes == 128 * 2**30


def test_host_memory_by_hand() -> None:
    """Tables in host memory count for their host, and for the device only what is cached there."""
    plan = plan_by_rule(TABLES, GPUS, ON_RANK["a"], ON_RANK)
    tables = {
        "a": in_host_memory(plan.tables["a"], "fused_uvm", None),
        "b": in_host_memory(plan.tables["b"], "fused_uvm_caching", 0.5),
    }
    plan = plan.model_copy(update={"tables": tables})
    predicted = predict(plan, CostOfRows(), batch_size=5)
    in_host = (WEIGHTS[0], 2 * WEIGHTS[1])  # b has Adagrad's state, of the same size
    # One set of 32 slots: 8 fp32 columns and two int64 each; an int32 for each of 4 rows.
    cache = (0, 32 * (8 * 4 + 16) + 4 * 4)
    for rank in range(2):
        device, shard = predicted.devices[rank], predicted.tables["ab"[rank]].shards[0]
        assert device.memory_bytes == cache[rank] + BUFFERS[rank] + RECEIVED
        assert (shard.memory_bytes, shard.host_memory_bytes) == (cache[rank], in_host[rank])
        assert (predicted.hosts[rank].host, predicted.hosts[rank].memory_bytes) == (
            rank, in_host[rank],
        )  # fmt: skip


def in_host_memory(table: TablePlan, kernel: str, load_factor: float | None) -> TablePlan:
    update = {"compute_kernel": kernel, "cache_load_factor": load_factor}
    return table.model_copy(update=update)
