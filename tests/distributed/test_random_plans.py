"""Whatever a plan says is what is trained and what is allocated: random plans of every type."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from planner import Plan, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.constraints import TableConstraint
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.geometry import SHARDING_TYPES, column_shard_counts
from planner.hardware import preset
from planner.make_plan import make_plan
from shardemb.optimizer_config import DenseOptimizerConfig, TableOptimizerConfig
from shardemb.sharding.shard_model import shard_model
from shardemb.sharding.tables import tables_from_module
from shardemb.trainer import Trainer
from tests.distributed.pool import WorkerPool
from tests.distributed.test_sharded_equals_unsharded import BATCH_SIZE, OPTIMIZERS, check, specs


def random_rule(table: TableSpec, topology: Topology, draw: random.Random) -> ShardingRule:
    """A type, a number of column shards, and ranks that the type allows, any of them twice."""
    local, hosts = topology.local_world_size, range(topology.num_hosts)
    kind = draw.choice(SHARDING_TYPES)
    count = draw.choice([k for k in column_shard_counts(table.embedding_dim) if k <= 4])
    ranks: Sequence[int]
    if kind == "table_wise":
        ranks = [draw.randrange(topology.world_size)]
    elif kind == "column_wise":
        ranks = [draw.randrange(topology.world_size) for _ in range(count)]
    elif kind == "table_column_wise":
        ranks = draw.choices(topology.ranks_of_host(draw.choice(hosts)), k=count)
    elif kind == "table_row_wise":
        ranks = topology.ranks_of_host(draw.choice(hosts))
    elif kind == "grid_shard":
        chosen = draw.choices(hosts, k=count)
        ranks = [host * local + i for host in chosen for i in range(local)]
    else:
        return ShardingRule(sharding_type=kind)
    return ShardingRule(sharding_type=kind, column_shards=count, ranks=tuple(ranks))


def random_of(pool: WorkerPool, seed: int) -> random.Random:
    return random.Random(f"{seed} {pool.world_size} {pool.local_world_size}")


def random_plan(tables: list[TableSpec], pool: WorkerPool, seed: int) -> Plan:
    draw = random_of(pool, seed)
    topology = Topology(world_size=pool.world_size, local_world_size=pool.local_world_size)
    rules = {table.name: random_rule(table, topology, draw) for table in tables}
    return plan_by_rule(tables, topology, rules[tables[0].name], rules)


@pytest.mark.parametrize("seed", range(8))
def test_training_equals_unsharded(pool: WorkerPool, seed: int) -> None:
    """After five steps tables, optimizer states and dense weights are the reference's."""
    tables, dense = OPTIMIZERS[seed % 3]
    plan = random_plan(specs(tables), pool, seed)
    check(pool, plan, tables, dense, weighted=seed % 2 == 1)


@pytest.mark.parametrize("seed", range(4))
def test_training_by_the_planner(pool: WorkerPool, seed: int) -> None:
    """Likewise for plans that the planner makes, of types that random constraints allow."""
    tables, dense = OPTIMIZERS[seed % 3]
    draw = random_of(pool, seed)
    allowed = {
        table.name: TableConstraint(
            sharding_types=tuple(draw.sample(SHARDING_TYPES, draw.randint(1, 3)))
        )
        for table in specs(tables)
    }
    plan = make_plan(
        specs(tables),
        Topology(
            world_size=pool.world_size,
            local_world_size=pool.local_world_size,
            hardware=preset("cpu"),
        ),
        TorchRecEstimate(BATCH_SIZE),
        BATCH_SIZE,
        constraints=allowed,
        seed=seed,
    )
    for name, constraint in allowed.items():
        assert plan.tables[name].sharding_type in constraint.sharding_types
    check(pool, plan, tables, dense, weighted=seed % 2 == 1)


DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class Tables(nn.Module):
    """Nothing but tables, on the meta device."""

    def __init__(self, dtype: str, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        configs = [
            EmbeddingBagConfig(
                name=f"t{i}",
                num_embeddings=draw.randrange(500, 4000),
                embedding_dim=4 * draw.randrange(1, 17),
                feature_names=[f"f{i}"],
                data_type=DTYPES[dtype],
            )
            for i in range(6)
        ]
        self.embeddings = EmbeddingBagCollection(configs, device="meta")


KERNELS = (SplitTableBatchedEmbeddingBagsCodegen, DenseTableBatchedEmbeddingBagsCodegen)


def allocated_bytes(plan: Plan, optimizer: str, dtype: str, seed: int) -> int:
    """All that this rank's kernels hold, and the optimizer's state of tables that are copied."""
    model = shard_model(Tables(dtype, seed), plan, TableOptimizerConfig(name=optimizer))
    state = Trainer(model, DenseOptimizerConfig()).optimizer.state_dict()["state"]
    kernels = [
        kernel
        for lookup in model.module.embeddings._lookups
        for kernel in lookup.modules()
        if isinstance(kernel, KERNELS)
    ]
    held = [tensor for kernel in kernels for tensor in (*kernel.parameters(), *kernel.buffers())]
    held += [value for values in state.values() for value in values.values()]
    storages = [tensor.untyped_storage() for tensor in held if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adagrad", "fp32"), ("rowwise_adagrad", "fp32"), ("sgd", "fp16")],
)
@pytest.mark.parametrize("seed", range(2))
def test_memory_is_as_predicted(pool: WorkerPool, seed: int, optimizer: str, dtype: str) -> None:
    """What each rank's kernels allocate is within 1% of the plan's bytes for it, and 1 KiB."""
    tables = tables_from_module(Tables(dtype, seed), optimizer=optimizer)
    plan = random_plan(tables, pool, seed)
    allocated = pool.run(allocated_bytes, plan, optimizer, dtype, seed)
    predicted = [device.memory_bytes for device in plan.devices]
    assert allocated == pytest.approx(predicted, rel=0.01, abs=1024)
