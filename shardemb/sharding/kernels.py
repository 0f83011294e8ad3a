"""FBGEMM's kernels inside TorchRec's sharded modules, which have no public name for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection


class Kernel(NamedTuple):
    """A fused kernel and the table of each of its shards."""

    module: SplitTableBatchedEmbeddingBagsCodegen
    tables: tuple[str, ...]


def kernels(model: nn.Module) -> Iterator[Kernel]:
    """Of all sharded collections in `model`: lookups are no registered modules there."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
            for lookup in module._lookups:
                for part in lookup.modules():
                    kernel = getattr(part, "_emb_module", None)
                    if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
                        yield Kernel(kernel, tuple(t.name for t in part.config.embedding_tables))


def cpu_kernels(model: nn.Module) -> Iterator[Kernel]:
    return (kernel for kernel in kernels(model) if kernel.module.use_cpu)


def set_step(kernel: SplitTableBatchedEmbeddingBagsCodegen, step: int) -> None:
    """Have its optimizer count on from `step`, also where it has counted already."""
    kernel.set_optimizer_step(step)
    if hasattr(kernel, "iter_cpu"):  # what it reads; filled from the other only while it is zero
        kernel.iter_cpu.fill_(step)


@contextmanager
def uncounted(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> Iterator[None]:
    """FBGEMM counts a step in every forward, whether it will train or not: not here."""
    counts = [getattr(kernel, name) for name in ("iter", "iter_cpu") if hasattr(kernel, name)]
    before = [count.clone() for count in counts]
    yield
    for count, value in zip(counts, before, strict=True):
        count.copy_(value)
