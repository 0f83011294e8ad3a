"""Bytes that a shard's step moves, over the bandwidths they move at: a roofline.

The default model until hardware is measured. Sources, all of the versions that we pin:
- TBE: FBGEMM's table batched embedding kernels, fbgemm_gpu/codegen/training/{forward,backward};
  their ids in src/split_embeddings_utils/transpose_embedding_input.cu; its cache for tables in
  host memory in src/split_embeddings_cache/{lru_cache_populate,lxu_cache}.cu.
- CUB: DeviceRadixSort, whose passes take 8 bits of the key each and read and write all pairs.
- nccl-tests: doc/PERFORMANCE.md in github.com/NVIDIA/nccl-tests, and its issues 130 and 267.
- TorchRec: torchrec/distributed/sharding, one file a type.

What all tables of a device share is not charged to any: TBE is one kernel for all of them and a
collective carries all of them, so launches and latencies are a constant of a device, which plans
cannot change. Left out too: what every plan has (embeddings received and reordered for the dense
part), id preparation on the senders' side, and prefetching or overlap of any kind.

Shards of a row group are charged alike, as the largest of them: it is the one that others wait
for. Ids are taken to spread evenly over rows; where hot rows are adjacent, hash them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.cost.stages import STAGES
from planner.errors import PlannerError
from planner.hardware import Hardware
from planner.reuse import hit_rate, read_fraction, unique_rows
from planner.shards import (
    KERNEL_CODE,
    OPTIMIZERS,
    TYPE_CODE,
    Bools,
    ComputeKernel,
    Floats,
    ShardColumns,
    row_sharers,
)
from planner.storage import ID_BYTES, OPTIMIZER_STATE, OUTPUT_BYTES, STATE_BYTES
from planner.topology import Topology

_BYTES_A_MS = 1e6  # of 1 GB/s

OFFSET_BYTES = 8  # of a bag; and lengths are sent as int64
WEIGHT_BYTES = 4

# DRAM moves sectors of 32 bytes on GPUs (CUDA C++ best practices, "coalesced access"); a CPU's
# cache lines have 64.
GPU_SECTOR_BYTES, CPU_SECTOR_BYTES = 32, 64
STREAM_EFFICIENCY = 0.85  # of nominal bandwidth: the mean of the measurements in planner.hardware
CACHE_SHARE = 0.5  # assumed: of the device's cache; what streams through takes the rest
TABLE_OVERHEAD = 0.02  # assumed: of a kernel launch, for a table's part of a batched kernel

SORT_PASSES = 4  # 8 bits each (CUB): keys are rows of all tables of a device, up to 2^32
INFO_BYTES = 4  # which bag an id is of (TBE); 8 for unpooled tables
TAGS_BYTES = 32 * 8  # one set of TBE's cache: 32 ways, an int64 each
LOCATION_BYTES = 4  # where in the cache an id's row is

# Passes over a replicated table in a step: its gradient is zeroed, copied into DDP's bucket (read,
# write) and read by the optimizer, which reads and writes the weights.
_DENSE_PASSES, _BUCKET_PASSES = 4, 2


def _sort_bytes(value_bytes: Floats | int) -> Floats | int:
    """Bytes an id to sort (id, value) pairs: one pass to count digits, then read and write all."""
    return ID_BYTES + SORT_PASSES * 2 * (ID_BYTES + value_bytes)


@dataclass(frozen=True)
class AnalyticCost:
    """For `batch_size` rows a rank; the topology must say what its hardware is."""

    batch_size: int
    name: str = "analytic"

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        """[shards, 4]: milliseconds of each stage."""
        if topology.hardware is None:
            raise PlannerError(
                "costs cannot be predicted for unknown hardware: give --topology with a kind, "
                "for example 2x8xA100-80GB, or a topology file"
            )
        speeds = _Speeds.of(topology.hardware)
        costs = np.empty((len(shards), len(STAGES)))
        is_replicated = shards.sharding_type == TYPE_CODE["data_parallel"]
        for chosen, cost in ((~is_replicated, self._sharded), (is_replicated, self._replicated)):
            if chosen.any():
                costs[chosen] = cost(shards.select(chosen), topology, speeds)
        return costs

    def _sharded(self, shards: ShardColumns, topology: Topology, speeds: _Speeds) -> Floats:
        """The rows of all ranks are looked up where the shard is."""
        work = _work(shards, topology, speeds, self.batch_size * topology.world_size)
        received = work.outputs / topology.world_size * work.output_bytes
        output_ms = _output_ms(work, received, topology, speeds)
        id_bytes = ID_BYTES + np.where(work.weighted, WEIGHT_BYTES, 0)
        ids = (work.lookups * id_bytes + work.bags * OFFSET_BYTES) / topology.world_size
        forward_comm = output_ms + _all_to_all_ms(ids, topology, speeds)
        backward = _backward_ms(work, speeds) + _update_ms(work, speeds)
        return np.stack([_forward_ms(work, speeds), forward_comm, backward, output_ms], axis=1)

    def _replicated(self, shards: ShardColumns, topology: Topology, speeds: _Speeds) -> Floats:
        """Each rank looks up its own rows; gradients of whole tables are summed."""
        work = _work(shards, topology, speeds, self.batch_size)
        backward = _backward_ms(work, speeds) + _dense_update_ms(work, topology, speeds)
        table_bytes = shards.rows * shards.columns * shards.of_table("element_bytes")
        forward = _forward_ms(work, speeds)
        none = np.zeros(len(shards))
        all_reduce = _all_reduce_ms(table_bytes, topology, speeds)
        return np.stack([forward, none, backward, all_reduce], axis=1)


class _Speeds(NamedTuple):
    """Bytes a millisecond, as reached."""

    stream: float
    gather: float
    cache: float  # reads that hit the device's cache
    host: float
    intra: float
    inter: float
    cache_bytes: float
    sector: int
    table_ms: float

    @classmethod
    def of(cls, hardware: Hardware) -> _Speeds:
        device = hardware.device_bandwidth_gb_s * _BYTES_A_MS
        cache = hardware.device_cache_bandwidth_gb_s
        gather = hardware.gather_efficiency
        links = hardware.collective_efficiency * _BYTES_A_MS
        return cls(
            stream=device * max(STREAM_EFFICIENCY, gather),
            gather=device * gather,
            cache=np.inf if cache is None else cache * _BYTES_A_MS,
            # Kernels read host memory in place, in requests of whole sectors.
            host=hardware.host_link_bandwidth_gb_s * _BYTES_A_MS * gather,
            intra=hardware.intra_host_bandwidth_gb_s * links,
            inter=hardware.inter_host_bandwidth_gb_s * links,
            # A cache of unknown bandwidth is taken to be no faster than memory.
            cache_bytes=0.0 if cache is None else CACHE_SHARE * hardware.device_cache_bytes,
            sector=CPU_SECTOR_BYTES if hardware.is_cpu else GPU_SECTOR_BYTES,
            table_ms=TABLE_OVERHEAD * hardware.kernel_launch_us / 1000,
        )


@dataclass(frozen=True)
class _Work:
    """What each shard does in a step; counts are of the rows of all ranks that it looks up for."""

    shards: ShardColumns
    rows: Floats  # of the shard
    lookups: Floats
    bags: Floats
    outputs: Floats  # embeddings: one a bag, or one an id where the table is not pooled
    output_bytes: Floats  # of one
    row_bytes: Floats  # of one, in whole sectors
    unique: Floats  # different rows
    reads: Floats  # rows read from memory where they are in the device's: the cache has the others
    missed: Floats  # different rows that are not in the cache for rows in host memory
    pooled: Bools
    weighted: Bools

    def runs_in(self, *kernels: ComputeKernel) -> Bools:
        codes = [KERNEL_CODE[kernel] for kernel in kernels]
        return np.isin(self.shards.compute_kernel, codes)


def _work(shards: ShardColumns, topology: Topology, speeds: _Speeds, batch_rows: int) -> _Work:
    tables, table = shards.tables, shards.table
    share = _row_share(shards, topology)
    bags = np.asarray(shards.of_table("num_features") * float(batch_rows))
    table_lookups = tables.pooling_factor * tables.num_features * batch_rows
    lookups = table_lookups[table] * share
    rows = tables.num_embeddings[table] * share
    row_bytes = _sectors(shards.columns * shards.of_table("element_bytes"), speeds)
    in_cache = np.minimum(1.0, speeds.cache_bytes / (rows * row_bytes))
    unique = unique_rows(tables, table_lookups)[table] * share
    pooled = shards.of_table("pooled")
    return _Work(
        shards=shards,
        rows=rows,
        lookups=lookups,
        bags=bags,
        outputs=np.where(pooled, bags, lookups),
        output_bytes=(shards.columns * OUTPUT_BYTES).astype(np.float64),
        row_bytes=row_bytes,
        unique=unique,
        reads=lookups * read_fraction(tables, table_lookups, in_cache, table),
        missed=_missed(shards, lookups, unique),
        pooled=pooled,
        weighted=shards.of_table("weighted"),
    )


def _row_share(shards: ShardColumns, topology: Topology) -> Floats:
    """The part of its table's rows, and so of its lookups, that a shard has."""
    rows = shards.of_table("num_embeddings")
    return np.asarray(np.ceil(rows / row_sharers(shards.sharding_type, topology)) / rows)


