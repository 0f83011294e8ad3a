"""DLRM (Naumov et al., "Deep Learning Recommendation Model", 2019) on TorchRec's modules."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from torch import nn
from torchrec import EmbeddingBagCollection

from planner import RequestError
from shardemb.data.batch import Batch
from shardemb.models.dot_interaction import DotInteraction
from shardemb.models.mlp import MLP, Norm


class DLRM(nn.Module):
    """Dot products between all embeddings and the dense features' embedding, then an MLP.

    All tables have one embedding_dim. `dense_layers` are the hidden sizes of the dense MLP,
    whose last layer has embedding_dim; `over_layers` those of the MLP before the outputs.
    `dropout` and `norm` (batch, layer) are of both MLPs.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        dense_layers: Sequence[int] = (64,),
        over_layers: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        norm: Norm | None = None,
        num_outputs: int = 1,
    ) -> None:
        super().__init__()
        tables = embeddings.embedding_bag_configs()
        dims = sorted({table.embedding_dim for table in tables})
        if len(dims) > 1 or num_dense == 0:
            found = f"tables have {dims}" if num_dense else "there are no dense columns"
            raise RequestError(
                "model.name: dlrm needs dense columns and tables of one embedding_dim, but "
                f"{found}; use dcn_v2, which takes any"
            )
        names = [name for table in tables for name in table.feature_names]
        shared = sorted({name for name in names if names.count(name) > 1})
        if shared:
            raise RequestError(
                f"model.name: dlrm takes a feature from one table, but several tables use "
                f"{', '.join(shared)}; use dcn_v2, which takes any"
            )
        self.embeddings = embeddings
        self.dense = MLP(num_dense, [*dense_layers, dims[0]], dropout, norm)
        self.interaction = DotInteraction(names)
        width = dims[0] + comb(len(names) + 1, 2)  # of the dense features and of all pairs
        self.over = MLP(width, over_layers, dropout, norm)
        self.output = nn.Linear(over_layers[-1] if over_layers else width, num_outputs)

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch_size, num_outputs]."""
        dense = self.dense(batch.dense, batch.mask)
        pairs = self.interaction(dense, self.embeddings(batch.sparse))
        return self.output(self.over(pairs, batch.mask))
