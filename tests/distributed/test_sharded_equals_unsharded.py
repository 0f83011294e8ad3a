"""Sharded training equals unsharded training, for every sharding type."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from planner import Plan, ShardingRule, TablePlan, TableSpec, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from tests.distributed import sharded
from tests.distributed.pool import WorkerPool
from tests.distributed.reference import TABLES, Reference, Rows, draw_rows

BATCH_SIZE = 6
OPTIMIZERS = [
    *(("sgd", "sgd"), ("adagrad", "adagrad"), ("rowwise_adagrad", "adam")),
    *(("adam", "adamw"), ("partial_rowwise_adam", "sgd"), ("lamb", "sgd")),
]
# They keep or compute one value for a row of each column shard.
ROWWISE = ("rowwise_adagrad", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb")

# Relative and absolute. A GPU sums in another order than the reference; a wrong step is far off.
TOLERANCES = {"cpu": (1e-5, 1e-6), "cuda": (1e-4, 1e-5)}


def specs(optimizer: str) -> list[TableSpec]:
    return [
        TableSpec(name=t.name, num_embeddings=t.rows, embedding_dim=t.dim, optimizer=optimizer)
        for t in TABLES
    ]


def draw_steps(world_size: int) -> list[Rows]:
    """Four full steps and a last one that leaves some ranks with few rows or none."""
    generator = torch.Generator().manual_seed(3)
    full = [draw_rows(world_size * BATCH_SIZE, generator) for _ in range(4)]
    return [*full, draw_rows(world_size * BATCH_SIZE // 2 + 1, generator)]


def column_shards(plan: Plan) -> dict[str, int]:
    return {n: len({s.column_offset for s in t.shards}) for n, t in plan.tables.items()}


def assemble(
    name: str, expected: torch.Tensor, by_rank: list[dict[str, Any]], plan: Plan
) -> torch.Tensor:
    """One tensor from what all ranks hold; NaN where no rank holds anything."""
    whole = torch.full_like(expected, torch.nan)
    for rank, held in enumerate(by_rank):
        pieces = held.get(name, [])
        if is_rowwise_state(name, expected):
            pieces = at_plan_offsets(pieces, plan.tables[name.removesuffix(".state")], rank)
        for row, column, values in pieces:
            if values.dim() == 1:
                whole[row : row + len(values)] = values
            else:
                whole[row : row + values.shape[0], column : column + values.shape[1]] = values
    return whole


def is_rowwise_state(name: str, expected: torch.Tensor) -> bool:
    return name.endswith(".state") and expected.shape[1] != DIMS[name.removesuffix(".state")]


def at_plan_offsets(pieces: list[Any], table: TablePlan, rank: int) -> list[Any]:
    """TorchRec lists the momentum of column shards one below the other; the plan knows better."""
    if table.sharding_type == "data_parallel":
        return pieces
    shards = [shard for shard in table.shards if shard.rank == rank]
    return [
        (shard.row_offset, shard.column_offset // shard.columns, values.reshape(-1, 1))
        for shard, (_, _, values) in zip(shards, pieces, strict=True)
    ]


DIMS = {table.name: table.dim for table in TABLES}


def check(pool: WorkerPool, plan: Plan, tables: str, dense: str, weighted: bool) -> None:
    steps = draw_steps(pool.world_size)
    shards = column_shards(plan) if tables in ROWWISE else {}
    expected = Reference(tables, dense, weighted, shards).train(steps)
    held = pool.run(sharded.train, plan, tables, dense, weighted, steps, BATCH_SIZE, pool.device)
    compare(held, expected, plan, *TOLERANCES[pool.device])


def compare(
    held: list[dict[str, Any]],
    expected: dict[str, torch.Tensor],
    plan: Plan,
    rtol: float,
    atol: float,
) -> None:
    """What all ranks hold is, put together, what is expected."""
    for name, value in expected.items():
        found = assemble(name, value, held, plan)
        torch.testing.assert_close(
            found, value, rtol=rtol, atol=atol, msg=partial(_with_name, name)
        )


def _with_name(name: str, message: str) -> str:
    return f"{name}: {message}"


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("tables", "dense"), OPTIMIZERS)
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_every_type(
    pool: WorkerPool, sharding_type: str, tables: str, dense: str, weighted: bool
) -> None:
    """After five steps tables, optimizer states and dense weights are the reference's."""
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    plan = plan_by_rule(specs(tables), topology, ShardingRule(sharding_type=sharding_type))
    check(pool, plan, tables, dense, weighted)
