"""Ids are exchanged a step ahead where the model takes them as the batch has them, and only there.

That training stays the same is in test_sharded_equals_unsharded, whose steps exchange ids ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from planner import Plan, ShardingRule, Topology, plan_by_rule
from shardemb.data.batch import Batch
from tests.distributed import sharded
from tests.distributed.pool import DeviceType, WorkerPool
from tests.distributed.test_sharded_equals_unsharded import BATCH_SIZE, draw_steps, specs

pytestmark = pytest.mark.shapes((2, 2))


def plan_for(pool: WorkerPool) -> Plan:
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    return plan_by_rule(specs("adagrad"), topology, ShardingRule(sharding_type="row_wise"))


class Copying(sharded.Model):
    """Looks up ids that are not the batch's own tensor."""

    def forward(self, batch: Batch) -> torch.Tensor:
        ids = batch.sparse
        batch.sparse = KeyedJaggedTensor(ids.keys(), ids.values(), lengths=ids.lengths())
        return super().forward(batch)


def exchanges(
    plan: Plan, device: DeviceType, copies: bool, is_ahead: bool, evaluates: bool
) -> tuple[list[list[str]], dict[str, Any]]:
    """Of each step, in their order, what was done; and what the rank holds in the end."""
    with pytest.MonkeyPatch.context() as patch:
        if copies:
            patch.setattr(sharded, "Model", Copying)
        trainer = sharded.make_trainer(plan, "adagrad", "sgd", False, device)
    collection = trainer.model.module.embeddings
    done: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any) -> Any:
            done.append(name)
            return function(*args)

        return note

    collection.input_dist = noted("exchange", collection.input_dist)
    look_up = collection.compute_and_output_dist
    collection.compute_and_output_dist = noted("look up", look_up)
    batches = sharded.own_batches(draw_steps(plan.topology.world_size)[:4], BATCH_SIZE, False)
    in_steps = []
    for number, batch in enumerate(batches):
        following = batches[number + 1] if is_ahead and number < 2 else None
        trainer.train_step(batch, following)
        if evaluates:
            trainer.evaluate(batches[:1])
        in_steps.append(done[:])
        done.clear()
    return in_steps, sharded.holdings(trainer.model, trainer)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_ids_are_exchanged_ahead(pool: WorkerPool, copies: bool, evaluates: bool) -> None:
    """From the second step on, when it is known what the model looks up, and until none follow."""
    plan = plan_for(pool)
    plain = pool.run(exchanges, plan, pool.device, copies, False, evaluates)
    ahead = pool.run(exchanges, plan, pool.device, copies, True, evaluates)
    alone = ["exchange", "look up"]
    evaluation = alone if evaluates else []
    if copies:
        expected = [alone + evaluation] * 4
    else:
        lookups = [alone, ["exchange", "exchange", "look up"], ["look up"], alone]
        expected = [each + evaluation for each in lookups]
    for (steps, held), (steps_ahead, held_ahead) in zip(plain, ahead, strict=True):
        assert steps == [alone + evaluation] * 4
        assert steps_ahead == expected
        for name, pieces in held.items():
            for (*_, values), (*_, others) in zip(pieces, held_ahead[name], strict=True):
                assert torch.equal(values, others), name


def train_out_of_turn(plan: Plan, device: DeviceType, announces: bool) -> dict[str, Any]:
    """What a rank holds after steps of which two were not the announced ones."""
    trainer = sharded.make_trainer(plan, "adagrad", "sgd", False, device)
    batches = sharded.own_batches(draw_steps(plan.topology.world_size)[:5], BATCH_SIZE, False)
    announced = [batches[1], batches[4], batches[0], None, None] if announces else [None] * 5
    for batch, following in zip(batches, announced, strict=True):
        trainer.train_step(batch, following)
    return sharded.holdings(trainer.model, trainer)


def test_another_batch_than_was_announced(pool: WorkerPool) -> None:
    """It is trained all the same, and ids that were sent ahead for nothing are forgotten."""
    plan = plan_for(pool)
    plain = pool.run(train_out_of_turn, plan, pool.device, False)
    announced = pool.run(train_out_of_turn, plan, pool.device, True)
    for held, others in zip(plain, announced, strict=True):
        for name, pieces in held.items():
            for (*_, values), (*_, own) in zip(pieces, others[name], strict=True):
                assert torch.equal(values, own), name
