"""FBGEMM's kernels inside TorchRec's sharded modules, which have no public name for them."""

from __future__ import annotations

from collections.abc import Iterator

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection


def cpu_kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """Of all sharded collections in `model`: lookups are no registered modules there."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
            for lookup in module._lookups:
                for kernel in lookup.modules():
                    if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen) and kernel.use_cpu:
                        yield kernel
