"""Row shards without rows, which FBGEMM's CPU kernels do not expect (1.8).

A table with fewer rows than ranks leaves some ranks none of its rows. In backward the CPU kernel
tells tables apart by where their rows start, so it takes an empty shard for one with the table
behind it, and updates the wrong rows. And a kernel without any weights is sent to the GPU code.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from shardemb.sharding.kernels import cpu_kernels


def mend_empty_shards(sharded: nn.Module) -> None:
    """Make each empty shard of `sharded`'s CPU kernels count as one row that no id refers to."""
    for kernel in cpu_kernels(sharded):
        _mend(kernel.module)


def _mend(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    rows = [spec[0] for spec in kernel.embedding_specs]
    if 0 not in rows:
        return
    starts = [0, *accumulate(max(count, 1) for count in rows)]
    of_features = [starts[table] for table in kernel.feature_table_map]
    kernel.hash_size_cumsum.copy_(torch.tensor([*of_features, starts[-1]]))
    if kernel.weights_host.numel() == 0:
        kernel.weights_host.data = kernel.weights_host.new_zeros(max(kernel.dims))
