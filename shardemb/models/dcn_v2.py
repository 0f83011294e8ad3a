"""DCN-v2 (Wang et al., "DCN V2", WWW 2021), stacked, on TorchRec's modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from shardemb.data.batch import Batch
from shardemb.models.mlp import MLP, Norm


class DCNv2(nn.Module):
    """Low-rank cross layers over the concatenated features, then an MLP.

    Tables may have any embedding_dim. `dense_layers` is the MLP of the dense features before the
    cross layers (none: they enter as they are), `over_layers` the one before the outputs.
    `dropout` and `norm` (batch, layer) are of both MLPs.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        dense_layers: Sequence[int] = (),
        cross_layers: int = 3,
        low_rank: int = 64,
        over_layers: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        norm: Norm | None = None,
        num_outputs: int = 1,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        tables = embeddings.embedding_bag_configs()
        self.names = [name for names in get_embedding_names_by_table(tables) for name in names]
        has_dense_mlp = num_dense > 0 and len(dense_layers) > 0
        self.dense = MLP(num_dense, dense_layers if has_dense_mlp else (), dropout, norm)
        width = dense_layers[-1] if has_dense_mlp else num_dense
        width += sum(table.embedding_dim * len(table.feature_names) for table in tables)
        self.cross = LowRankCrossNet(width, cross_layers, low_rank)
        self.over = MLP(width, over_layers, dropout, norm)
        self.output = nn.Linear(over_layers[-1] if over_layers else width, num_outputs)

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch_size, num_outputs]."""
        # By name: the order of the outputs depends on how tables are sharded.
        pooled = self.embeddings(batch.sparse).to_dict()
        dense = self.dense(batch.dense, batch.mask)
        crossed = self.cross(torch.cat([dense, *(pooled[name] for name in self.names)], dim=1))
        return self.output(self.over(crossed, batch.mask))