def _missed(shards: ShardColumns, lookups: Floats, unique: Floats) -> Floats:
    """Different rows of a batch that are not among the hottest, which the cache holds.

    Two bounds: no more than the lookups that miss, and no more than the unique rows would be if
    all rows were equally hot.
    """
    factor = shards.cache_load_factor
    misses = (1 - hit_rate(shards.tables, factor, shards.table)) * lookups
    return np.asarray(np.minimum(misses, (1 - factor) * unique))


def _sectors(size: Floats, speeds: _Speeds) -> Floats:
    return np.asarray(np.ceil(size / speeds.sector) * speeds.sector)


# --- Device compute


def _forward_ms(work: _Work, speeds: _Speeds) -> Floats:
    """TBE: ids (and weights) and offsets are read, rows gathered, embeddings written."""
    weights = np.where(work.weighted, WEIGHT_BYTES, 0)
    ids = work.lookups * (ID_BYTES + weights) + work.bags * OFFSET_BYTES
    streamed = (ids + work.outputs * work.output_bytes) / speeds.stream
    is_cached = work.runs_in("fused_uvm_caching")
    prefetch = np.where(is_cached, _prefetch_ms(work, speeds), 0.0)
    return np.asarray(streamed + _rows_ms(work, speeds) + prefetch + speeds.table_ms)


