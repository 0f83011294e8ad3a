"""What sharding must keep apart from the plain cases: names, first values, refusals, mixes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from planner import Plan, PlannerError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb.metrics.stage_clock import StageClock
from shardemb.optimizer_config import TableOptimizerConfig
from shardemb.sharding.initialize import BLOCK_ROWS, local_blocks
from shardemb.sharding.shard_model import shard_model
from tests.distributed.pool import WorkerPool
from tests.distributed.test_sharded_equals_unsharded import check, column_shards, specs

ROWS = 2 * BLOCK_ROWS + 77


def topology_of(pool: WorkerPool) -> Topology:
    return Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)


def test_types_mixed_in_one_model(pool: WorkerPool) -> None:
    """A model whose tables have four different sharding types equals the reference."""
    rules = {
        "narrow": ShardingRule(sharding_type="row_wise"),
        "mean": ShardingRule(sharding_type="column_wise"),
        "tiny": ShardingRule(sharding_type="data_parallel"),
    }
    default = ShardingRule(sharding_type="table_wise")
    plan = plan_by_rule(specs("adagrad"), topology_of(pool), default, rules)
    check(pool, plan, "adagrad", "adamw", weighted=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("sharding_type", ["row_wise", "table_row_wise"])
def test_a_kernel_that_holds_no_rows(pool: WorkerPool, sharding_type: str, optimizer: str) -> None:
    """The only row-wise table has three rows: a fourth rank's kernel has nothing, and trains."""
    rules = {"tiny": ShardingRule(sharding_type=sharding_type)}
    default = ShardingRule(sharding_type="table_wise")
    plan = plan_by_rule(specs(optimizer), topology_of(pool), default, rules)
    check(pool, plan, optimizer, "sgd", weighted=False)


@pytest.mark.parametrize("sharding_type", ["column_wise", "table_column_wise"])
def test_column_shards_on_one_rank(pool: WorkerPool, sharding_type: str) -> None:
    """Two column shards of a table on the same rank train as the reference does."""
    rule = ShardingRule(sharding_type=sharding_type, column_shards=2, ranks=(0, 0))
    rules = dict.fromkeys(("narrow", "mean", "tiny"), rule)
    default = ShardingRule(sharding_type="table_wise")
    plan = plan_by_rule(specs("rowwise_adagrad"), topology_of(pool), default, rules)
    assert column_shards(plan)["mean"] == 2
    check(pool, plan, "rowwise_adagrad", "sgd", weighted=True)


class OneTable(nn.Module):
    """A table on the meta device: its first values are ours to give."""

    def __init__(self, init: Any = None) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name="t", num_embeddings=ROWS, embedding_dim=8, feature_names=["f"], init_fn=init
        )
        self.embeddings = EmbeddingBagCollection(device="meta", tables=[config])


def first_values(plan: Plan, seed: int, init: Any = None) -> list[tuple[int, int, torch.Tensor]]:
    model = shard_model(OneTable(init), plan, TableOptimizerConfig(name="sgd"), seed=seed)
    value = model.state_dict()["embeddings.embedding_bags.t.weight"]
    return [(row, column, tensor.clone()) for row, column, tensor in local_blocks(value)]


def whole_table(pool: WorkerPool, sharding_type: str, seed: int) -> torch.Tensor:
    spec = TableSpec(name="t", num_embeddings=ROWS, embedding_dim=8)
    plan = plan_by_rule([spec], topology_of(pool), ShardingRule(sharding_type=sharding_type))
    whole = torch.full((ROWS, 8), torch.nan)
    for pieces in pool.run(first_values, plan, seed):
        for row, column, values in pieces:
            whole[row : row + len(values), column : column + values.shape[1]] = values
    return whole


def test_first_values_do_not_depend_on_the_plan(pool: WorkerPool) -> None:
    """One seed gives one table under every sharding type, uniform within TorchRec's bounds."""
    tables = [whole_table(pool, sharding_type, seed=5) for sharding_type in SHARDING_TYPES]
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=0, atol=0)
    bound = (1 / ROWS) ** 0.5
    assert tables[0].abs().max() <= bound
    assert abs(tables[0].std() - bound / 3**0.5) < 0.01 * bound
    assert not torch.equal(tables[0], whole_table(pool, "table_wise", seed=6))
    # Blocks are drawn from generators of their own, not the same numbers again.
    assert not torch.equal(tables[0][:77], tables[0][BLOCK_ROWS : BLOCK_ROWS + 77])


def fill_with_seven(tensor: torch.Tensor) -> None:
    nn.init.constant_(tensor, 7.0)


def test_a_tables_own_initializer_is_kept(pool: WorkerPool) -> None:
    """An init_fn of the table's config decides its first values."""
    spec = TableSpec(name="t", num_embeddings=ROWS, embedding_dim=8)
    plan = plan_by_rule([spec], topology_of(pool), ShardingRule(sharding_type="row_wise"))
    for pieces in pool.run(first_values, plan, 0, fill_with_seven):
        assert all((values == 7).all() for _, _, values in pieces)


class TwoUses(nn.Module):
    """One feature looked up in a mean and a sum table, the mean one with another feature too."""

    def __init__(self) -> None:
        super().__init__()
        make = {"embedding_dim": 4, "num_embeddings": 10}
        self.embeddings = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name="a", feature_names=["f", "g"], pooling=PoolingType.MEAN, **make
                ),
                EmbeddingBagConfig(name="b", feature_names=["f"], **make),
            ]
        )
        with torch.no_grad():
            for bag in self.embeddings.embedding_bags.values():
                bag.weight.copy_(torch.arange(40.0).view(10, 4))


