"""Plans for the tests of the reports."""

from __future__ import annotations

import random

from planner import (
    DevicePlan,
    Plan,
    Predicted,
    Shard,
    ShardingRule,
    TablePlan,
    TableSpec,
    Topology,
    plan_by_rule,
)
from planner.cost.predict import predict
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.topology import parse_topology

GIB = 2**30
BATCH_SIZE = 4096


def table(
    ranks: list[int], ms: float | None = 1.0, name: str = "t", reason: str | None = None
) -> TablePlan:
    """One GiB and `ms` on each rank."""
    shards = tuple(
        Shard(
            rank=rank, row_offset=0, rows=1000, column_offset=64 * i, columns=64, cost_ms=ms,
            memory_bytes=GIB,
        )
        for i, rank in enumerate(ranks)
    )  # fmt: skip
    kind = "table_wise" if len(ranks) == 1 else "column_wise"
    spec = TableSpec(name=name, num_embeddings=1000, embedding_dim=64 * len(ranks))
    return TablePlan(
        sharding_type=kind, compute_kernel="fused", shards=shards, spec=spec, reason=reason
    )


def hand_made(
    tables: dict[str, TablePlan],
    stages: list[tuple[float, float, float, float]],
    topology: Topology,
    memory: list[int] | None = None,
) -> Plan:
    """A plan whose devices have these stages; each may take 8 GiB."""
    memory = memory or [GIB] * len(stages)
    devices = tuple(
        DevicePlan(
            rank=rank, forward_compute_ms=a, forward_comm_ms=b, backward_compute_ms=c,
            backward_comm_ms=d, total_ms=a + b + c + d, memory_bytes=memory[rank],
            memory_limit_bytes=8 * GIB,
        )
        for rank, (a, b, c, d) in enumerate(stages)
    )  # fmt: skip
    totals = [sum(device) for device in stages]
    step = sum(max(stage) for stage in zip(*stages, strict=True))
    predicted = Predicted(
        step_ms=step,
        bound_ms=step / 2,
        gap_percent=100.0,
        max_over_mean=max(totals) * len(totals) / sum(totals),
    )
    return Plan(
        objective="stages", cost_model="by hand", batch_size=BATCH_SIZE, topology=topology,
        predicted=predicted, devices=devices, tables=tables,
    )  # fmt: skip


def without_costs(names: tuple[str, ...] = ("a", "b")) -> Plan:
    """By rule on two devices: nothing is predicted."""
    specs = [TableSpec(name=name, num_embeddings=1000, embedding_dim=16) for name in names]
    rule = ShardingRule(sharding_type="row_wise")
    return plan_by_rule(specs, Topology(world_size=2, local_world_size=2), rule)


def generated(tables: int, topology: str, seed: int = 0) -> Plan:
    """Tables of all sizes and sharding types, with TorchRec's costs."""
    numbers = random.Random(seed)
    specs = [
        TableSpec(
            name=f"table_{i}",
            num_embeddings=int(10 ** numbers.uniform(2, 6.9)),
            embedding_dim=numbers.choice([16, 32, 64, 128, 256]),
            pooling_factor=10 ** numbers.uniform(0, 2),
        )
        for i in range(tables)
    ]
    kinds = ["table_wise"] * 12 + ["column_wise"] * 4
    kinds += ["row_wise", "table_row_wise", "grid_shard", "table_column_wise"]
    rules = {
        spec.name: ShardingRule.model_validate({"sharding_type": numbers.choice(kinds)})
        for spec in specs
    }
    plan = plan_by_rule(
        specs, parse_topology(topology), ShardingRule(sharding_type="table_wise"), rules
    )
    return predict(plan, TorchRecEstimate(BATCH_SIZE), BATCH_SIZE)