def _rows_ms(work: _Work, speeds: _Speeds) -> Floats:
    """Reads of the rows of all lookups.

    Rows in host memory (fused_uvm) cross the host link at every lookup: assumed, the device's own
    cache may keep some. The rows of fused_uvm_caching are on the device by then.
    """
    on_device = _gather_ms(work.lookups, work.reads, work.row_bytes, speeds)
    across = work.lookups * work.row_bytes / speeds.host
    return np.where(work.runs_in("fused_uvm"), across, on_device)


def _gather_ms(reads: Floats, misses: Floats, size: Floats | int, speeds: _Speeds) -> Floats:
    """Random reads of `size` bytes each through the cache, `misses` of them from memory.

    The slower of the two levels decides: memory serves some threads while the cache serves others.
    """
    return np.asarray(np.maximum(misses * size / speeds.gather, reads * size / speeds.cache))


def _prefetch_ms(work: _Work, speeds: _Speeds) -> Floats:
    """TBE's cache: unique ids by a sort, tags looked up, missing rows swapped with evicted ones.

    Every insertion into a full cache evicts, and an evicted row is written back, changed or not.
    Tags are read for unique ids to find what is missing, and for all ids to find locations.
    """
    sort = 2 * ID_BYTES + _sort_bytes(0) + ID_BYTES  # linear ids, their sort, their runs
    streamed = work.lookups * (sort + 2 * LOCATION_BYTES) / speeds.stream
    tags = _gather_ms(work.lookups + work.unique, work.reads + work.unique, TAGS_BYTES, speeds)
    swapped = 2 * work.missed * work.row_bytes
    return np.asarray(streamed + tags + swapped / speeds.host + swapped / speeds.gather)


