"""TorchRec's own estimate of a shard's cost, so that plans are compared on equal terms.

Reproduces `EmbeddingPerfEstimator` of TorchRec 1.8 (torchrec/distributed/planner/estimator) on
CUDA devices; a test holds it to the original. Its factors are TorchRec's, not measurements of
yours. Left out is what TorchRec adds for prefetching into caches (`prefetch_compute`), which it
does only where it is given statistics of the cache. It has an estimate of sending the ids
(`input_dist_comms`) too, but leaves it out of its totals; so do we.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.stages import STAGES
from planner.hardware import Hardware, preset
from planner.shards import (
    KERNEL_CODE,
    TYPE_CODE,
    Bools,
    Floats,
    Ints,
    ShardColumns,
    row_sharers,
)
from planner.topology import Topology

_GB_PER_SECOND = 1e6  # in bytes a millisecond
ID_BYTES = 8
FULL_BLOCK_DIM = 128
HALF_BLOCK_PENALTY, QUARTER_BLOCK_PENALTY = 1.15, 1.75
BACKWARD_COMPUTE_FACTOR = 2.0
WEIGHTED_BACKWARD_FACTOR = 1.1
BATCHED_COPY_FACTOR = 2.455
DENSE_KERNEL_EFFICIENCY = 0.5
HOST_MEMORY_EFFICIENCY = 0.1
DATA_PARALLEL_KERNELS_FACTOR = 9.22
SMALLEST_LOOKUP_DIM = 32
BY_ROW = [TYPE_CODE[name] for name in ("row_wise", "table_row_wise", "grid_shard")]


@dataclass(frozen=True)
class TorchRecEstimate:
    """For `batch_size` rows a rank; the bandwidths are the topology's, or TorchRec's defaults."""

    batch_size: int
    name: str = "torchrec"

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        """[shards, 4]: milliseconds of each stage."""
        hardware = topology.hardware or preset("torchrec-80GB")
        costs = np.empty((len(shards), len(STAGES)))
        replicated = shards.sharding_type == TYPE_CODE["data_parallel"]
        costs[~replicated] = self._sharded(shards.select(~replicated), topology, hardware)
        costs[replicated] = self._replicated(shards.select(replicated), topology, hardware)
        return costs

    def _sharded(self, shards: ShardColumns, topology: Topology, hardware: Hardware) -> Floats:
        ranks, hosts = topology.world_size, topology.num_hosts
        # Row shards share their table's lookups.
        split = row_sharers(shards.sharding_type, topology)
        by_row = np.isin(shards.sharding_type, BY_ROW)
        size, columns = shards.of_table("element_bytes"), shards.columns
        pooled, weighted = shards.of_table("pooled"), shards.of_table("weighted")
        lookups = self._ids(shards) * ranks / split
        outputs = np.where(pooled, self._bags(shards), self._ids(shards) / split)
        output_bytes = outputs * ranks * columns * size
        ids_bytes = np.ceil(lookups * ID_BYTES) * np.where(weighted, 2, 1)
        dim = np.where(by_row, columns, np.maximum(columns, SMALLEST_LOOKUP_DIM))
        moved = ids_bytes + lookups * dim * size + output_bytes
        bandwidth = _kernel_bandwidth(shards, hardware)
        penalty = np.where(by_row, 1.0, _block_penalty(columns))
        forward = moved * penalty / bandwidth
        backward = forward * (
            BACKWARD_COMPUTE_FACTOR + np.where(weighted, WEIGHTED_BACKWARD_FACTOR, 0.0)
        )
        intra = hardware.intra_host_bandwidth_gb_s * _GB_PER_SECOND
        inter = hardware.inter_host_bandwidth_gb_s * _GB_PER_SECOND
        within = by_row & (shards.sharding_type != TYPE_CODE["row_wise"])
        one_level = output_bytes / (intra if hosts == 1 else inter)
        # Between hosts TorchRec takes all outputs of a sequence, not this shard's part.
        raw = np.where(pooled, outputs, self._ids(shards))
        between = raw * hosts * columns * size / inter if hosts > 1 else 0.0
        comm = np.where(within, output_bytes / intra + between, one_level)
        copies = np.where(by_row, output_bytes * BATCHED_COPY_FACTOR / bandwidth, 0.0)
        return np.stack([forward, comm, backward, comm + copies], axis=1)

    def _replicated(self, shards: ShardColumns, topology: Topology, hardware: Hardware) -> Floats:
        size, columns = shards.of_table("element_bytes"), shards.columns
        weighted = shards.of_table("weighted")
        ids = self._ids(shards)
        bags = np.where(shards.of_table("pooled"), self._bags(shards), ids)
        ids_bytes = np.ceil(ids * ID_BYTES) * np.where(weighted, 2, 1)
        kernel_bandwidth = _kernel_bandwidth(shards, hardware)
        forward = (ids_bytes + (ids + bags) * columns * size) / kernel_bandwidth
        backward = forward * (
            BACKWARD_COMPUTE_FACTOR + np.where(weighted, WEIGHTED_BACKWARD_FACTOR, 0.0)
        )
        table_bytes = shards.rows * columns * size
        hosts = min(topology.world_size / topology.local_world_size, 2)
        # One network card for each device.
        inter = hardware.inter_host_bandwidth_gb_s * _GB_PER_SECOND * topology.local_world_size
        all_reduce = table_bytes * (2 * hosts - 1) / hosts / inter
        if topology.world_size > 2 * topology.local_world_size:
            all_reduce = all_reduce * 2
        optimizer = table_bytes * DATA_PARALLEL_KERNELS_FACTOR / kernel_bandwidth
        return np.stack([forward, np.zeros(len(ids)), backward, all_reduce + optimizer], axis=1)

    def _ids(self, shards: ShardColumns) -> Floats:
        """Ids a rank looks up in a step."""
        features = shards.of_table("num_features") * self.batch_size
        return np.asarray(shards.of_table("pooling_factor") * features)

    def _bags(self, shards: ShardColumns) -> Floats:
        """Pooled embeddings a rank gets in a step."""
        filled = np.minimum(1.0, shards.of_table("pooling_factor"))
        return np.asarray(filled * shards.of_table("num_features") * self.batch_size)


def _kernel_bandwidth(shards: ShardColumns, hardware: Hardware) -> Floats:
    """Bytes a millisecond that each shard's kernel reaches."""
    device = hardware.device_bandwidth_gb_s * _GB_PER_SECOND
    host = hardware.host_link_bandwidth_gb_s * _GB_PER_SECOND
    cached = shards.cache_load_factor * device + (1 - shards.cache_load_factor) * host
    kernel = shards.compute_kernel
    conditions: list[Bools] = [
        kernel == KERNEL_CODE["dense"],
        kernel == KERNEL_CODE["fused_uvm"],
        kernel == KERNEL_CODE["fused_uvm_caching"],
    ]
    others = [
        np.full(len(shards), device * DENSE_KERNEL_EFFICIENCY),
        np.full(len(shards), host * HOST_MEMORY_EFFICIENCY),
        cached * HOST_MEMORY_EFFICIENCY,
    ]
    return np.asarray(np.select(conditions, others, default=device))


def _block_penalty(dim: Ints) -> Floats:
    """What a row narrower than a thread block's loads wastes."""
    half = np.where(dim >= FULL_BLOCK_DIM // 2, HALF_BLOCK_PENALTY, QUARTER_BLOCK_PENALTY)
    return np.where(dim >= FULL_BLOCK_DIM, 1.0, half)