def pooled_by_name(plan: Plan, module: Any) -> dict[str, torch.Tensor]:
    model = shard_model(module(), plan, TableOptimizerConfig(name="sgd"))
    features = KeyedJaggedTensor(
        keys=["f", "g"], values=torch.tensor([1, 2, 5, 7, 8]), lengths=torch.tensor([2, 1, 0, 2])
    )
    with torch.no_grad():
        pooled = model.module.embeddings(features)
        return {name: pooled[name].clone() for name in pooled.keys()}  # noqa: SIM118


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_a_feature_of_two_tables_is_divided_where_its_table_says_mean(
    pool: WorkerPool, sharding_type: str
) -> None:
    """Mean pooling goes by table, not by feature; an empty bag is zero."""
    table = TableSpec(name="a", num_embeddings=10, embedding_dim=4)
    plan = plan_by_rule(
        [table, table.model_copy(update={"name": "b"})],
        topology_of(pool),
        ShardingRule(sharding_type=sharding_type),
    )
    rows = torch.arange(40.0).view(10, 4)
    expected = {
        "f@a": torch.stack([(rows[1] + rows[2]) / 2, rows[5]]),
        "g": torch.stack([torch.zeros(4), (rows[7] + rows[8]) / 2]),
        "f@b": torch.stack([rows[1] + rows[2], rows[5]]),
    }
    for pooled in pool.run(pooled_by_name, plan, TwoUses):
        assert pooled.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(pooled[name], value)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = EmbeddingConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["f"])
        self.embeddings = EmbeddingCollection(tables=[config])
        with torch.no_grad():
            self.embeddings.embeddings["t"].weight.copy_(torch.arange(40.0).view(10, 4))


def sequence_rows(plan: Plan, optimizer: str, timed: bool) -> torch.Tensor:
    model = shard_model(Sequence(), plan, TableOptimizerConfig(name=optimizer, lr=1.0))
    features = KeyedJaggedTensor(
        keys=["f"], values=torch.tensor([3, 9, 3]), lengths=torch.tensor([2, 1])
    )
    clock = StageClock(model, torch.device("cpu"))
    with clock.step() if timed else nullcontext():
        values = model.module.embeddings(features)["f"].values()
        values.sum().backward()
    stages = clock.stages()
    assert (stages is not None) == timed and (stages is None or (stages[:, :3] > 0).all())
    return torch.stack([values.detach(), model.module.embeddings(features)["f"].values().detach()])


@pytest.mark.parametrize(("optimizer", "change"), [("sgd", [2, 1, 2]), ("adam", [1, 1, 1])])
@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("timed", [False, True])
def test_embedding_collections_train(
    pool: WorkerPool, sharding_type: str, optimizer: str, change: list[int], timed: bool
) -> None:
    """Unpooled lookups give the table's rows; SGD on their sum takes away their counts, and Adam's
    first step the learning rate. Also where the step is timed."""
    spec = TableSpec(name="t", num_embeddings=10, embedding_dim=4)
    plan = plan_by_rule(
        [spec], topology_of(pool), ShardingRule(sharding_type=sharding_type, column_shards=1)
    )
    rows = torch.arange(40.0).view(10, 4)[[3, 9, 3]]
    for found in pool.run(sequence_rows, plan, optimizer, timed):
        torch.testing.assert_close(found[0], rows)
        torch.testing.assert_close(found[1], rows - torch.tensor(change)[:, None])


def refusal(plan: Plan, module: Any) -> str:
    with pytest.raises(PlannerError) as caught:
        shard_model(module(), plan)
    return str(caught.value)


def test_refusals_name_table_and_remedy(pool: WorkerPool) -> None:
    """Plans that cannot be run here are refused before anything is sharded."""
    topology = topology_of(pool)
    data_parallel = ShardingRule(sharding_type="data_parallel")
    spec = TableSpec(name="t", num_embeddings=10, embedding_dim=4)
    broken = plan_by_rule([spec], topology, data_parallel)
    for message in pool.run(refusal, broken, Sequence):
        assert "table t" in message
        assert "shard it table_wise" in message

    wide = plan_by_rule([spec.model_copy(update={"embedding_dim": 8})], topology, data_parallel)
    for message in pool.run(refusal, wide, Sequence):
        assert "table t is 10 x 8 in the plan, 10 x 4 in the run" in message

    other = Topology(world_size=8, local_world_size=8)
    for message in pool.run(refusal, plan_by_rule([spec], other, data_parallel), Sequence):
        assert "the plan is for 8 devices" in message


def column_warnings(plan: Plan, optimizer: str) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("shardemb")
    logger.addHandler(handler)
    shard_model(OneTable(), plan, TableOptimizerConfig(name=optimizer))
    logger.removeHandler(handler)
    return messages


def test_column_momentum_is_warned_of_once(pool: WorkerPool) -> None:
    """Rank 0 alone says that row-wise optimizers differ on column shards; others do not."""
    spec = TableSpec(name="t", num_embeddings=ROWS, embedding_dim=8)
    rule = ShardingRule(sharding_type="column_wise", column_shards=2, ranks=(0, 0))
    plan = plan_by_rule([spec], topology_of(pool), rule)
    for optimizer, value in [
        *(("rowwise_adagrad", "momentum"), ("partial_rowwise_adam", "momentum")),
        ("lamb", "trust ratio"),
    ]:
        first, *others = pool.run(column_warnings, plan, optimizer)
        assert len(first) == 1
        assert f"{optimizer} keeps one {value} for each column shard" in first[0]
        assert "tables t will train slightly differently" in first[0]
        assert not any(others)
    for optimizer in ("adagrad", "adam"):
        assert not any(pool.run(column_warnings, plan, optimizer))
