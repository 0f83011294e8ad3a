"""Tables that are trained in different ways in one model, frozen for a while, or clipped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from planner import Plan, RequestError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb.checkpoint.checkpoints import Checkpoints
from shardemb.checkpoint.state import table_pieces
from shardemb.optimizer_config import FreezeConfig, GradientClippingConfig, TableOptimizerConfig
from shardemb.sharding.kernels import kernels
from shardemb.sharding.shard_model import shard_model
from tests.distributed import sharded
from tests.distributed.pool import WorkerPool
from tests.distributed.reference import TABLES, Reference, Rows, Rule
from tests.distributed.test_sharded_equals_unsharded import (
    BATCH_SIZE,
    ROWWISE,
    TOLERANCES,
    column_shards,
    compare,
    draw_steps,
)

SOME = {
    "narrow": Rule("adam", lr=0.05, weight_decay=0.2),
    "mean": Rule("rowwise_adagrad", lr=0.2, weight_decay=0.3),
    "tiny": Rule("sgd", lr=0.3, max_gradient=2e-3),
    "shared": Rule("partial_rowwise_lamb", lr=0.02),
}
OTHERS = {
    "narrow": Rule("lamb", lr=0.03, weight_decay=0.1),
    "mean": Rule("adagrad", max_gradient=1e-3),
    "tiny": Rule("adam", weight_decay=0.1, frozen=range(2, 4)),
    "shared": Rule("partial_rowwise_adam", frozen=range(1, 3)),
}
AGAIN = {
    "narrow": Rule("rowwise_adagrad", frozen=range(1, 3)),
    "mean": Rule("adam", lr=0.02),
    "tiny": Rule("rowwise_adagrad", weight_decay=0.5, frozen=range(3, 9)),
    "shared": Rule("adam", lr=0.03, max_gradient=1e-3),
}
NORM, VALUE = 0.05, 0.01

two_shapes = pytest.mark.shapes((2, 2), (4, 2))
two_hosts = pytest.mark.shapes((4, 2))


def plan_of(pool: WorkerPool, sharding_type: str, rules: dict[str, Rule]) -> Plan:
    specs = [
        TableSpec(
            name=t.name, num_embeddings=t.rows, embedding_dim=t.dim, optimizer=rules[t.name].name
        )
        for t in TABLES
    ]
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    return plan_by_rule(specs, topology, ShardingRule(sharding_type=sharding_type))


def shards_of(plan: Plan, rules: dict[str, Rule]) -> dict[str, int]:
    return {n: count for n, count in column_shards(plan).items() if rules[n].name in ROWWISE}


CASES = {
    "some": (SOME, GradientClippingConfig(norm=NORM), partial(clip_grad_norm_, max_norm=NORM)),
    "others": (
        OTHERS,
        GradientClippingConfig(value=VALUE),
        partial(clip_grad_value_, clip_value=VALUE),
    ),
    "again": (AGAIN, GradientClippingConfig(), lambda _: None),
}


@two_shapes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_every_type(pool: WorkerPool, sharding_type: str, case: str) -> None:
    """Each table has its optimizer, rate, decay, limit and frozen steps, and dense gradients are
    clipped as PyTorch's own functions do: all equals unsharded training."""
    check_case(pool, sharding_type, case)


def check_case(pool: WorkerPool, sharding_type: str, case: str) -> None:
    rules, clipping, clip = CASES[case]
    plan, steps = plan_of(pool, sharding_type, rules), draw_steps(pool.world_size)
    expected = Reference("sgd", "sgd", True, shards_of(plan, rules), rules, clip).train(steps)
    own = sharded.Own(rules, clipping)
    held = pool.run(sharded.train, plan, "sgd", "sgd", True, steps, BATCH_SIZE, pool.device, own)
    compare(held, expected, plan, *TOLERANCES[pool.device])


def test_the_limits_of_the_cases_limit() -> None:
    """Without its limits and clipping each case trains differently: the test above shows them."""
    steps = draw_steps(2)
    for rules, _, clip in list(CASES.values())[:2]:
        unlimited = {name: replace(rule, max_gradient=None) for name, rule in rules.items()}
        clipped = Reference("sgd", "sgd", True, {}, rules, clip).train(steps)
        without_clip = Reference("sgd", "sgd", True, {}, rules).train(steps)
        without_limit = Reference("sgd", "sgd", True, {}, unlimited, clip).train(steps)
        limited = next(name for name, rule in rules.items() if rule.max_gradient)
        assert (clipped["hidden.weight"] - without_clip["hidden.weight"]).abs().max() > 1e-3
        assert (clipped[limited] - without_limit[limited]).abs().max() > 1e-4


# --- Freezing


def bits(trainer: Any, table: str) -> list[torch.Tensor]:
    """Copies of all that this rank holds of a table: weights and optimizer state."""
    pieces = table_pieces(trainer.model, trainer.optimizer)
    return [piece.tensor.detach().clone() for piece in pieces if piece.table == table]


