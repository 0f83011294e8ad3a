"""Random work to measure: sets of tables in one kernel, collectives, copies. Imports no torch.

The n-th workload of a sequence is a function of the seed and n alone, so a sequence that was
broken off goes on where it stopped, and sizes come in random order. Sizes are drawn evenly in
their logarithms: real tables are spread over many orders of magnitude.

As in DreamShard (Zha et al., NeurIPS 2022), sets are the devices of random plans for random tasks:
a task is the tables, batch and optimizer of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner import Plan, ShardingRule, Topology, plan_by_rule
from planner.cost.measurements import COLLECTIVES, Collective
from planner.geometry import COLUMN_MULTIPLE, ShardingType, column_shard_counts
from planner.reuse import MEAN_COUNTS
from planner.storage import shard_bytes
from planner.tables import (
    REUSE_BATCH_SIZE,
    REUSE_BINS,
    DataType,
    TableOptimizerName,
    TableSpec,
)

DEVICES = 4  # of a task
BATCH_SIZES = (128, 16_384)  # rows that a kernel looks up: those of all ranks
TABLES = (DEVICES, 96)  # of a task
NUM_EMBEDDINGS = (64, 4_000_000)
EMBEDDING_DIMS = (4, 256)
POOLING_FACTORS = (1, 100)
SKEWS = (-2.0, 0.5)  # shares of the lookups grow by exp(skew) from a reuse bin to the next
# What FBGEMM's kernels for CPUs and GPUs both train.
OPTIMIZERS: tuple[TableOptimizerName, ...] = ("sgd", "adagrad", "rowwise_adagrad")
DTYPES: tuple[DataType, ...] = ("fp32", "fp16")
FP32_SHARE = 0.7

COLLECTIVE_BYTES = (256, 16 * 1024**2)  # of a rank
BALANCED_SHARE = 0.4  # of the all-to-alls
COPY_BYTES = (1024, 256 * 1024**2)
MATRIX_SIDES = (64, 4096)
COPY_SHARE, MATMUL_SHARE = 0.05, 0.05  # of the workloads of a GPU


PLAN_TYPES: tuple[ShardingType, ...] = (
    "table_wise",
    "column_wise",
    "row_wise",
    "data_parallel",
)
PLAN_BATCH_SIZES = (64, 4096)  # rows of a rank
PLAN_TABLES = (2, 64)
TABLE_WISE_SHARE = 0.3  # of the plans: all tables are table_wise
MOST_REPLICATED = 2_000_000  # elements of a replicated table: nobody replicates larger ones


class Limits(NamedTuple):
    """Sets beyond these would take too long, or too much memory, for one measurement."""

    lookups: int
    table_bytes: int


LIMITS = {"cpu": Limits(300_000, 256 * 1024**2), "cuda": Limits(20_000_000, 16 * 1024**3)}


@dataclass(frozen=True)
class KernelSet:
    """Tables that one fused kernel looks up for `batch_size` rows."""

    task: int
    tables: tuple[TableSpec, ...]
    batch_size: int


@dataclass(frozen=True)
class CollectiveCall:
    """`sent_bytes` of each rank: to every other rank in an all-to-all, in all otherwise."""

    kind: Collective
    sent_bytes: tuple[int, ...]


@dataclass(frozen=True)
class HostCopy:
    """A copy from pinned host memory to the device."""

    size_bytes: int


@dataclass(frozen=True)
class DenseMatmul:
    """[rows, inner] times [inner, columns] in fp32."""

    shape: tuple[int, int, int]


def draw_device_work(
    seed: int, number: int, device_type: str
) -> KernelSet | HostCopy | DenseMatmul:
    """The workload of that number for one device; copies and matmuls on GPUs only."""
    generator = np.random.default_rng([seed, 0, number])
    kind = generator.uniform()
    if device_type == "cuda" and kind < COPY_SHARE:
        return HostCopy(log_int(generator, *COPY_BYTES))
    if device_type == "cuda" and kind < COPY_SHARE + MATMUL_SHARE:
        rows, inner, columns = (log_int(generator, *MATRIX_SIDES) for _ in range(3))
        return DenseMatmul((rows, inner, columns))
    return _draw_set(seed, number, LIMITS[device_type])


def draw_collective(seed: int, number: int, world_size: int) -> CollectiveCall:
    """The collective of that number. Each rank sends as much in all but some all-to-alls:
    batches of all ranks have one size, so only tables can make a difference."""
    generator = np.random.default_rng([seed, 1, world_size, number])
    turn, place = divmod(number, len(COLLECTIVES))  # each kind once a turn, in random order
    order = np.random.default_rng([seed, 4, turn]).permutation(len(COLLECTIVES))
    kind = COLLECTIVES[order[place]]
    size = log_int(generator, *COLLECTIVE_BYTES)
    shares = np.ones(world_size)
    if kind == "all_to_all" and generator.uniform() > BALANCED_SHARE:
        shares = generator.uniform(0, 1, world_size)
    return CollectiveCall(kind, tuple(int(share * size) // 4 * 4 for share in shares))


def _draw_set(seed: int, number: int, limits: Limits) -> KernelSet:
    """A device of a task's random plan: its tables, as far as they stay below the limits."""
    task, device = divmod(number, DEVICES)
    tables, owner, batch_size = draw_task(seed, task, limits)
    chosen: list[TableSpec] = []
    lookups, size = 0.0, 0
    for table in (table for table, rank in zip(tables, owner, strict=True) if rank == device):
        lookups += table.pooling_factor * batch_size
        size += _table_bytes(table)
        if chosen and (lookups > limits.lookups or size > limits.table_bytes):
            break
        chosen.append(table)
    return KernelSet(task, tuple(chosen), batch_size)


