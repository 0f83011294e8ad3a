"""A plan's prediction is the sum of its shards, stage by stage."""

from __future__ import annotations

from planner import Plan, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.cost.predict import predict
from planner.cost.stages import StageCost
from planner.geometry import Block, ShardingType


class CostOfRows:
    """Forward compute as long as the shard has rows, backward communication by its columns."""

    def shard_cost(
        self, table: TableSpec, sharding_type: ShardingType, block: Block, topology: Topology
    ) -> StageCost:
        return StageCost(float(block.rows), 0.0, 0.0, float(block.columns))


def test_stages_add_up(tmp_path) -> None:
    """Two tables on two devices, by hand: each stage waits for its slowest device."""
    tables = [
        TableSpec(name="a", num_embeddings=10, embedding_dim=4),
        TableSpec(name="b", num_embeddings=4, embedding_dim=8),
    ]
    rules = {
        n: ShardingRule(sharding_type="table_wise", ranks=(r,)) for n, r in [("a", 0), ("b", 1)]
    }
    topology = Topology(world_size=2, local_world_size=2)
    plan = plan_by_rule(tables, topology, rules["a"], rules)
    predicted = predict(plan, tables, CostOfRows())
    assert [device.total_ms for device in predicted.devices] == [14.0, 12.0]
    assert predicted.devices[1].forward_compute_ms == 4.0
    assert predicted.devices[1].backward_comm_ms == 8.0
    assert predicted.predicted.step_ms == 10.0 + 8.0
    assert predicted.predicted.max_over_mean == 14 / 13
    assert predicted.tables["b"].shards[0].cost_ms == 12.0
    predicted.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == predicted
