"""The bytes that tables take are those that FBGEMM allocates, and buffers are counted by hand."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from planner import TableSpec, Topology
from planner.geometry import ShardingType
from planner.shards import (
    KERNEL_CODE,
    TYPE_CODE,
    ComputeKernel,
    ShardColumns,
    TableColumns,
)
from planner.storage import buffer_bytes, received_bytes, shard_bytes, table_memory

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
    "partial_rowwise_lamb": EmbOptimType.PARTIAL_ROWWISE_LAMB,
}
DTYPES = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}
LOCATIONS = {
    "fused": EmbeddingLocation.DEVICE,
    "fused_uvm": EmbeddingLocation.MANAGED,
    "fused_uvm_caching": EmbeddingLocation.MANAGED_CACHING,
}
STATES = ("weights", "momentum1", "momentum2")
CACHE = ("lxu_cache_weights", "lxu_cache_state", "lxu_state", "cache_index_table_map")


def shards(
    table: TableSpec,
    rows: int,
    columns: int,
    kernel: ComputeKernel = "fused",
    sharding_type: ShardingType = "table_wise",
    load_factor: float = 0.0,
) -> ShardColumns:
    return ShardColumns(
        tables=TableColumns.of([table]),
        table=np.array([0]),
        sharding_type=np.array([TYPE_CODE[sharding_type]]),
        compute_kernel=np.array([KERNEL_CODE[kernel]]),
        rows=np.array([rows]),
        columns=np.array([columns]),
        cache_load_factor=np.array([load_factor]),
    )


def bytes_of(kernel: SplitTableBatchedEmbeddingBagsCodegen, *names: str) -> int:
    """What the kernel holds under these names; its state_dict leaves placeholders out."""
    state = kernel.state_dict(keep_vars=True)
    return sum(state[name].numel() * state[name].element_size() for name in names if name in state)


# FBGEMM's CPU kernels have no Adam.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_cpu_kernel(optimizer: str, dtype: str) -> None:
    """Weights and optimizer state take what FBGEMM's CPU kernel has, to the byte."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(123, 20, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=OPTIMIZERS[optimizer],
        weights_precision=DTYPES[dtype],
    )
    table = table_of(123, optimizer, dtype)
    expected = bytes_of(kernel, *(f"{name}_host" for name in STATES))
    memory = table_memory(shards(table, 123, 20))
    assert (memory.device.tolist(), memory.host.tolist()) == ([expected], [0])
    assert shard_bytes(table, 123, 20) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LOCATIONS)
def test_a_gpu_kernel(
    name: ComputeKernel, optimizer: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device and host memory are what FBGEMM's GPU kernel has in each, cache and all.

    The kernel is built on the meta device, so no GPU is needed; only the question how much memory
    the GPU has is answered for it.
    """
    properties = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    for rows, load_factor in itertools.product(
        [0, 1, 31, 160, 161, 1000], [0.01, 0.2, 0.9999, 1.0]
    ):
        kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, 20, LOCATIONS[name], ComputeDevice.CUDA)],
            optimizer=OPTIMIZERS[optimizer],
            weights_precision=DTYPES[dtype],
            cache_precision=DTYPES[dtype],  # as TorchRec sets it
            cache_load_factor=load_factor,
            device=torch.device("meta"),
        )
        device = bytes_of(kernel, *CACHE, *(f"{state}_dev" for state in STATES))
        host = bytes_of(kernel, *(f"{state}_uvm" for state in STATES))
        shard = shards(table_of(1000, optimizer, dtype), rows, 20, name, load_factor=load_factor)
        memory = table_memory(shard)
        assert (memory.device.tolist(), memory.host.tolist()) == ([device], [host])


def table_of(rows: int, optimizer: str, dtype: str) -> TableSpec:
    return TableSpec(
        name="t", num_embeddings=rows, embedding_dim=20, optimizer=optimizer, dtype=dtype
    )


def test_many_shards_at_once() -> None:
    """Each shard of a batch gets what it gets alone."""
    columns = [
        shards(table_of(1000, "partial_rowwise_adam", "fp16"), rows, 20, kernel, load_factor=0.3)
        for rows in (10, 999)
        for kernel in ("fused", "fused_uvm", "fused_uvm_caching", "dense")
    ]
    joined = ShardColumns(
        columns[0].tables,
        *(
            np.concatenate([getattr(c, field.name) for c in columns])
            for field in dataclasses.fields(ShardColumns)[1:]
        ),
    )
    memory = table_memory(joined)
    assert memory.device.tolist() == [float(table_memory(c).device[0]) for c in columns]
    assert memory.host.tolist() == [float(table_memory(c).host[0]) for c in columns]


# Two features with bags of 3 ids, 10 rows on each of 2 x 2 devices: 80 bags of 240 ids a step.
@pytest.mark.parametrize(
    ("sharding_type", "table", "expected"),
    [
        # Bags of 8 columns, or their gradients, in fp32; the ids of this batch and the next.
        ("table_wise", {}, 80 * 8 * 4 + 240 * 8 * 2),
        ("column_wise", {}, 80 * 8 * 4 + 240 * 8 * 2),
        ("table_wise", {"dtype": "fp16"}, 80 * 8 * 4 + 240 * 8 * 2),
        ("table_wise", {"weighted": True}, 80 * 8 * 4 + 240 * (8 + 4) * 2),
        # A rank pools the part of every bag that is in its rows.
        ("row_wise", {}, 80 * 8 * 4 + 240 / 4 * 8 * 2),
        ("table_row_wise", {}, 80 * 8 * 4 + 240 / 2 * 8 * 2),
        ("grid_shard", {}, 80 * 8 * 4 + 240 / 2 * 8 * 2),
        # Unpooled, each id has an embedding.
        ("table_wise", {"pooled": False}, 240 * 8 * 4 + 240 * 8 * 2),
        ("row_wise", {"pooled": False}, 60 * 8 * 4 + 60 * 8 * 2),
        # The gradient of the 6 x 8 shard, in the table's dtype.
        ("data_parallel", {}, 6 * 8 * 4),
        ("data_parallel", {"dtype": "fp16"}, 6 * 8 * 2),
    ],
)
def test_buffers(sharding_type: ShardingType, table: dict, expected: float) -> None:
    """The buffers of a shard's step, by hand."""
    spec = TableSpec(
        name="t", num_embeddings=24, embedding_dim=8, pooling_factor=3, num_features=2, **table
    )
    shard = shards(spec, 6, 8, sharding_type=sharding_type)
    topology = Topology(world_size=4, local_world_size=2)
    assert buffer_bytes(shard, topology, batch_size=10).tolist() == [expected]


def test_received_embeddings() -> None:
    """A rank's own rows: a bag of each feature, or an embedding of each id, and the gradients."""
    pooled = TableSpec(
        name="a", num_embeddings=9, embedding_dim=8, pooling_factor=3, num_features=2, dtype="fp16"
    )
    unpooled = TableSpec(
        name="b", num_embeddings=9, embedding_dim=4, pooling_factor=2.5, pooled=False
    )
    expected = 10 * 2 * 8 * 4 * 2 + 10 * 2.5 * 4 * 4 * 2
    assert received_bytes([pooled, unpooled], batch_size=10) == expected