def draw_plan(seed: int, number: int, world_size: int, device_type: str) -> Plan:
    """The plan of that number, with tables of its own.

    On each rank the limits of a kernel hold, on average over the ranks.
    """
    generator = np.random.default_rng([seed, 5, world_size, number])
    rows = log_int(generator, *PLAN_BATCH_SIZES)
    tables = _plan_tables(generator, rows * world_size, world_size, LIMITS[device_type])
    plan = random_plan(tables, world_size, generator)
    return plan.model_copy(update={"batch_size": rows})


def random_plan(
    tables: Sequence[TableSpec], world_size: int, generator: np.random.Generator
) -> Plan:
    """Some types, each for a random share of the tables, and shards anywhere on one host."""
    only_whole = generator.uniform() < TABLE_WISE_SHARE
    shares = np.eye(len(PLAN_TYPES))[0] if only_whole else generator.dirichlet([0.5] * 4)
    busy = generator.dirichlet([2.0] * world_size)
    rules = {table.name: _draw_rule(generator, table, shares, busy) for table in tables}
    topology = Topology(world_size=world_size, local_world_size=world_size)
    return plan_by_rule(tables, topology, ShardingRule(sharding_type="table_wise"), rules)


def _plan_tables(
    generator: np.random.Generator, rows: int, world_size: int, limits: Limits
) -> list[TableSpec]:
    dtype = DTYPES[int(generator.uniform() > FP32_SHARE)]
    optimizer = OPTIMIZERS[int(generator.integers(len(OPTIMIZERS)))]
    chosen: list[TableSpec] = []
    lookups, size = 0.0, 0
    for number in range(log_int(generator, *PLAN_TABLES)):
        table = draw_table(generator, f"t{number}", rows, dtype, optimizer, limits)
        lookups += table.pooling_factor * rows
        size += _table_bytes(table)
        if chosen and (
            lookups > limits.lookups * world_size or size > limits.table_bytes * world_size
        ):
            break
        chosen.append(table)
    return chosen


