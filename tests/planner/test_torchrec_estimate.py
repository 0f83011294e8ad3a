"""Our copy of TorchRec's cost estimate gives TorchRec's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner import Topology as TorchRecTopology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType

from planner import TableSpec, Topology
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.geometry import SHARDING_TYPES, column_shard_counts
from planner.hardware import preset
from planner.shards import COMPUTE_KERNELS, KERNEL_CODE, TYPE_CODE, ShardColumns, TableColumns

BATCH_SIZE = 512
LOAD_FACTOR = 0.2  # TorchRec's, where a table's cache parameters do not say
DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


class UnpooledSharder(EmbeddingCollectionSharder):
    """TorchRec estimates all types for unpooled tables, though its sharder offers four."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


class Case(NamedTuple):
    """A table, how it is cut by columns, and the share of its rows that TorchRec is told to cache.

    `load_factor` None: TorchRec is not told.
    """

    table: TableSpec
    column_shards: int = 1
    load_factor: float | None = None


def torchrec_options(cases: list[Case], topology: Topology) -> list[ShardingOption]:
    """All of TorchRec's sharding options for the tables, with its costs in them."""
    enumerator = EmbeddingEnumerator(
        topology=torchrec_topology(topology),
        batch_size=BATCH_SIZE,
        constraints={case.table.name: constraints(case) for case in cases},
    )
    sharders = [EmbeddingBagCollectionSharder(), UnpooledSharder()]
    return enumerator.enumerate(collections([case.table for case in cases]), sharders)


def torchrec_topology(topology: Topology) -> TorchRecTopology:
    """TorchRec's topology with its default bandwidths, or with those of our hardware."""
    bandwidths = {}
    if topology.hardware is not None:
        hardware = topology.hardware
        bandwidths = {
            "hbm_mem_bw": hardware.device_bandwidth_gb_s * 1e6,  # bytes a millisecond
            "hbm_to_ddr_mem_bw": hardware.host_link_bandwidth_gb_s * 1e6,
            "intra_host_bw": hardware.intra_host_bandwidth_gb_s * 1e6,
            "inter_host_bw": hardware.inter_host_bandwidth_gb_s * 1e6,
        }
    return TorchRecTopology(
        world_size=topology.world_size,
        local_world_size=topology.local_world_size,
        compute_device="cuda",
        **bandwidths,
    )


def constraints(case: Case) -> ParameterConstraints:
    table, count, factor = case
    return ParameterConstraints(
        pooling_factors=[table.pooling_factor] * table.num_features,
        sharding_types=list(SHARDING_TYPES),
        compute_kernels=list(COMPUTE_KERNELS),
        min_partition=table.embedding_dim // count,
        cache_params=None if factor is None else CacheParams(load_factor=factor),
    )


def collections(tables: list[TableSpec]) -> nn.Module:
    """The tables in the modules that look them up so: pooled or not, weighted or not."""
    model = nn.Module()
    for weighted in (False, True):
        chosen = [t for t in tables if t.pooled and t.weighted == weighted]
        if chosen:
            configs = [EmbeddingBagConfig(**config_fields(t)) for t in chosen]
            bags = EmbeddingBagCollection(configs, is_weighted=weighted, device="meta")
            model.add_module(f"weighted_{weighted}", bags)
    unpooled: dict[int, list[TableSpec]] = {}  # one collection has tables of one width
    for table in tables:
        if not table.pooled:
            unpooled.setdefault(table.embedding_dim, []).append(table)
    for dim, chosen in unpooled.items():
        configs = [EmbeddingConfig(**config_fields(t)) for t in chosen]
        model.add_module(f"unpooled_{dim}", EmbeddingCollection(configs, device="meta"))
    return model


def config_fields(table: TableSpec) -> dict:
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "feature_names": list(table.feature_names),
        "data_type": DATA_TYPES[table.dtype],
    }


def our_shards(options: list[ShardingOption], cases: list[Case]) -> ShardColumns:
    """Every shard of every option, in order."""
    number = {case.table.name: i for i, case in enumerate(cases)}
    rows = [
        (
            number[option.name],
            TYPE_CODE[option.sharding_type],
            KERNEL_CODE[option.compute_kernel],
            *shard.size,
            LOAD_FACTOR if option.cache_load_factor is None else option.cache_load_factor,
        )
        for option in options
        for shard in option.shards
    ]
    return ShardColumns(
        TableColumns.of([case.table for case in cases]), *map(np.array, zip(*rows, strict=True))
    )


