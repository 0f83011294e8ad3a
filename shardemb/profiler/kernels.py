"""FBGEMM's fused kernels, timed: pooled lookups, and backward with the optimizer in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from planner.tables import TableSpec
from shardemb.profiler.ids import ID_BATCHES, draw_ids
from shardemb.profiler.timing import WARM_UP, Timing, is_enough, summarize, timed
from shardemb.profiler.workloads import DenseMatmul, HostCopy, KernelSet

_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
_PRECISIONS = {"fp32": SparseType.FP32, "fp16": SparseType.FP16}


class KernelTiming(NamedTuple):
    """Of a set of tables."""

    forward: Timing
    backward: Timing


def time_kernel(
    work: KernelSet, device: torch.device, generator: np.random.Generator
) -> KernelTiming:
    """Medians over repetitions, each with other ids than the one before."""
    kernel = _build(work.tables, device)
    batches = cycle([_draw_batch(work, device, generator) for _ in range(ID_BATCHES)])
    gradient = torch.rand(work.batch_size, sum(t.embedding_dim for t in work.tables), device=device)
    forward: list[float] = []
    backward: list[float] = []
    while not is_enough([sum(pair) for pair in zip(forward, backward, strict=True)][WARM_UP:]):
        output, forward_ms = timed(device, partial(kernel, *next(batches)))
        _, backward_ms = timed(device, partial(output.backward, gradient))
        forward.append(forward_ms)
        backward.append(backward_ms)
    return KernelTiming(summarize(forward[WARM_UP:]), summarize(backward[WARM_UP:]))


def time_copy(work: HostCopy, device: torch.device) -> Timing:
    """A copy out of pinned memory, which a loader prefetches into."""
    source = torch.zeros(work.size_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return _repeated(device, lambda: target.copy_(source, non_blocking=True))


def time_matmul(work: DenseMatmul, device: torch.device) -> Timing:
    """A matrix product as dense layers have them."""
    rows, inner, columns = work.shape
    left, right = torch.rand(rows, inner, device=device), torch.rand(inner, columns, device=device)
    return _repeated(device, lambda: left @ right)


def _repeated(device: torch.device, work: Callable[[], Any]) -> Timing:
    times: list[float] = []
    while not is_enough(times[WARM_UP:]):
        times.append(timed(device, work)[1])
    return summarize(times[WARM_UP:])


def _build(
    tables: tuple[TableSpec, ...], device: torch.device
) -> SplitTableBatchedEmbeddingBagsCodegen:
    on_cpu = device.type == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(t.num_embeddings, t.embedding_dim, location, compute) for t in tables],
        optimizer=_OPTIMIZERS[tables[0].optimizer],
        weights_precision=_PRECISIONS[tables[0].dtype],
        output_dtype=SparseType.FP32,
        stochastic_rounding=False,
        learning_rate=0.01,
        device=device,
    )
    # Memory that was never written is one page of zeros to a CPU, and far too fast.
    for tensor in (*kernel.parameters(), *kernel.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(0.01)
    return kernel


def _draw_batch(
    work: KernelSet, device: torch.device, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and offsets of all tables, one after the other."""
    drawn = [draw_ids(table, work.batch_size, generator) for table in work.tables]
    lengths = np.concatenate([lengths for _, lengths in drawn])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([ids for ids, _ in drawn])
    return torch.from_numpy(indices).to(device), torch.from_numpy(offsets).to(device)
