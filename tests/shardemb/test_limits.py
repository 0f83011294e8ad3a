"""Plans that TorchRec or FBGEMM cannot train are refused; their own refusals are the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder

from planner import Plan, PlannerError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb.sharding.limits import UNPOOLED_TYPES, refuse_unsupported

TOPOLOGY = Topology(world_size=4, local_world_size=2)


def planned(sharding_type: str, kernel: str | None = None, **table: Any) -> tuple[Plan, list]:
    fields = {"name": "t", "num_embeddings": 20, "embedding_dim": 8} | table
    spec = TableSpec(**fields)
    plan = plan_by_rule([spec], TOPOLOGY, ShardingRule(sharding_type=sharding_type))
    if kernel:
        changed = plan.tables["t"].model_copy(update={"compute_kernel": kernel})
        plan = plan.model_copy(update={"tables": {"t": changed}})
    return plan, [spec]


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_ordinary_plans_are_not_refused(sharding_type: str, device: str | None) -> None:
    for dtype, optimizer in [("fp32", "rowwise_adagrad"), ("fp16", "sgd")]:
        refuse_unsupported(*planned(sharding_type, dtype=dtype, optimizer=optimizer), device)


@pytest.mark.parametrize(
    ("plan", "device", "message"),
    [
        (planned("table_wise", "fused_uvm"), "cpu", "kernel fused_uvm needs a GPU"),
        (planned("row_wise", "fused_uvm_caching"), "cpu", "fused_uvm_caching needs a GPU; make a"),
        (planned("table_wise", "dense"), "cuda", "cannot be trained with the kernel dense"),
        (planned("data_parallel", "fused"), None, "cannot be trained with the kernel fused"),
        (planned("row_wise", embedding_dim=6), None, "a multiple of 4 columns, not of 6"),
        (planned("row_wise", dtype="bf16"), "cpu", "no bf16 kernels for CPU"),
        (planned("row_wise", dtype="bf16"), "cuda", "cannot train sharded bf16 tables"),
        (planned("row_wise", dtype="bf16"), None, "cannot train sharded bf16 tables"),
        (planned("data_parallel", dtype="fp16"), None, "use fp32 or another sharding type"),
        (planned("table_row_wise", pooled=False), None, "cannot shard an EmbeddingCollection"),
        (planned("grid_shard", pooled=False), "cuda", "table_wise, row_wise or column_wise"),
        (planned("data_parallel", pooled=False), "cpu", "data_parallel EmbeddingCollection on CPU"),
    ],
)
def test_refusals(plan: tuple[Plan, list], device: str | None, message: str) -> None:
    """Each names the table, the reason and a remedy."""
    with pytest.raises(PlannerError, match=f"table t: .*{message}"):
        refuse_unsupported(*plan, device)


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize("device", ["cuda", None])
def test_host_memory_is_for_gpus(kernel: str, device: str | None) -> None:
    refuse_unsupported(*planned("table_wise", kernel), device)


def test_a_replicated_table_may_be_of_any_width() -> None:
    refuse_unsupported(*planned("data_parallel", embedding_dim=6), "cpu")


def test_the_types_for_unpooled_tables_are_torchrecs() -> None:
    assert set(EmbeddingCollectionSharder().sharding_types("cuda")) == set(UNPOOLED_TYPES)


def test_fbgemm_has_no_bf16_kernel() -> None:
    """Nor when it caches nothing: what TorchRec asks of it fails before any GPU is used."""
    with pytest.raises(AssertionError, match="cache_precision bf16 not supported"):
        SplitTableBatchedEmbeddingBagsCodegen(
            [(20, 8, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
            weights_precision=SparseType.BF16,
            cache_precision=SparseType.BF16,  # as TorchRec sets it
            device=torch.device("meta"),
        )
