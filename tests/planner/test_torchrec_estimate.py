"""Our copy of TorchRec's cost estimate gives TorchRec's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner import Topology as TorchRecTopology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

from planner import TableSpec, Topology
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.geometry import SHARDING_TYPES, Block
from shardemb.sharding.sharders import PooledSharder

BATCH_SIZE = 512


def torchrec_options(tables: list[TableSpec], topology: Topology, device: str) -> list:
    """All of TorchRec's sharding options for `tables`, with its costs in them."""
    collection = EmbeddingBagCollection(
        device="meta",
        tables=[
            EmbeddingBagConfig(
                name=t.name,
                num_embeddings=t.num_embeddings,
                embedding_dim=t.embedding_dim,
                feature_names=list(t.feature_names),
            )
            for t in tables
        ],
    )
    constraints = {
        t.name: ParameterConstraints(
            pooling_factors=[t.pooling_factor] * t.num_features,
            sharding_types=list(SHARDING_TYPES),
            compute_kernels=["fused", "dense"],
            min_partition=4,
        )
        for t in tables
    }
    enumerator = EmbeddingEnumerator(
        topology=TorchRecTopology(
            world_size=topology.world_size,
            local_world_size=topology.local_world_size,
            compute_device=device,
        ),
        batch_size=BATCH_SIZE,
        constraints=constraints,
    )
    options = enumerator.enumerate(nn.Sequential(collection), [PooledSharder()])
    return [o for o in options if (o.compute_kernel == "dense") == (o.sharding_type == DP)]


DP = "data_parallel"


def check(tables: list[TableSpec], topology: Topology) -> int:
    model = TorchRecEstimate(BATCH_SIZE)
    specs = {table.name: table for table in tables}
    options = torchrec_options(tables, topology, "cuda")
    assert {option.sharding_type for option in options} >= {"table_wise", "row_wise", DP}
    for option in options:
        for shard in option.shards:
            block = Block(shard.offset[0], shard.size[0], shard.offset[1], shard.size[1])
            cost = model.shard_cost(specs[option.name], option.sharding_type, block, topology)
            expected = shard.perf
            found = [*cost, cost.total_ms]
            parts = [expected.fwd_compute, expected.fwd_comms, expected.bwd_compute]
            parts += [expected.bwd_comms, expected.total]
            assert found == pytest.approx(parts, rel=1e-3), (option.name, option.sharding_type)
    return len(options)


@pytest.mark.parametrize(("world_size", "local"), [(1, 1), (8, 8), (24, 8), (4, 2)])
def test_random_tables(world_size: int, local: int) -> None:
    """Every option of 50 random tables costs what TorchRec says, within 0.1%."""
    generator = torch.Generator().manual_seed(world_size)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    tables = [
        TableSpec(
            name=f"t{i}",
            num_embeddings=10 ** draw(1, 7) + draw(0, 9),
            embedding_dim=4 * draw(1, 65),
            feature_names=tuple(f"f{i}_{j}" for j in range(draw(1, 4))),
            pooling_factor=draw(1, 300) / 10,
        )
        for i in range(50)
    ]
    count = check(tables, Topology(world_size=world_size, local_world_size=local))
    assert count >= 4 * len(tables)


def test_mlperf_tables(shared_data: Path) -> None:
    """Every option of MLPerf's DLRM-DCNv2 on 8 and on 16 devices."""
    entries = json.loads((shared_data / "planner" / "mlperf_dlrm_dcnv2.json").read_text())["tables"]
    tables = [TableSpec(**entry, feature_names=(entry["name"],)) for entry in entries]
    for world_size in (8, 16):
        assert check(tables, Topology(world_size=world_size, local_world_size=8)) >= 26 * 5
