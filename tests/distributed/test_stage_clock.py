"""The stages of embedding collections within training steps."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from planner import Plan, ShardingRule, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES, ShardingType
from shardemb.metrics.stage_clock import StageClock
from tests.distributed import sharded
from tests.distributed.pool import DeviceType, WorkerPool
from tests.distributed.test_sharded_equals_unsharded import BATCH_SIZE, draw_steps, specs

pytestmark = pytest.mark.shapes((2, 2), (4, 2))


def plan_for(pool: WorkerPool, *types: ShardingType) -> Plan:
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    tables = specs("adagrad")
    rules = {
        table.name: ShardingRule(sharding_type=types[i % len(types)])
        for i, table in enumerate(tables)
    }
    return plan_by_rule(tables, topology, rules[tables[0].name], rules)


def train(plan: Plan, timed: bool, device: DeviceType) -> dict[str, Any]:
    """What a rank holds after a few steps, and what its clock says."""
    trainer = sharded.make_trainer(plan, "adagrad", "sgd", False, device)
    clock = StageClock(trainer.model, trainer.device)
    seconds = 0.0
    for rows in draw_steps(plan.topology.world_size):
        start = time.perf_counter()
        with clock.step() if timed else nullcontext():
            sharded.train_steps(trainer, [rows], BATCH_SIZE, False)
        seconds += time.perf_counter() - start
    is_left = ["input_dist" in vars(module) for module in trainer.model.modules()]
    return {
        "held": sharded.holdings(trainer.model, trainer),
        "stages": clock.stages(),
        "steps": clock.steps,
        "ms": 1000 * seconds,
        "is_left": any(is_left),
    }


@pytest.mark.parametrize(
    "types",
    [
        SHARDING_TYPES,
        ("data_parallel",),
        *(pytest.param((name,), marks=pytest.mark.slow) for name in SHARDING_TYPES[:-1]),
    ],
)
def test_a_timed_step_is_a_step(pool: WorkerPool, types: tuple[ShardingType, ...]) -> None:
    """To the bit, and nothing of the clock stays; the stages fit into the time of the steps."""
    plan = plan_for(pool, *types)
    plain = pool.run(train, plan, False, pool.device)
    timed = pool.run(train, plan, True, pool.device)
    for without, with_clock in zip(plain, timed, strict=True):
        assert without["stages"] is None and not with_clock["is_left"]
        assert with_clock["held"].keys() == without["held"].keys()
        for name, pieces in without["held"].items():
            for (*_, values), (*_, others) in zip(pieces, with_clock["held"][name], strict=True):
                assert torch.equal(values, others), name
    stages = timed[0]["stages"]
    assert stages.shape == (pool.world_size, 4) and (stages[:, :3] > 0).all()
    has_exchange = pool.world_size > 1 and types != ("data_parallel",)
    assert (stages[:, 3] > 0).all() or not has_exchange
    for rank, found in enumerate(timed):
        assert (found["stages"] == stages).all()
        assert stages[rank].sum() < found["ms"] and found["steps"] == 5
