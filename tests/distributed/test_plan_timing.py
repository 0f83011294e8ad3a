"""Plans that are run to be timed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from planner import Plan, RequestError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.geometry import ShardingType
from shardemb.checkpoint.state import table_pieces
from shardemb.profiler.plan_timing import PlanTiming, TimedPlan, refuse_unknown, time_plan
from shardemb.profiler.workloads import PLAN_TYPES, draw_plan
from tests.distributed.pool import WorkerPool

CPU = torch.device("cpu")
BATCH_SIZE = 64

pytestmark = pytest.mark.shapes((2, 2), (4, 2))


def plan_for(
    pool: WorkerPool, *, weighted: bool = False, batch_size: int | None = BATCH_SIZE
) -> Plan:
    """A table of each type, and one that two features look up."""
    types: tuple[ShardingType, ...] = (*PLAN_TYPES, "table_wise")
    tables = [
        TableSpec(
            name=f"t{i}",
            num_embeddings=500,
            embedding_dim=16,
            pooling_factor=2.5,
            num_features=1 + (i == 0),
            weighted=weighted and i % 2 == 0,
        )
        for i in range(len(types))
    ]
    rules = {
        t.name: ShardingRule(sharding_type=kind) for t, kind in zip(tables, types, strict=True)
    }
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    plan = plan_by_rule(tables, topology, ShardingRule(sharding_type="row_wise"), rules)
    return plan.model_copy(update={"batch_size": batch_size})


def timings(plans: list[Plan]) -> list[PlanTiming]:
    return [time_plan(plan, CPU, repetitions=5) for plan in plans]


@pytest.mark.parametrize("weighted", [False, True])
def test_all_ranks_and_stages_are_timed(pool: WorkerPool, weighted: bool) -> None:
    """And all ranks are told the same."""
    found = [each for (each,) in pool.run(timings, [plan_for(pool, weighted=weighted)])]
    for timing in found:
        assert timing.stages.shape == (pool.world_size, 4) and (timing.stages > 0).all()
        assert (timing.stages == found[0].stages).all() and timing.step == found[0].step
        assert timing.step.median_ms > 0 and timing.step.repetitions == 5


def updated(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables and their states on this rank after a step in one go, and after one in stages."""
    found = []
    for run in (TimedPlan.step, TimedPlan.stages):
        timed = TimedPlan(plan, CPU, seed=0)
        run(timed)
        pieces = table_pieces(timed.model, timed.optimizer)
        found.append({piece.key: piece.tensor.clone() for piece in pieces})
    return found[0], found[1]


def test_stages_are_those_of_a_step(pool: WorkerPool) -> None:
    """Run one by one they train the tables as a step does."""
    for whole, staged in pool.run(updated, plan_for(pool)):
        assert whole.keys() == staged.keys() and whole
        assert all(torch.allclose(whole[name], staged[name], rtol=1e-6) for name in whole)
        assert any((value != 0.01).any() for value in whole.values())


def test_drawn_plans_run(pool: WorkerPool) -> None:
    """Those of a profile: valid, of several types, the same whoever draws them."""
    plans = [draw_plan(1, number, pool.world_size, "cpu") for number in range(12)]
    assert plans == [draw_plan(1, number, pool.world_size, "cpu") for number in range(12)]
    types = {table.sharding_type for plan in plans for table in plan.tables.values()}
    assert {"table_wise", "row_wise", "data_parallel"} <= types
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    changes = {"batch_size": 8, "topology": topology}  # the types drawn know nothing of hosts
    small = [plan.model_copy(update=changes) for plan in plans[:3]]
    for found in pool.run(timings, small):
        assert all(np.isfinite(timing.stages).all() for timing in found)


def test_what_cannot_be_timed_is_refused(pool: WorkerPool) -> None:
    plan = plan_for(pool)
    with pytest.raises(RequestError, match="--batch-size"):
        refuse_unknown(plan.model_copy(update={"batch_size": None}))
    spec = plan.tables["t1"].spec
    assert spec is not None
    unpooled = plan.tables["t1"].model_copy(
        update={"spec": spec.model_copy(update={"pooled": False})}
    )
    with pytest.raises(RequestError, match="table t1 is not pooled"):
        refuse_unknown(plan.model_copy(update={"tables": plan.tables | {"t1": unpooled}}))
