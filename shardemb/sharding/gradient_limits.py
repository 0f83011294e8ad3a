"""A limit on the gradients of embeddings, the same for every sharding type and device.

FBGEMM's kernels can clip too (`gradient_clipping`), but those of data_parallel tables cannot, and
where mean pooling is divided is ours to say. So the clipping is done where a table's embeddings are
given to the model: element by element, before gradients are sent and before those of a row's
lookups are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedTensor
from torchrec.modules.embedding_modules import get_embedding_names_by_table

Limits = dict[str, float]


def gradient_limits(
    module: EmbeddingBagCollection | EmbeddingCollection, of_tables: Mapping[str, float | None]
) -> Limits:
    """Of the output keys of a collection that is not sharded yet, where their table has one."""
    is_pooled = isinstance(module, EmbeddingBagCollection)
    configs = module.embedding_bag_configs() if is_pooled else module.embedding_configs()
    return {
        name: limit
        for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True)
        if (limit := of_tables[config.name]) is not None
        for name in names
    }


def limit_gradients(sharded: nn.Module, limits: Limits) -> None:
    """Have the gradients of the outputs of a sharded collection limited.

    The limits are for gradients of the mean loss over all ranks, and those that a rank has are
    `world_size` times as large, because they are averaged later.
    """
    world_size = dist.get_world_size()
    own = {name: limit * world_size for name, limit in limits.items()}

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        output.callbacks.append(lambda value: _limit(value, own))

    if own:
        sharded.register_forward_hook(hook)


def _limit(output: KeyedTensor | dict[str, JaggedTensor], limits: Limits) -> Any:
    if isinstance(output, KeyedTensor):
        if output.values().requires_grad:
            output.values().register_hook(_clip_columns(output, limits))
    else:
        for name in output.keys() & limits.keys():
            if output[name].values().requires_grad:
                output[name].values().register_hook(_clip(limits[name]))
    return output


def _clip(limit: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient.clamp(-limit, limit)


def _clip_columns(pooled: KeyedTensor, limits: Limits) -> Callable[[torch.Tensor], torch.Tensor]:
    of_keys = torch.tensor([limits.get(name, torch.inf) for name in pooled.keys()])  # noqa: SIM118
    limit = of_keys.repeat_interleave(torch.tensor(pooled.length_per_key()))
    limit = limit.to(pooled.values().device)
    return lambda gradient: gradient.clamp(-limit, limit)
