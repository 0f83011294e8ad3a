"""TorchRec's own estimate of a shard's cost, so that plans are compared on equal terms.

Reproduces `EmbeddingPerfEstimator` of TorchRec 1.8 (torchrec/distributed/planner/estimator) for
pooled tables in device memory; a test holds it to the original. Its constants are TorchRec's
guesses for a GPU of 2020, not measurements of yours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.cost.stages import StageCost
from planner.geometry import Block, ShardingType
from planner.tables import BYTES_PER_ELEMENT, TableSpec
from planner.topology import Topology

_GIB_PER_SECOND = 1024**3 / 1000  # in bytes a millisecond
ID_BYTES = 8
FULL_BLOCK_DIM = 128
HALF_BLOCK_PENALTY, QUARTER_BLOCK_PENALTY = 1.15, 1.75
BACKWARD_COMPUTE_FACTOR = 2.0
BATCHED_COPY_FACTOR = 2.455
DENSE_KERNEL_EFFICIENCY = 0.5
DATA_PARALLEL_KERNELS_FACTOR = 9.22
SMALLEST_LOOKUP_DIM = 32


@dataclass(frozen=True)
class TorchRecEstimate:
    """`batch_size` rows a rank; bandwidths in bytes a millisecond, by default TorchRec's."""

    batch_size: int
    device_bandwidth: float = 897 * _GIB_PER_SECOND
    intra_host_bandwidth: float = 600 * _GIB_PER_SECOND
    inter_host_bandwidth: float = 12.5 * _GIB_PER_SECOND

    def shard_cost(
        self, table: TableSpec, sharding_type: ShardingType, block: Block, topology: Topology
    ) -> StageCost:
        """The cost of the rectangle `block` of `table`."""
        if sharding_type == "data_parallel":
            return self._data_parallel(table, block, topology)
        # Row shards share their table's lookups.
        sharers = {
            "row_wise": topology.world_size,
            "table_row_wise": topology.local_world_size,
            "grid_shard": topology.local_world_size,
        }.get(sharding_type)
        inputs, outputs = self._inputs(table), self._outputs(table)
        ranks, size = topology.world_size, BYTES_PER_ELEMENT[table.dtype]
        output_bytes = outputs * ranks * block.columns * size
        lookups = inputs * ranks / (sharers or 1)
        dim = block.columns if sharers else max(block.columns, SMALLEST_LOOKUP_DIM)
        moved = math.ceil(lookups * ID_BYTES) + lookups * dim * size + output_bytes
        penalty = 1.0 if sharers else _block_penalty(block.columns)
        compute = moved * penalty / self.device_bandwidth
        if sharers is None or sharding_type == "row_wise":
            forward = backward = output_bytes / self._bandwidth(ranks, topology)
        else:
            between_hosts = outputs * topology.num_hosts * block.columns * size
            forward = output_bytes / self.intra_host_bandwidth
            if topology.num_hosts > 1:
                forward += between_hosts / self.inter_host_bandwidth
            backward = forward
        if sharers:
            backward += output_bytes * BATCHED_COPY_FACTOR / self.device_bandwidth
        return StageCost(compute, forward, compute * BACKWARD_COMPUTE_FACTOR, backward)

    def _data_parallel(self, table: TableSpec, block: Block, topology: Topology) -> StageCost:
        size = BYTES_PER_ELEMENT[table.dtype]
        inputs, outputs = self._inputs(table), self._outputs(table)
        moved = math.ceil(inputs * ID_BYTES) + (inputs + outputs) * block.columns * size
        kernel_bandwidth = self.device_bandwidth * DENSE_KERNEL_EFFICIENCY
        compute = moved / kernel_bandwidth
        table_bytes = block.rows * block.columns * size
        hosts = min(topology.world_size / topology.local_world_size, 2)
        # One network card for each device.
        bandwidth = self.inter_host_bandwidth * topology.local_world_size
        all_reduce = table_bytes * (2 * hosts - 1) / hosts / bandwidth
        if topology.world_size > 2 * topology.local_world_size:
            all_reduce *= 2
        optimizer = table_bytes * DATA_PARALLEL_KERNELS_FACTOR / kernel_bandwidth
        return StageCost(compute, 0.0, compute * BACKWARD_COMPUTE_FACTOR, all_reduce + optimizer)

    def _inputs(self, table: TableSpec) -> float:
        """Ids a rank looks up in a step."""
        return table.pooling_factor * self.batch_size * table.num_features

    def _outputs(self, table: TableSpec) -> float:
        """Pooled embeddings a rank gets in a step."""
        return min(1.0, table.pooling_factor) * self.batch_size * table.num_features

    def _bandwidth(self, ranks: int, topology: Topology) -> float:
        within_host = ranks <= topology.local_world_size
        return self.intra_host_bandwidth if within_host else self.inter_host_bandwidth


def _block_penalty(dim: int) -> float:
    """What a row narrower than a thread block's loads wastes."""
    if dim >= FULL_BLOCK_DIM:
        return 1.0
    return HALF_BLOCK_PENALTY if dim >= FULL_BLOCK_DIM // 2 else QUARTER_BLOCK_PENALTY