def _backward_ms(work: _Work, speeds: _Speeds) -> Floats:
    """TBE up to a row's gradient: ids are sorted by row, gradients of their bags are gathered.

    Gradients of a pooled table are read once an id, and hit the cache as far as they fit in it.
    """
    gradients = _sectors(work.output_bytes, speeds)
    first = np.minimum(work.outputs, work.lookups)
    in_cache = np.minimum(1.0, speeds.cache_bytes / np.maximum(work.outputs * gradients, 1))
    misses = first + (work.lookups - first) * (1 - in_cache)
    gathered = _gather_ms(work.lookups, misses, gradients, speeds)
    sort = work.lookups * _backward_sort_bytes(work) / speeds.stream
    weights = np.where(work.weighted, _weight_gradient_ms(work, speeds), 0.0)
    return np.asarray(sort + gathered + weights + speeds.table_ms)


def _backward_sort_bytes(work: _Work) -> Floats:
    """Bytes an id: linear ids and infos are made, sorted, cut into runs and read.

    Weights, and locations in the cache, are sorted by the same keys a second time (TBE).
    """
    info = np.where(work.pooled, INFO_BYTES, 8)
    made = 2 * ID_BYTES + info
    weights = np.where(work.weighted, _sort_bytes(WEIGHT_BYTES) + WEIGHT_BYTES, 0)
    is_cached = work.runs_in("fused_uvm_caching")
    locations = np.where(is_cached, _sort_bytes(LOCATION_BYTES) + LOCATION_BYTES, 0)
    return np.asarray(made + _sort_bytes(info) + ID_BYTES + info + weights + locations)


def _weight_gradient_ms(work: _Work, speeds: _Speeds) -> Floats:
    """TBE computes gradients of the weights always: rows once more, times their bag's gradient."""
    ids = work.lookups * (ID_BYTES + WEIGHT_BYTES) + work.bags * OFFSET_BYTES
    streamed = ids + work.outputs * work.output_bytes
    return np.asarray(streamed / speeds.stream + _rows_ms(work, speeds))


def _update_ms(work: _Work, speeds: _Speeds) -> Floats:
    """TBE's fused optimizer reads and writes unique rows and their state, in order of rows.

    State of rows is on the device always; that of elements is where the table is, and never
    cached (construct_split_state of FBGEMM's split_table_batched_embeddings_ops_training.py).
    """
    per_row, per_element = _state_bytes(work)
    elements = work.shards.columns * per_element
    in_host = work.runs_in("fused_uvm", "fused_uvm_caching")
    rows = _touched(work, work.row_bytes, speeds)
    element_state = _touched(work, elements, speeds)
    host = np.where(work.runs_in("fused_uvm"), rows, 0.0) + np.where(in_host, element_state, 0.0)
    device = rows + element_state + _touched(work, per_row, speeds) - host
    return np.asarray(2 * (host / speeds.host + device / speeds.gather))


def _state_bytes(work: _Work) -> tuple[Floats, Floats]:
    """Bytes of optimizer state of a row, and of an element."""
    states = np.array([OPTIMIZER_STATE[name] for name in OPTIMIZERS], dtype=np.float64)
    per_row, per_element = states[work.shards.of_table("optimizer")].T * STATE_BYTES
    return per_row, per_element


