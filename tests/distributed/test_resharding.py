"""Checkpoints are independent of the plan: saved under one, loaded under any other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from planner import Plan, ShardingRule, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb.checkpoint.checkpoints import Checkpoints
from tests.distributed import sharded
from tests.distributed.pool import WorkerPool
from tests.distributed.reference import TABLES, Reference, Rows, draw_rows
from tests.distributed.test_sharded_equals_unsharded import (
    ROWWISE,
    assemble,
    column_shards,
    specs,
)

GLOBAL_BATCH, STEPS = 12, 3
WORLD_SIZES = (1, 2, 4)
DENSE = {
    **{"sgd": "adagrad", "adagrad": "sgd", "rowwise_adagrad": "adam"},
    **{"adam": "sgd", "partial_rowwise_adam": "adamw"},
}

WORLDS = list(product(WORLD_SIZES, WORLD_SIZES))
TYPES = list(product(SHARDING_TYPES, SHARDING_TYPES))
# Every pair of types once with each optimizer, and every pair of numbers of ranks many times.
SOME = [
    (*types, *WORLDS[(number * 5 + offset) % len(WORLDS)], optimizer)
    for offset, optimizer in enumerate(("adagrad", "rowwise_adagrad", "adam"))
    for number, types in enumerate(TYPES)
]
ALL = [(*types, *worlds, optimizer) for types in TYPES for worlds in WORLDS for optimizer in DENSE]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    started = {world_size: WorkerPool(world_size, world_size) for world_size in WORLD_SIZES}
    yield started
    for each in started.values():
        each.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def steps() -> list[Rows]:
    generator = torch.Generator().manual_seed(5)
    return [draw_rows(GLOBAL_BATCH, generator) for _ in range(STEPS + 1)]


def plan_of(sharding_type: str, optimizer: str, world_size: int) -> Plan:
    topology = Topology(world_size=world_size, local_world_size=world_size)
    return plan_by_rule(specs(optimizer), topology, ShardingRule(sharding_type=sharding_type))


# --- In the workers


def train_and_save(plan: Plan, optimizer: str, folder: str) -> dict[str, Any]:
    trainer = sharded.make_trainer(plan, optimizer, DENSE[optimizer], True, "cpu")
    batch_size = GLOBAL_BATCH // plan.topology.world_size
    sharded.train_steps(trainer, steps()[:STEPS], batch_size, weighted=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(trainer)
    checkpoints.wait()
    return sharded.holdings(trainer.model, trainer)


def load_and_step(
    plan: Plan, optimizer: str, folder: str
) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int]]:
    """What the rank holds after loading, and after one more step; steps and samples then."""
    trainer = sharded.make_trainer(plan, optimizer, DENSE[optimizer], True, "cpu")
    Checkpoints(folder).load(trainer)
    loaded = sharded.holdings(trainer.model, trainer)
    batch_size = GLOBAL_BATCH // plan.topology.world_size
    sharded.train_steps(trainer, steps()[STEPS:], batch_size, weighted=True)
    return loaded, sharded.holdings(trainer.model, trainer), (trainer.step, trainer.samples)


# --- What must come of it


@cache
def reference(optimizer: str, count: int, shards: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    return Reference(optimizer, DENSE[optimizer], True, dict(shards)).train(steps()[:count])


def shards_of(plan: Plan, optimizer: str) -> dict[str, int]:
    """More than one momentum a row: where a row-wise optimizer has column shards."""
    return column_shards(plan) if optimizer in ROWWISE else {}


def joined(state: torch.Tensor, dim: int, shards: int) -> torch.Tensor:
    """The momentum of each row for each of `shards` columns shards: means over their columns."""
    of_columns = state.repeat_interleave(dim // state.shape[1], dim=1)
    return of_columns.view(len(state), shards, -1).mean(dim=2)


def check(
    pools: dict[int, WorkerPool], folder: Path, source: Plan, target: Plan, optimizer: str
) -> None:
    before = saved_once(pools, folder, source, optimizer)
    after, stepped, counts = zip(
        *pools[target.topology.world_size].run(
            load_and_step, target, optimizer, saved_at(folder, source, optimizer)
        ),
        strict=True,
    )
    assert set(counts) == {(STEPS + 1, GLOBAL_BATCH * (STEPS + 1))}

    old_shards, new_shards = shards_of(source, optimizer), shards_of(target, optimizer)
    trained = reference(optimizer, STEPS, tuple(old_shards.items()))
    dims = {f"{table.name}.state": (table.name, table.dim) for table in TABLES}
    for name, value in trained.items():
        was = assemble(name, value, before, source)
        torch.testing.assert_close(was, value, rtol=1e-5, atol=1e-6)
        if name in dims and optimizer in ROWWISE:
            table, dim = dims[name]
            expected = joined(was, dim, new_shards[table])
        else:
            expected = was
        found = assemble(name, expected, list(after), target)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, msg=name)
        if not (set(old_shards.values()) | set(new_shards.values())) - {1}:
            assert torch.equal(found, was), f"{name} is not bit for bit what was saved"

    if set(old_shards.values()) | set(new_shards.values()) <= {1}:
        for name, value in reference(optimizer, STEPS + 1, tuple(new_shards.items())).items():
            found = assemble(name, value, list(stepped), target)
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=name)


_SAVED: dict[str, list[dict[str, Any]]] = {}


def saved_at(folder: Path, plan: Plan, optimizer: str) -> str:
    return str(folder / f"{plan.fingerprint}-{plan.topology.world_size}-{optimizer}")


def saved_once(
    pools: dict[int, WorkerPool], folder: Path, plan: Plan, optimizer: str
) -> list[dict[str, Any]]:
    path = saved_at(folder, plan, optimizer)
    if path not in _SAVED:
        pool = pools[plan.topology.world_size]
        _SAVED[path] = pool.run(train_and_save, plan, optimizer, path)
    return _SAVED[path]


def _id(case: tuple[Any, ...]) -> str:
    source, target, old, new, optimizer = case
    return f"{source}x{old}-{target}x{new}-{optimizer}"


@pytest.mark.parametrize("case", SOME, ids=map(_id, SOME))
def test_any_plan_loads_what_any_other_saved(
    pools: dict[int, WorkerPool], folder: Path, case: tuple[Any, ...]
) -> None:
    """Weights and optimizer states after loading are those before, and one more step gives what
    unsharded training gives. Column shards of row-wise Adagrad have the means of their columns."""
    source, target, old, new, optimizer = case
    plans = plan_of(source, optimizer, old), plan_of(target, optimizer, new)
    check(pools, folder, *plans, optimizer)


@pytest.mark.slow
def test_all_pairs_of_plans(pools: dict[int, WorkerPool], folder: Path) -> None:
    """The same for every pair of types and numbers of ranks with every optimizer."""
    for source, target, old, new, optimizer in ALL:
        plans = plan_of(source, optimizer, old), plan_of(target, optimizer, new)
        check(pools, folder, *plans, optimizer)
