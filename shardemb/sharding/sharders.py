"""TorchRec's sharders, with row-wise sharding shown on CPU too."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.types import ModuleSharder

from planner.geometry import SHARDING_TYPES
from shardemb.precision_config import CommunicationConfig

# Gradients of a mean loss are below fp16's range in large batches: they are sent multiplied by it.
FP16_LOSS_SCALE = 1024.0


class PooledSharder(EmbeddingBagCollectionSharder):
    """The stock sharder hides row-wise types on CPU, though FBGEMM and gloo run them."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)


def sharders(
    communication: CommunicationConfig, device: torch.device
) -> list[ModuleSharder[nn.Module]]:
    """Sharders for every kind of module that `shard_model` shards."""
    scale = FP16_LOSS_SCALE if communication.backward == "fp16" else None
    precision = QCommsConfig(
        forward_precision=CommType(communication.forward),
        backward_precision=CommType(communication.backward),
        backward_loss_scale=scale,
    )
    codecs = get_qcomm_codecs_registry(precision, device=device)
    return [
        PooledSharder(qcomm_codecs_registry=codecs),
        EmbeddingCollectionSharder(qcomm_codecs_registry=codecs),
    ]
