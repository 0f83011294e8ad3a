"""The analytic cost model: hand-computed times, and what must hold for any hardware."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ByteSize

from planner import PlannerError, TableSpec, Topology
from planner.cost.analytic import AnalyticCost
from planner.cost.stages import StageCost
from planner.geometry import SHARDING_TYPES, ShardingType
from planner.hardware import PRESETS, Hardware, preset
from planner.options import make_problem
from planner.shards import (
    KERNEL_CODE,
    TYPE_CODE,
    ComputeKernel,
    Floats,
    ShardColumns,
    TableColumns,
)
from planner.tables import REUSE_BINS
from planner.topology import parse_topology

# GB/s that are easy to compute with: 1 GB/s is 1e6 bytes a millisecond. There is no cache.
PLAIN = Hardware(
    kind="plain",
    device_memory_bytes=ByteSize(10**10),
    device_bandwidth_gb_s=1000,
    host_link_bandwidth_gb_s=10,
    intra_host_bandwidth_gb_s=100,
    inter_host_bandwidth_gb_s=10,
    kernel_launch_us=0,
    intra_host_latency_us=0,
    inter_host_latency_us=0,
    gather_efficiency=1,
    collective_efficiency=1,
)
ONE_DEVICE = Topology(world_size=1, local_world_size=1, hardware=PLAIN)
TWO_HOSTS = Topology(world_size=8, local_world_size=4, hardware=PLAIN)
GPUS = ("A100-80GB", "H100", "L40S", "B200")
IN_USE: list[tuple[ShardingType, ComputeKernel]] = [
    *((name, "fused") for name in SHARDING_TYPES if name != "data_parallel"),
    ("data_parallel", "dense"),
    ("table_wise", "fused_uvm"),
    ("row_wise", "fused_uvm_caching"),
]


def spec(**changed: Any) -> TableSpec:
    return TableSpec(**{"name": "t", "num_embeddings": 8000, "embedding_dim": 32, **changed})


ONCE = (1.0,) + (0.0,) * (REUSE_BINS - 1)  # no row is looked up twice


def random_tables(count: int = 30) -> list[TableSpec]:
    random = np.random.default_rng(0)
    return [
        spec(
            name=f"t{i}",
            num_embeddings=10 ** int(random.integers(1, 8)) + int(random.integers(100)),
            embedding_dim=8 * int(random.integers(1, 33)),
            num_features=int(random.integers(1, 4)),
            pooling_factor=float(random.integers(1, 300)) / 10,
            weighted=bool(random.integers(2)),
            pooled=bool(random.integers(4)),
            optimizer=("sgd", "rowwise_adagrad", "adam")[i % 3],
            reuse_histogram=tuple(random.dirichlet(np.ones(REUSE_BINS))) if i % 2 else None,
        )
        for i in range(count)
    ]


def shards(
    tables: Sequence[TableSpec],
    topology: Topology,
    sharding_type: ShardingType = "table_wise",
    kernel: ComputeKernel = "fused",
    column_shards: int = 1,
    load_factor: float = 0.0,
) -> ShardColumns:
    """The largest shard of each table."""
    columns = TableColumns.of(tables)
    parts = {
        "row_wise": topology.world_size,
        "table_row_wise": topology.local_world_size,
        "grid_shard": topology.local_world_size,
    }.get(sharding_type, 1)
    return ShardColumns(
        tables=columns,
        table=np.arange(len(tables)),
        sharding_type=np.full(len(tables), TYPE_CODE[sharding_type]),
        compute_kernel=np.full(len(tables), KERNEL_CODE[kernel]),
        rows=-(-columns.num_embeddings // parts),
        columns=columns.embedding_dim // column_shards,
        cache_load_factor=np.full(len(tables), load_factor),
    )


def costs(
    tables: Sequence[TableSpec], topology: Topology, *args: Any, batch_size: int = 1000, **kw: Any
) -> Floats:
    return AnalyticCost(batch_size).stage_costs(shards(tables, topology, *args, **kw), topology)


def cost(table: TableSpec, topology: Topology = ONE_DEVICE, *args: Any, **kw: Any) -> StageCost:
    return StageCost(*costs([table], topology, *args, **kw)[0])


def hardware(**changed: Any) -> Hardware:
    return PLAIN.model_copy(update=changed)


def test_a_table_on_an_h100() -> None:
    """65,536 bags of 20 ids, no row twice: 1,310,720 rows of 512 bytes, at 0.73 * 3350 GB/s.

    Forward: 10.5 MB of ids, 0.5 of offsets and 33.6 of outputs stream at 0.85 * 3350 GB/s; rows
    are 671 MB. Backward: 136 bytes an id are made, sorted, cut into runs and read; gradients of
    33.6 MB, of which 26.2 fit half of the cache, so that 337,920 reads of 512 bytes miss; rows are
    read and written, and so is all of the 40 MB of state, since 4-byte neighbours share sectors.
    """
    table = spec(num_embeddings=10**7, embedding_dim=128, pooling_factor=20, reuse_histogram=ONCE)
    found = cost(table, parse_topology("1x1xH100"), batch_size=65_536)
    stream, gather = 0.85 * 3350e6, 0.73 * 3350e6
    overhead = 0.02 * 0.005
    forward = (10_485_760 + 524_288 + 33_554_432) / stream + 671_088_640 / gather
    backward = 178_257_920 / stream + (337_920 * 512 + 2 * (671_088_640 + 40_000_000)) / gather
    assert found.forward_compute_ms == pytest.approx(forward + overhead)
    assert found.backward_compute_ms == pytest.approx(backward + overhead)
    assert found.forward_compute_ms == pytest.approx(0.29, abs=0.005)
    assert found.backward_compute_ms == pytest.approx(0.715, abs=0.005)
    assert found.forward_comm_ms == found.backward_comm_ms == 0


# Bytes to each rank: 1000 bags of 32 columns in fp32 are 128,000, their ids and lengths 16,000. An
# eighth or a quarter of the ids makes that 9,000 or 10,000. 4 ranks are on other hosts.
ALL_TO_ALL = 4 * 128_000 / 10e6
IDS = 4 * 16_000 / 10e6


@pytest.mark.parametrize(
    ("sharding_type", "column_shards", "output", "ids"),
    [
        ("table_wise", 1, ALL_TO_ALL, IDS),
        ("column_wise", 2, ALL_TO_ALL / 2, IDS),
        ("table_column_wise", 2, ALL_TO_ALL / 2, IDS),
        # 7/8 of 8 * 128,000 bytes, over the 4 networks of a host: slower than over 100 GB/s.
        ("row_wise", 1, 7 * 128_000 / 40e6, 4 * 9_000 / 10e6),
        # To each of 3 neighbours the sums for 2 ranks; then 1 peer on the other host.
        ("table_row_wise", 1, 6 * 128_000 / 100e6 + 128_000 / 10e6, 4 * 10_000 / 10e6),
        ("grid_shard", 2, 6 * 64_000 / 100e6 + 64_000 / 10e6, 4 * 10_000 / 10e6),
    ],
)
def test_communication_by_hand(
    sharding_type: ShardingType, column_shards: int, output: float, ids: float
) -> None:
    """8000 x 32, one id a bag, on two hosts of four devices."""
    found = cost(spec(), TWO_HOSTS, sharding_type, column_shards=column_shards)
    assert found.forward_comm_ms == pytest.approx(output + ids)
    assert found.backward_comm_ms == pytest.approx(output)


def test_replicated_table_by_hand() -> None:
    """Six passes over 10,240,000 bytes and two over 320,000 of state; 7/4 of the table is reduced.

    Besides, 1000 different rows are looked up and written. One host reduces over its own links.
    """
    table = spec(num_embeddings=80_000, reuse_histogram=ONCE)
    found = cost(table, TWO_HOSTS, "data_parallel", "dense")
    assert found.forward_compute_ms == cost(table, ONE_DEVICE).forward_compute_ms
    assert found.forward_comm_ms == 0
    lookups = 1000 * 136 + 1000 * 128  # ids to sort, and gradients
    update = 6 * 10_240_000 + 2 * 320_000 + 1000 * 128
    assert found.backward_compute_ms == pytest.approx((lookups + update) / 1e9)
    assert found.backward_comm_ms == pytest.approx(2 * 7 / 8 * 10_240_000 / 40e6)
    one_host = Topology(world_size=4, local_world_size=4, hardware=PLAIN)
    reduced = cost(table, one_host, "data_parallel", "dense").backward_comm_ms
    assert reduced == pytest.approx(2 * 3 / 4 * 10_240_000 / 100e6)


def test_unpooled_outputs_are_ids() -> None:
    """5 ids a bag: 5 embeddings come back from where their row is, without a reduction."""
    table = spec(pooled=False, pooling_factor=5)
    whole = cost(table, TWO_HOSTS)
    assert whole.backward_comm_ms == pytest.approx(5 * ALL_TO_ALL)
    assert cost(table, TWO_HOSTS, "row_wise").backward_comm_ms == pytest.approx(5 / 8 * ALL_TO_ALL)
    pooled = cost(spec(pooling_factor=5), TWO_HOSTS)
    written = 8000 * 4 * 128
    assert whole.forward_compute_ms - pooled.forward_compute_ms == pytest.approx(written / 1e9)


@pytest.mark.parametrize(("sharding_type", "kernel"), IN_USE)
def test_one_device_communicates_nothing(
    sharding_type: ShardingType, kernel: ComputeKernel
) -> None:
    found = costs(random_tables(), ONE_DEVICE, sharding_type, kernel, load_factor=0.1)
    assert (found[:, [1, 3]] == 0).all()
    assert (found[:, [0, 2]] > 0).all()


@pytest.mark.parametrize(("sharding_type", "kernel"), IN_USE)
def test_one_host_does_not_use_the_network(
    sharding_type: ShardingType, kernel: ComputeKernel
) -> None:
    found = [
        costs(random_tables(), one_host, sharding_type, kernel)
        for h in (PLAIN, hardware(inter_host_bandwidth_gb_s=0.001))
        for one_host in [Topology(world_size=4, local_world_size=4, hardware=h)]
    ]
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize(("sharding_type", "kernel"), IN_USE)
def test_more_work_is_never_cheaper(
    kind: str, sharding_type: ShardingType, kernel: ComputeKernel
) -> None:
    """More rows a step, wider elements, weights: no stage of any table gets cheaper."""
    topology = parse_topology(f"2x4x{kind}")
    tables = [table.model_copy(update={"weighted": False}) for table in random_tables()]

    def found(batch_size: int = 1000, **changed: Any) -> Floats:
        some = [table.model_copy(update=changed) for table in tables]
        return costs(some, topology, sharding_type, kernel, 1, 0.1, batch_size=batch_size)

    like = found()
    assert np.isfinite(like).all() and (like >= 0).all()
    steps = [like, *(found(batch_size) for batch_size in (1001, 5000, 20_000, 10**6))]
    for less, more in pairwise(steps):
        assert (more >= less * (1 - 1e-12)).all()
    assert (found(dtype="fp16") <= like).all()
    weighted = found(weighted=True)
    assert (weighted >= like).all()
    assert (weighted[:, [0, 2]] > like[:, [0, 2]]).all()


def test_two_column_shards_move_no_less_than_one() -> None:
    """Ids are sent, read and sorted twice; outputs only once. (Two devices have two caches.)"""
    tables = random_tables()
    one = costs(tables, TWO_HOSTS, "table_wise")
    two = 2 * costs(tables, TWO_HOSTS, "column_wise", column_shards=2)
    assert (two >= one * (1 - 1e-12)).all()
    assert two[:, 3] == pytest.approx(one[:, 3])
    sent = one[:, 1] - one[:, 3]
    assert two[:, 1] - two[:, 3] == pytest.approx(2 * sent)


def test_row_wise_compute_falls_with_the_number_of_ranks() -> None:
    """For the same rows a step, of all ranks together."""
    tables = random_tables()
    found = [
        costs(
            tables,
            Topology(world_size=n, local_world_size=n, hardware=PLAIN),
            "row_wise",
            batch_size=8192 // n,
        )
        for n in (1, 2, 4, 8, 16)
    ]
    for fewer, more in pairwise(found):
        assert (more[:, [0, 2]] <= fewer[:, [0, 2]]).all()
    big = [i for i, table in enumerate(tables) if table.num_embeddings > 1000]
    assert (found[-1][big, 2] < found[0][big, 2] / 2).all()


def test_row_shards_of_a_small_table_share_by_rows() -> None:
    """Of 3 rows on 8 devices, some device has one whole row: a third of the lookups."""
    found = cost(spec(num_embeddings=3), TWO_HOSTS, "row_wise")
    ids = 1000 / 3 * 8 + 1000 * 8
    output = 7 * 128_000 / 40e6
    assert found.forward_comm_ms == pytest.approx(4 * ids / 10e6 + output)


@pytest.mark.parametrize("kind", GPUS)
def test_host_memory_is_slower_and_its_cache_helps(kind: str) -> None:
    """fused < cached < fused_uvm in total, and the cached falls as the cache grows."""
    topology = parse_topology(f"1x8x{kind}")
    tables = random_tables(100)

    def total(kernel: ComputeKernel, load_factor: float = 0.0) -> Floats:
        return costs(tables, topology, "table_wise", kernel, 1, load_factor).sum(axis=1)

    cached = [total("fused_uvm_caching", factor) for factor in (0.001, 0.01, 0.1, 0.2, 0.5, 1)]
    for smaller, larger in pairwise(cached):
        assert (larger <= smaller).all()
    assert (total("fused") <= cached[-1]).all()
    big = np.array([table.num_embeddings for table in tables]) > 1000
    assert (cached[0] <= total("fused_uvm"))[big].all()
    assert (total("fused") < total("fused_uvm")).all()


def test_host_memory_by_hand() -> None:
    """Rows of 128 bytes at 10 GB/s: read in forward, read and written in backward."""
    table = spec(num_embeddings=10**6, reuse_histogram=ONCE, optimizer="sgd")
    fused = cost(table)
    uvm = cost(table, ONE_DEVICE, "table_wise", "fused_uvm")
    row_ms = 1000 * 128 * (1 / 10e6 - 1 / 1e9)
    assert uvm.forward_compute_ms - fused.forward_compute_ms == pytest.approx(row_ms)
    assert uvm.backward_compute_ms - fused.backward_compute_ms == pytest.approx(2 * row_ms)
    # All state of adagrad's elements is in host memory, that of rowwise_adagrad on the device.
    adagrad = table.model_copy(update={"optimizer": "adagrad"})
    elements = cost(adagrad, ONE_DEVICE, "table_wise", "fused_uvm")
    more = elements.backward_compute_ms - uvm.backward_compute_ms
    assert more == pytest.approx(2 * 1000 * 128 / 10e6)
    rowwise = table.model_copy(update={"optimizer": "rowwise_adagrad"})
    rows = cost(rowwise, ONE_DEVICE, "table_wise", "fused_uvm")
    more = rows.backward_compute_ms - uvm.backward_compute_ms
    assert more == pytest.approx(2 * 1000 * 32 / 1e9)


def test_cache_of_host_memory_by_hand() -> None:
    """A tenth of the rows cached, all equally hot: 9 of 10 rows are swapped in, and others out.

    Ids are sorted for that (112 bytes each with their locations), tags are read twice, and
    locations are sorted in backward.
    """
    table = spec(num_embeddings=10**6, reuse_histogram=ONCE, optimizer="sgd")
    fused = cost(table)
    cached = cost(table, ONE_DEVICE, "table_wise", "fused_uvm_caching", 1, 0.1)
    swapped = 2 * 900 * 128
    prefetch = 1000 * (16 + 8 + 4 * 16 + 8 + 8) + 2 * 1000 * 256 + swapped
    more = cached.forward_compute_ms - fused.forward_compute_ms
    assert more == pytest.approx(prefetch / 1e9 + swapped / 10e6, rel=1e-3)
    more = cached.backward_compute_ms - fused.backward_compute_ms
    assert more == pytest.approx(1000 * (8 + 4 * 2 * 12 + 4) / 1e9)


@pytest.mark.parametrize(
    ("field", "stages"),
    [("device_bandwidth_gb_s", (0, 2)), ("inter_host_bandwidth_gb_s", (1, 3))],
)
def test_twice_the_bandwidth_is_half_the_time(field: str, stages: tuple[int, ...]) -> None:
    """Of the stages that it bounds; no other stage changes."""
    tables = random_tables()
    faster = hardware(**{field: 2 * getattr(PLAIN, field)})
    slow = costs(tables, TWO_HOSTS)
    fast = costs(tables, TWO_HOSTS.model_copy(update={"hardware": faster}))
    for stage in range(4):
        factor = 2 if stage in stages else 1
        assert slow[:, stage] == pytest.approx(factor * fast[:, stage])


def test_efficiencies_slow_what_they_are_of() -> None:
    """Random rows lose what gathers lose, streams less; collectives lose theirs."""
    table = spec(num_embeddings=10**6, reuse_histogram=ONCE)
    slower = hardware(gather_efficiency=0.5, collective_efficiency=0.5)
    fast = cost(table, TWO_HOSTS)
    slow = cost(table, TWO_HOSTS.model_copy(update={"hardware": slower}))
    rows, streamed = 8000 * 128, 8000 * (16 + 128)
    assert fast.forward_compute_ms == pytest.approx((rows + streamed) / 1e9)
    assert slow.forward_compute_ms == pytest.approx(rows / 0.5e9 + streamed / 0.85e9)
    assert slow.forward_comm_ms == pytest.approx(2 * fast.forward_comm_ms)


@pytest.mark.parametrize(("kind", "sector"), [("plain", 32), ("cpu", 64)])
def test_narrow_rows_move_whole_sectors(kind: str, sector: int) -> None:
    """Rows of 16 bytes cost a sector; the outputs, which lie in line, cost their own size."""
    topology = ONE_DEVICE.model_copy(update={"hardware": hardware(kind=kind)})
    found = cost(spec(embedding_dim=4, num_embeddings=10**6, reuse_histogram=ONCE), topology)
    assert found.forward_compute_ms == pytest.approx(1000 * (8 + 8 + 16 + sector) / 1e9)


def test_hot_rows_are_read_from_the_cache() -> None:
    """Two rows that all lookups go to: neither reads memory again. Uniform draws repeat less."""
    fast_cache = hardware(
        device_cache_bytes=ByteSize(2**26), device_cache_bandwidth_gb_s=1e6, kind="cached"
    )
    topology = ONE_DEVICE.model_copy(update={"hardware": fast_cache})
    hot = (*(0.0,) * (REUSE_BINS - 1), 1.0)
    found = [
        cost(spec(num_embeddings=10**7, reuse_histogram=h), topology, batch_size=65_536)
        for h in (hot, None, ONCE)
    ]
    totals = [stages.total_ms for stages in found]
    assert totals[0] < totals[1] <= totals[2] * (1 + 1e-9)
    rows_ms = 65_536 * 128 / 1e9
    saved = found[2].forward_compute_ms - found[0].forward_compute_ms
    assert saved == pytest.approx(rows_ms, rel=2e-3)


def test_a_slow_cache_limits_its_hits() -> None:
    """Every row is in the cache, which serves 2000 GB/s: twice as fast as memory."""
    cached = hardware(device_cache_bytes=ByteSize(2**30), device_cache_bandwidth_gb_s=2000)
    topology = ONE_DEVICE.model_copy(update={"hardware": cached})
    table = spec(num_embeddings=100, pooling_factor=10)
    slow, fast = cost(table), cost(table, topology)
    rows = 10_000 * 128
    saved = slow.forward_compute_ms - fast.forward_compute_ms
    assert saved == pytest.approx(rows / 1e9 - rows / 2e9)


def test_unknown_hardware() -> None:
    topology = Topology(world_size=2, local_world_size=2)
    with pytest.raises(PlannerError, match="--topology with a kind"):
        cost(spec(), topology)


@pytest.mark.parametrize("text", ["1x1xcpu", "1x8xH100", "2x4xA100-80GB"])
def test_costs_of_all_options(text: str) -> None:
    """A problem can be made with it; no table at all is no trouble."""
    topology = parse_topology(text)
    problem = make_problem(random_tables(), topology, AnalyticCost(1000), 1000)
    assert np.isfinite(problem.options.cost).all() and (problem.options.cost >= 0).all()
    assert costs([], topology).shape == (0, 4)


def test_a_million_shards_in_two_seconds() -> None:
    random = np.random.default_rng(0)
    tables, count = random_tables(1000), 10**6
    some = shards(tables, TWO_HOSTS).select(random.integers(0, len(tables), count))
    mixed = ShardColumns(
        **{
            **vars(some),
            "sharding_type": random.integers(0, len(TYPE_CODE), count),
            "compute_kernel": random.integers(0, len(KERNEL_CODE), count),
            "cache_load_factor": random.random(count),
        }
    )
    topology = TWO_HOSTS.model_copy(update={"hardware": preset("H100")})
    model = AnalyticCost(1000)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        found = model.stage_costs(mixed, topology)
        best = min(best, time.process_time() - start)
    assert found.shape == (count, 4) and np.isfinite(found).all()
    assert best < 2
