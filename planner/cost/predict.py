"""A plan with the costs that a model predicts for it."""

from __future__ import annotations

from collections.abc import Iterable

from planner.cost.stages import CostModel, StageCost
from planner.geometry import Block
from planner.plan import DevicePlan, Plan, Predicted, Shard
from planner.tables import TableSpec


def predict(plan: Plan, tables: Iterable[TableSpec], model: CostModel) -> Plan:
    """`plan` with each shard's cost, each device's stages and the step time.

    Collectives synchronize, so a step takes the sum over its four stages of the slowest device
    (the objective `stages`).
    """
    specs = {table.name: table for table in tables}
    stages = [[0.0] * len(StageCost._fields) for _ in plan.devices]
    planned = {}
    for name, table in plan.tables.items():
        shards = []
        for shard in table.shards:
            cost = model.shard_cost(specs[name], table.sharding_type, _block(shard), plan.topology)
            stages[shard.rank] = [a + b for a, b in zip(stages[shard.rank], cost, strict=True)]
            shards.append(shard.model_copy(update={"cost_ms": cost.total_ms}))
        planned[name] = table.model_copy(update={"shards": tuple(shards)})
    devices = [_device(d, StageCost(*s)) for d, s in zip(plan.devices, stages, strict=True)]
    totals = [device.total_ms or 0.0 for device in devices]
    mean = sum(totals) / len(totals)
    predicted = Predicted(
        step_ms=sum(map(max, zip(*stages, strict=True))),
        max_over_mean=max(totals) / mean if mean else None,
    )
    return plan.model_copy(
        update={
            "objective": "stages",
            "predicted": predicted,
            "devices": tuple(devices),
            "tables": planned,
        }
    )


def _block(shard: Shard) -> Block:
    return Block(shard.row_offset, shard.rows, shard.column_offset, shard.columns)


def _device(device: DevicePlan, cost: StageCost) -> DevicePlan:
    return device.model_copy(update={**cost._asdict(), "total_ms": cost.total_ms})
