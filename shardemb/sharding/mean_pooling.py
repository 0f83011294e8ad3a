"""Mean pooling that is the same for every sharding type: a pooled sum over the number of ids.

TorchRec 1.8 leaves the division to kernels for some sharding types and divides itself for
row-wise ones, where it adds 1e-6 to every divisor (that of sum-pooled features too) and divides
weighted bags by the sum of their weights, while FBGEMM divides by the number of ids and its CPU
kernel has a wrong gradient for weighted means. Here all types sum, and one division follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.types import Awaitable
from torchrec.modules.embedding_modules import get_embedding_names_by_table


def take_over_mean_pooling(module: EmbeddingBagCollection) -> frozenset[str]:
    """Turn the mean-pooled tables of `module` into sums; the output keys that are to be divided."""
    configs = module.embedding_bag_configs()
    keys: set[str] = set()
    for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
        if config.pooling == PoolingType.MEAN:
            config.pooling = PoolingType.SUM
            keys.update(names)
    return frozenset(keys)


def divide_output(sharded: nn.Module, keys: frozenset[str]) -> None:
    """Have the outputs `keys` of a sharded collection divided by the lengths of their bags."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], pooled: Awaitable[KeyedTensor]) -> None:
        features: KeyedJaggedTensor = inputs[0]
        pooled.callbacks.append(lambda tensor: _divide(tensor, features, keys))

    if keys:
        sharded.register_forward_hook(hook)


def _divide(pooled: KeyedTensor, features: KeyedJaggedTensor, keys: frozenset[str]) -> KeyedTensor:
    lengths = features.lengths().view(len(features.keys()), -1).clamp(min=1)
    row = {name: i for i, name in enumerate(features.keys())}
    values = pooled.values()
    ones = torch.ones_like(lengths[0])
    divisors = torch.stack(
        # FEATURE, or FEATURE@TABLE where several tables use the feature.
        [lengths[row[key.split("@")[0]]] if key in keys else ones for key in pooled.keys()],  # noqa: SIM118
        dim=1,
    )
    repeats = torch.tensor(pooled.length_per_key(), device=values.device)
    divisor = divisors.repeat_interleave(repeats, dim=1, output_size=values.shape[1])
    return KeyedTensor(
        keys=pooled.keys(), length_per_key=pooled.length_per_key(), values=values / divisor
    )
