"""TorchRec's sharders, with row-wise sharding shown on CPU too."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder

from planner.geometry import SHARDING_TYPES


class PooledSharder(EmbeddingBagCollectionSharder):
    """The stock sharder hides row-wise types on CPU, though FBGEMM and gloo run them."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


def sharders() -> list[ModuleSharder[nn.Module]]:
    """Sharders for every kind of module that `shard_model` shards."""
    return [PooledSharder(), EmbeddingCollectionSharder()]