def _draw_rule(
    generator: np.random.Generator,
    table: TableSpec,
    shares: NDArray[np.float64],
    busy: NDArray[np.float64],
) -> ShardingRule:
    kind = PLAN_TYPES[generator.choice(len(PLAN_TYPES), p=shares)]
    ranks = len(busy)
    counts = [n for n in column_shard_counts(table.embedding_dim) if 2 <= n <= ranks]
    elements = table.num_embeddings * table.embedding_dim
    if kind == "row_wise":
        return ShardingRule(sharding_type=kind)
    if kind == "data_parallel" and table.dtype == "fp32" and elements <= MOST_REPLICATED:
        return ShardingRule(sharding_type=kind)
    if kind == "column_wise" and counts:
        count = int(generator.choice(counts))
        chosen = tuple(generator.permutation(ranks)[:count].tolist())
        return ShardingRule(sharding_type=kind, column_shards=count, ranks=chosen)
    return ShardingRule(sharding_type="table_wise", ranks=(int(generator.choice(ranks, p=busy)),))


def draw_task(
    seed: int, task: int, limits: Limits
) -> tuple[list[TableSpec], NDArray[np.int64], int]:
    """The tables of a task, the device of each, and the rows that kernels look up for a batch.

    Every device has a table; some have far more than others.
    """
    generator = np.random.default_rng([seed, 2, task])
    batch_size = log_int(generator, *BATCH_SIZES)
    dtype = DTYPES[int(generator.uniform() > FP32_SHARE)]
    optimizer = OPTIMIZERS[int(generator.integers(len(OPTIMIZERS)))]
    count = log_int(generator, *TABLES)
    tables = [
        draw_table(generator, f"t{i}", batch_size, dtype, optimizer, limits) for i in range(count)
    ]
    more = generator.choice(DEVICES, count - DEVICES, p=generator.dirichlet(np.ones(DEVICES)))
    return tables, np.concatenate([np.arange(DEVICES), more]), batch_size


def draw_table(
    generator: np.random.Generator,
    name: str,
    batch_size: int,
    dtype: DataType,
    optimizer: TableOptimizerName,
    limits: Limits,
) -> TableSpec:
    """A table that on its own stays below the limits."""
    columns = log_int(generator, *EMBEDDING_DIMS) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    rows = log_int(generator, *NUM_EMBEDDINGS)
    most_pooling = min(POOLING_FACTORS[1], limits.lookups / batch_size)
    pooling = round(_log_uniform(generator, POOLING_FACTORS[0], most_pooling), 2)
    table = TableSpec(
        name=name,
        num_embeddings=rows,
        embedding_dim=columns,
        pooling_factor=pooling,
        dtype=dtype,
        optimizer=optimizer,
        reuse_histogram=_draw_reuse(generator, rows, pooling),
    )
    excess = _table_bytes(table) / limits.table_bytes
    if excess <= 1:
        return table
    fitting = int(rows / excess)
    histogram = _draw_reuse(generator, fitting, pooling)
    return table.model_copy(update={"num_embeddings": fitting, "reuse_histogram": histogram})


def _table_bytes(table: TableSpec) -> int:
    return shard_bytes(table, table.num_embeddings, table.embedding_dim)


def _draw_reuse(
    generator: np.random.Generator, rows: int, pooling_factor: float
) -> tuple[float, ...]:
    """Shares of the lookups in geometric progression over the bins that the table can have: it has
    no more than its rows, and a bin has one row at least."""
    lookups = REUSE_BATCH_SIZE * pooling_factor
    lowest = min(max(0, int(np.ceil(np.log2(lookups / rows)))), REUSE_BINS - 1)
    shares = np.exp(generator.uniform(*SKEWS) * np.arange(REUSE_BINS))
    shares[:lowest] = 0
    shares /= shares.sum()
    too_few = shares * lookups < MEAN_COUNTS
    too_few[lowest] = False
    shares[too_few] = 0
    return tuple((shares / shares.sum()).tolist())


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


def log_int(generator: np.random.Generator, low: int, high: int) -> int:
    return round(_log_uniform(generator, low, high))
