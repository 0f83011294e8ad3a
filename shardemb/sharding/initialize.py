"""First values of sharded tables: the same under every plan and number of ranks."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

# Rows drawn from one generator: a shard draws the blocks that it touches.
BLOCK_ROWS = 65_536

Source = Callable[[int, int], torch.Tensor]


def local_blocks(value: torch.Tensor | ShardedTensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(row offset, column offset, tensor) of what this rank holds of a table."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            row, column = shard.metadata.shard_offsets
            yield row, column, shard.tensor
    else:
        yield 0, 0, value


@torch.no_grad()
def fill(value: torch.Tensor | ShardedTensor, source: Source) -> None:
    """Set what this rank holds of a table; `source(first, last)` gives whole rows of it."""
    for row, column, tensor in local_blocks(value):
        rows, columns = tensor.shape
        first = row
        while first < row + rows:
            last = min((first // BLOCK_ROWS + 1) * BLOCK_ROWS, row + rows)
            part = source(first, last)[:, column : column + columns]
            tensor[first - row : last - row].copy_(part)
            first = last


def from_parameter(parameter: nn.Parameter) -> Source:
    """The values that the unsharded module already has."""
    return lambda first, last: parameter[first:last]


def from_seed(config: BaseEmbeddingConfig, seed: int, device: torch.device) -> Source | None:
    """Uniform values as the table's config asks; None where it has an initializer of its own."""
    init = config.init_fn
    if not isinstance(init, functools.partial) or init.func is not nn.init.uniform_:
        return None
    low, high = config.get_weight_init_min(), config.get_weight_init_max()

    def draw(first: int, last: int) -> torch.Tensor:
        block = first // BLOCK_ROWS
        digest = hashlib.sha256(f"{seed}/{config.name}/{block}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
        start = block * BLOCK_ROWS
        rows = min(BLOCK_ROWS, config.num_embeddings - start)
        values = torch.empty(rows, config.embedding_dim, device=device)
        values.uniform_(low, high, generator=generator)
        return values[first - start : last - start]

    return draw
