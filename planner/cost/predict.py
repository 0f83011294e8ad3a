"""A plan with the costs that a model predicts for it, and the memory of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.cost.stages import STAGES, CostModel
from planner.plan import DevicePlan, HostPlan, Objective, Plan, Predicted, Shard
from planner.shards import KERNEL_CODE, TYPE_CODE, Floats, ShardColumns, TableColumns
from planner.storage import buffer_bytes, received_bytes, table_memory
from planner.tables import TableSpec


def predict(
    plan: Plan,
    model: CostModel,
    batch_size: int,
    objective: Objective = "stages",
    fixed_memory: int = 0,
) -> Plan:
    """`plan` with each shard's cost, each device's stages and memory, and the step time.

    Collectives synchronize, so a step takes the sum over its four stages of the slowest device
    (the objective `stages`); `max_total` takes the slowest device's sum. `fixed_memory` are bytes
    on every device besides tables and their buffers: the dense model.
    """
    specs = table_specs(plan)
    shards, ranks = shards_of(plan, specs)
    costs = model.stage_costs(shards, plan.topology)
    memory = table_memory(shards)
    stages = np.stack([_per_rank(plan, ranks, costs[:, s]) for s in range(len(STAGES))], axis=1)
    buffers = buffer_bytes(shards, plan.topology, batch_size)
    everywhere = fixed_memory + received_bytes(specs, batch_size)
    device_bytes = _per_rank(plan, ranks, memory.device + buffers) + everywhere
    host_bytes = _per_rank(plan, ranks, memory.host).reshape(plan.topology.num_hosts, -1).sum(1)
    totals = stages.sum(axis=1)
    step_ms = stages.max(axis=0).sum() if objective == "stages" else totals.max()
    return plan.model_copy(
        update={
            "objective": objective,
            "cost_model": model.name,
            "batch_size": batch_size,
            "predicted": Predicted(
                step_ms=float(step_ms),
                max_over_mean=float(totals.max() / totals.mean()) if totals.any() else None,
            ),
            "devices": _devices(plan, stages, device_bytes),
            "hosts": _hosts(plan, host_bytes),
            "tables": _tables(plan, costs.sum(axis=1), memory.device, memory.host),
        }
    )


def table_specs(plan: Plan) -> list[TableSpec]:
    """The tables that the plan is for."""
    return [_spec(plan, name) for name in plan.tables]


def _spec(plan: Plan, name: str) -> TableSpec:
    spec = plan.tables[name].spec
    assert spec is not None, f"the plan of table {name} has no spec to predict from"
    return spec


def shards_of(plan: Plan, specs: list[TableSpec]) -> tuple[ShardColumns, Any]:
    """All shards of the plan, and the rank of each."""
    rows = [
        (
            number,
            TYPE_CODE[table.sharding_type],
            KERNEL_CODE[table.compute_kernel],
            shard.rows,
            shard.columns,
            table.cache_load_factor or 0.0,
            shard.rank,
        )
        for number, table in enumerate(plan.tables.values())
        for shard in table.shards
    ]
    columns = map(np.array, zip(*rows, strict=True))
    number, sharding_type, kernel, height, width, factor, rank = columns
    shards = ShardColumns(
        TableColumns.of(specs), number, sharding_type, kernel, height, width, factor
    )
    return shards, rank


def _per_rank(plan: Plan, ranks: Any, values: Floats) -> Floats:
    return np.asarray(np.bincount(ranks, values, minlength=plan.topology.world_size), dtype=float)


def _devices(plan: Plan, stages: Floats, memory: Floats) -> tuple[DevicePlan, ...]:
    return tuple(
        DevicePlan(
            rank=rank,
            **dict(zip(STAGES, map(float, stages[rank]), strict=True)),
            total_ms=float(stages[rank].sum()),
            memory_bytes=round(memory[rank]),
            memory_limit_bytes=plan.topology.device_memory_limit_bytes,
        )
        for rank in range(plan.topology.world_size)
    )


def _hosts(plan: Plan, memory: Floats) -> tuple[HostPlan, ...]:
    limit = plan.topology.host_memory_limit_bytes
    return tuple(
        HostPlan(host=host, memory_bytes=round(used), memory_limit_bytes=limit)
        for host, used in enumerate(memory)
    )


def _tables(plan: Plan, costs: Floats, device: Floats, host: Floats) -> dict[str, Any]:
    numbers = iter(range(len(costs)))

    def with_cost(shard: Shard) -> Shard:
        i = next(numbers)  # a plan may have a million shards: they are not validated again
        return Shard.model_construct(
            rank=shard.rank,
            row_offset=shard.row_offset,
            rows=shard.rows,
            column_offset=shard.column_offset,
            columns=shard.columns,
            cost_ms=float(costs[i]),
            memory_bytes=round(device[i]),
            host_memory_bytes=round(host[i]),
        )

    return {
        name: table.model_copy(update={"shards": tuple(map(with_cost, table.shards))})
        for name, table in plan.tables.items()
    }
