"""DLRM (Naumov et al., "Deep Learning Recommendation Model", 2019) on TorchRec's modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.models import dlrm as torchrec_dlrm

from planner import RequestError
from shardemb.data.batch import Batch


class DLRM(nn.Module):
    """Dot products between all embeddings and the dense features' embedding, then an MLP.

    All tables have one embedding_dim. `dense_layers` are the hidden sizes of the dense MLP,
    whose last layer has embedding_dim; `over_layers` those of the MLP before the logit.
    """

    def __init__(
        self,
        embeddings: EmbeddingBagCollection,
        num_dense: int,
        dense_layers: Sequence[int] = (64,),
        over_layers: Sequence[int] = (64, 32),
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
        self.dlrm = torchrec_dlrm.DLRM(
            embeddings,
            dense_in_features=num_dense,
            dense_arch_layer_sizes=[*dense_layers, dims[0]],
            over_arch_layer_sizes=[*over_layers, 1],
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [batch_size, 1]."""
        return self.dlrm(batch.dense, batch.sparse)
