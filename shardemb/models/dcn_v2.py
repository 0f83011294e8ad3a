"""DCN-v2 (Wang et al., "DCN V2", WWW 2021), stacked, on TorchRec's modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.modules.mlp import MLP

from shardemb.data.batch import Batch


class DCNv2(nn.Module):
    """Low-rank cross layers over the concatenated features, then an MLP.

    Tables may have any embedding_dim. `dense_layers` is the MLP of the dense features before the
    cross layers (none: they enter as they are), `over_layers` the one before the logit.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        dense_layers: Sequence[int] = (),
        cross_layers: int = 3,
        low_rank: int = 64,
        over_layers: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        tables = embeddings.embedding_bag_configs()
        self.names = [name for names in get_embedding_names_by_table(tables) for name in names]
        has_dense_mlp = num_dense > 0 and len(dense_layers) > 0
        self.dense = MLP(num_dense, list(dense_layers)) if has_dense_mlp else nn.Identity()
        width = dense_layers[-1] if has_dense_mlp else num_dense
        width += sum(table.embedding_dim * len(table.feature_names) for table in tables)
        self.cross = LowRankCrossNet(width, cross_layers, low_rank)
        self.over = nn.Sequential(
            MLP(width, list(over_layers)), nn.Linear(over_layers[-1] if over_layers else width, 1)
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [batch_size, 1]."""
        # By name: the order of the outputs depends on how tables are sharded.
        pooled = self.embeddings(batch.sparse).to_dict()
        parts = [self.dense(batch.dense), *(pooled[name] for name in self.names)]
        return self.over(self.cross(torch.cat(parts, dim=1)))