def freeze_and_thaw(plan: Plan, rules: dict[str, Rule], steps: list[Rows]) -> list[dict[str, bool]]:
    """For each step, which tables have the bits they had before, on this rank."""
    trainer = sharded.make_trainer(plan, "sgd", "sgd", True, "cpu", sharded.Own(rules))
    same = []
    for rows in steps:
        before = {table.name: bits(trainer, table.name) for table in TABLES}
        sharded.train_steps(trainer, [rows], BATCH_SIZE, weighted=True)
        same.append(
            {name: all(map(torch.equal, old, bits(trainer, name))) for name, old in before.items()}
        )
    return same


@two_hosts
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_a_frozen_table_keeps_its_bits(pool: WorkerPool, sharding_type: str) -> None:
    """With momentum and weight decay at work, in the steps in which it is frozen and in no other;
    so do tables that share nothing but the rank with it."""
    rules = {
        "narrow": Rule("adam", weight_decay=0.1, frozen=range(3, 5)),
        "mean": Rule("adam", weight_decay=0.1),
        "tiny": Rule("rowwise_adagrad", weight_decay=0.1, frozen=range(3, 5)),
        "shared": Rule("lamb", frozen=range(1, 3)),
    }
    plan, steps = plan_of(pool, sharding_type, rules), draw_steps(pool.world_size)
    by_rank = pool.run(freeze_and_thaw, plan, rules, steps)
    for step, same in enumerate(zip(*by_rank, strict=True), start=1):
        for name, rule in rules.items():
            is_unchanged = all(rank[name] for rank in same)
            assert is_unchanged == (step in rule.frozen), (step, name)


def count_steps(plan: Plan, steps: list[Rows]) -> list[tuple[int, int]]:
    """What kernels count after training, after evaluation, and when they are told to."""
    rules = {"mean": Rule("rowwise_adagrad", frozen=range(2, 4))}
    trainer = sharded.make_trainer(plan, "rowwise_adagrad", "sgd", True, "cpu", sharded.Own(rules))
    sharded.train_steps(trainer, steps[:4], BATCH_SIZE, weighted=True)
    batch = sharded.pad_batch(steps[0].part(0, BATCH_SIZE), BATCH_SIZE, len(steps[0]), True)
    with torch.no_grad():
        trainer.model(batch)
    return [
        (2 if kernel.tables == ("mean",) else 4, int(kernel.module.iter_cpu))
        for kernel in kernels(trainer.model)
    ]


@two_hosts
def test_only_steps_that_train_are_counted(pool: WorkerPool) -> None:
    """FBGEMM's kernels, whose count corrects Adam's moments, do not count frozen steps and
    evaluation; kernels are shared by tables that freeze together alone."""
    rules = {table.name: Rule("rowwise_adagrad") for table in TABLES}
    plan = plan_of(pool, "row_wise", rules)
    for counts in pool.run(count_steps, plan, draw_steps(pool.world_size)):
        assert {expected for expected, _ in counts} == {2, 4}
        assert all(found == expected for expected, found in counts)


# --- Checkpoints


def save(plan: Plan, rules: dict[str, Rule], folder: str, steps: list[Rows]) -> None:
    trainer = sharded.make_trainer(plan, "sgd", "adam", True, "cpu", sharded.Own(rules))
    sharded.train_steps(trainer, steps, BATCH_SIZE, weighted=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(trainer)
    checkpoints.wait()


def load_and_step(
    plan: Plan, rules: dict[str, Rule], folder: str, steps: list[Rows]
) -> dict[str, Any]:
    trainer = sharded.make_trainer(plan, "sgd", "adam", True, "cpu", sharded.Own(rules))
    Checkpoints(folder).load(trainer)
    sharded.train_steps(trainer, steps, BATCH_SIZE, weighted=True)
    return sharded.holdings(trainer.model, trainer)


@two_hosts
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        *(("table_wise", "row_wise"), ("row_wise", "data_parallel")),
        *(("data_parallel", "table_row_wise"), ("table_row_wise", "table_wise")),
    ],
)
def test_other_plans_go_on(
    pool: WorkerPool, tmp_path: Path, source: str, target: str, case: str
) -> None:
    """Saved under one plan within or after frozen steps and loaded under another: the steps that
    follow are those of unsharded training that never stopped."""
    rules = CASES[case][0]
    steps, folder = draw_steps(pool.world_size), str(tmp_path / "kept")
    pool.run(save, plan_of(pool, source, rules), rules, folder, steps[:3])
    plan = plan_of(pool, target, rules)
    held = pool.run(load_and_step, plan, rules, folder, steps[3:])
    expected = Reference("sgd", "adam", True, {}, rules).train(steps)
    compare(held, expected, plan, *TOLERANCES["cpu"])


# --- Mistakes


def refusal(plan: Plan, options: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        shard_model(sharded.Model(weighted=False), plan, **options)
    return str(caught.value)


@two_hosts
def test_names_of_tables_that_there_are_not(pool: WorkerPool) -> None:
    """They are told with the nearest that there is."""
    plan = plan_of(pool, "row_wise", SOME)
    told = pool.run(refusal, plan, {"frozen": {"narow": FreezeConfig()}})
    assert set(told) == {"frozen: there is no table narow; did you mean narrow?"}
    told = pool.run(refusal, plan, {"table_optimizers": {"mena": TableOptimizerConfig()}})
    assert set(told) == {"table_optimizers: there is no table mena; did you mean mean?"}