def _touched(work: _Work, size: Floats, speeds: _Speeds) -> Floats:
    """Bytes of the sectors with unique rows' `size` bytes each: neighbours share sectors."""
    return np.minimum(work.unique * _sectors(size, speeds), _sectors(work.rows * size, speeds))


def _dense_update_ms(work: _Work, topology: Topology, speeds: _Speeds) -> Floats:
    """A gradient as large as the table: unique rows are written, the rest is passes over all."""
    shards = work.shards
    elements = shards.rows * shards.columns
    passes = _DENSE_PASSES + (_BUCKET_PASSES if topology.world_size > 1 else 0)
    per_row, per_element = _state_bytes(work)
    state = 2 * (shards.rows * per_row + elements * per_element)
    table = elements * shards.of_table("element_bytes") * passes
    written = _touched(work, work.row_bytes, speeds)
    return np.asarray((table + state) / speeds.stream + written / speeds.gather)


# --- Communication


def _output_ms(work: _Work, received: Floats, topology: Topology, speeds: _Speeds) -> Floats:
    """Embeddings to the ranks whose rows they are of, `received` bytes each; gradients come back.

    Row shards have sums of parts, of all bags: row_wise reduces and scatters among all ranks,
    table_row_wise and grid_shard in their host and then send between hosts (TorchRec). Embeddings
    of single ids need no sums.
    """
    kind = work.shards.sharding_type
    in_host = (kind == TYPE_CODE["table_row_wise"]) | (kind == TYPE_CODE["grid_shard"])
    return np.select(
        [~work.pooled, kind == TYPE_CODE["row_wise"], in_host],
        [
            _all_to_all_ms(received, topology, speeds),
            _reduce_scatter_ms(received * topology.world_size, topology, speeds),
            _two_level_ms(received, topology, speeds),
        ],
        default=_all_to_all_ms(received, topology, speeds),
    )


def _all_to_all_ms(size: Floats, topology: Topology, speeds: _Speeds) -> Floats:
    """`size` bytes to each other rank.

    Both kinds of links work at the same time, and each rank has its own share of the network:
    the slower part decides (nccl-tests 130, 267).
    """
    local = topology.local_world_size
    within = size * (local - 1) / speeds.intra
    between = size * (topology.world_size - local) / speeds.inter
    return np.maximum(within, between)


def _reduce_scatter_ms(size: Floats, topology: Topology, speeds: _Speeds) -> Floats:
    """`size` bytes a rank, reduced and scattered over all ranks; an all-gather takes as long.

    Rings: (n-1)/n of the bytes pass every rank, and between hosts a part of them each rank's
    share of the network, since the rings of a host leave it in different places (nccl-tests,
    PERFORMANCE.md and 267).
    """
    ranks, local = topology.world_size, topology.local_world_size
    crossing = size * (ranks - 1) / ranks
    within = crossing / speeds.intra if local > 1 else np.zeros(len(size))
    between = crossing / (speeds.inter * local) if topology.num_hosts > 1 else 0.0
    return np.maximum(within, between)


def _two_level_ms(size: Floats, topology: Topology, speeds: _Speeds) -> Floats:
    """`size` bytes for each rank: a reduce-scatter in the host, then all-to-all between hosts.

    One starts where the other ends. In the host each rank gets the sums for its peers, the ranks
    with its place in every host.
    """
    hosts = topology.num_hosts
    within = size * hosts * (topology.local_world_size - 1) / speeds.intra
    return np.asarray(within + size * (hosts - 1) / speeds.inter)


def _all_reduce_ms(size: Floats, topology: Topology, speeds: _Speeds) -> Floats:
    """A sum of `size` bytes over all ranks: a reduce-scatter and an all-gather."""
    return 2 * _reduce_scatter_ms(size, topology, speeds)
