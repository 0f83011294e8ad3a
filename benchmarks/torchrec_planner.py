"""TorchRec's own planner on a table list: the rival of benchmarks.planner, in a process of its own.

    python -m benchmarks.torchrec_planner TABLES HOSTSxDEVICES BATCH_SIZE default|tuned OUT

writes {"plan": its ShardingPlan, "seconds": what its `plan` took, "max_total_ms": its estimate}.
Tables are pooled and unweighted; bandwidths are TorchRec's defaults, devices have 80 GiB, and all
sharding types are allowed, as they are for shardemb's planner. Kernels are those in device memory:
where the tables fit there the others are never better, and take its planner several times as long.
Its search ends after 300 s, not counting the enumeration of options.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, SortBy
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.types import PlannerError

from planner import TableSpec
from planner.geometry import COLUMN_MULTIPLE, SHARDING_TYPES
from planner.table_list import load_table_list
from shardemb.sharding.torchrec_plan import torchrec_to_json

DEVICE_MEMORY_BYTES = 80 * 2**30
SEARCH_SECONDS = 300  # its own limit, after which it takes the best plan so far


def main(file: str, shape: str, batch_size: str, variant: str, out: str) -> None:
    tables = load_table_list(file).tables
    hosts, devices = map(int, shape.split("x"))
    collection, planner = problem(tables, hosts, devices, int(batch_size), variant)
    began = time.perf_counter()
    try:
        plan = planner.plan(collection, [EmbeddingBagCollectionSharder()])
    except PlannerError as error:
        sys.exit(str(error).strip().splitlines()[0])
    seconds = time.perf_counter() - began
    measured = {"seconds": seconds, "max_total_ms": _max_total_ms(planner)}
    Path(out).write_text(json.dumps({**torchrec_to_json(plan), **measured}))


def _max_total_ms(planner: EmbeddingShardingPlanner) -> float:
    """Of the slowest rank, as TorchRec estimates it."""
    totals: defaultdict[int | None, float] = defaultdict(float)
    for option in planner._best_plan or []:
        for shard in option.shards:
            assert shard.perf is not None
            totals[shard.rank] += shard.perf.total
    return max(totals.values())


def problem(
    tables: Sequence[TableSpec],
    hosts: int,
    devices: int,
    batch_size: int,
    variant: str = "default",
    compute_device: str = "cuda",
) -> tuple[EmbeddingBagCollection, EmbeddingShardingPlanner]:
    """What TorchRec's planner plans for, and the planner.

    `default` tries the proposals of all its proposers, and places tables by storage; `tuned`
    proposes by the sum of a table's costs alone and places by cost.
    """
    tuned = {
        "proposer": GreedyProposer(use_depth=False),
        "partitioner": GreedyPerfPartitioner(sort_by=SortBy.PERF),
    }
    collection = EmbeddingBagCollection([_config(table) for table in tables], device="meta")
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=hosts * devices,
            local_world_size=devices,
            compute_device=compute_device,
            hbm_cap=DEVICE_MEMORY_BYTES,
        ),
        batch_size=batch_size,
        constraints={table.name: _constraints(table) for table in tables},
        stats=NoopEmbeddingStats(),
        debug=False,
        timeout_seconds=SEARCH_SECONDS,
        **(tuned if variant == "tuned" else {}),
    )
    return collection, planner


def _config(table: TableSpec) -> EmbeddingBagConfig:
    assert table.pooled and not table.weighted and table.dtype == "fp32"
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=[f"{table.name}.{i}" for i in range(table.num_features)],
    )


def _constraints(table: TableSpec) -> ParameterConstraints:
    return ParameterConstraints(
        sharding_types=list(SHARDING_TYPES),
        compute_kernels=["fused", "dense"],
        min_partition=COLUMN_MULTIPLE,
        pooling_factors=[table.pooling_factor] * table.num_features,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