def check(cases: list[Case], topology: Topology) -> list[ShardingOption]:
    """Compare every shard's four stages, and their sum, with TorchRec's; the options compared."""
    options = torchrec_options(cases, topology)
    found = TorchRecEstimate(BATCH_SIZE).stage_costs(our_shards(options, cases), topology)
    perfs = [shard.perf for option in options for shard in option.shards]
    expected = [[p.fwd_compute, p.fwd_comms, p.bwd_compute, p.bwd_comms, p.total] for p in perfs]
    found = np.concatenate([found, found.sum(axis=1, keepdims=True)], axis=1)
    labels = [
        f"{o.name} {o.sharding_type} {o.compute_kernel} {s.size}" for o in options for s in o.shards
    ]
    np.testing.assert_array_equal(found.shape, np.shape(expected))
    wrong = ~np.isclose(found, expected, rtol=1e-3, atol=0)
    assert not wrong.any(), [
        (labels[i], found[i], expected[i]) for i in np.flatnonzero(wrong.any(axis=1))[:3]
    ]
    return options


def kinds(options: list[ShardingOption]) -> set[tuple[str, str]]:
    return {(option.sharding_type, option.compute_kernel) for option in options}


SHARDED = [kind for kind in SHARDING_TYPES if kind != "data_parallel"]
FUSED = [kernel for kernel in COMPUTE_KERNELS if kernel != "dense"]
ALL_KINDS = {(kind, kernel) for kind in SHARDED for kernel in FUSED} | {("data_parallel", "dense")}


def random_case(number: int, generator: torch.Generator) -> Case:
    """A table of any size, width, type, number of features, pooled or not, weighted or not."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    pooled = draw(0, 4) > 0
    table = TableSpec(
        name=f"t{number}",
        num_embeddings=10 ** draw(1, 7) + draw(0, 9),
        embedding_dim=4 * draw(1, 65),
        feature_names=tuple(f"f{number}_{j}" for j in range(draw(1, 4))),
        pooling_factor=draw(0, 300) / 10,
        dtype=("fp32", "fp32", "fp16", "bf16")[draw(0, 4)],
        weighted=pooled and draw(0, 2) == 1,
        pooled=pooled,
    )
    counts = column_shard_counts(table.embedding_dim)
    return Case(table, counts[draw(0, len(counts))], draw(1, 100) / 100 if draw(0, 2) else None)


@pytest.mark.parametrize(
    ("world_size", "local", "kind"),
    [
        (1, 1, None),
        (8, 8, None),
        (24, 8, None),
        (4, 2, None),
        (24, 8, "A100-80GB"),
        (4, 4, "L40S"),
    ],
)
def test_random_tables(world_size: int, local: int, kind: str | None) -> None:
    """Every option of 50 random tables costs what TorchRec says, within 0.1%, stage by stage.

    With TorchRec's default bandwidths, and with those of a kind of hardware given to both.
    """
    generator = torch.Generator().manual_seed(world_size)
    cases = [random_case(number, generator) for number in range(50)]
    hardware = preset(kind) if kind else None
    topology = Topology(world_size=world_size, local_world_size=local, hardware=hardware)
    options = check(cases, topology)
    pooled = {case.table.name: case.table.pooled for case in cases}
    for some in (True, False):
        assert kinds([o for o in options if pooled[o.name] == some]) == ALL_KINDS


def test_the_preset_has_torchrecs_bandwidths() -> None:
    """No hardware and the kind `torchrec-80GB` are the same to the model, bit for bit."""
    generator = torch.Generator().manual_seed(1)
    cases = [random_case(number, generator) for number in range(10)]
    unknown = Topology(world_size=4, local_world_size=2)
    known = unknown.model_copy(update={"hardware": preset("torchrec-80GB")})
    shards = our_shards(torchrec_options(cases, unknown), cases)
    model = TorchRecEstimate(BATCH_SIZE)
    np.testing.assert_array_equal(
        model.stage_costs(shards, known), model.stage_costs(shards, unknown)
    )


def test_mlperf_tables(shared_data: Path) -> None:
    """Every option of MLPerf's DLRM-DCNv2 on 8 and on 16 devices."""
    entries = json.loads((shared_data / "planner" / "mlperf_dlrm_dcnv2.json").read_text())["tables"]
    tables = [TableSpec(**entry, feature_names=(entry["name"],)) for entry in entries]
    for world_size in (8, 16):
        options = check(
            [Case(table, 4) for table in tables],
            Topology(world_size=world_size, local_world_size=8),
        )
        assert kinds(options) == ALL_KINDS
        assert len(options) == len(tables) * len(ALL_KINDS)
