"""The dot interaction of DLRM, for which every pair is computed once in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn.functional import pad
from torchrec import KeyedTensor


class DotInteraction(nn.Module):
    """What torchrec.models.dlrm.InteractionArch computes, at less than half of its time on a CPU.

    The products are a symmetric matrix, so one batched product gives its gradient, not two. The
    embeddings are taken in the order in which they come, which depends on how tables are sharded:
    only which product is whose changes with it, and nothing is copied to bring them into another.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names` are the sparse features, in the order of their pairs in the output."""
        super().__init__()
        self.names = tuple(names)
        self._set_order(self.names, torch.device("cpu"))

    def forward(self, dense: torch.Tensor, pooled: KeyedTensor) -> torch.Tensor:
        """[batch_size, dim + pairs] from [batch_size, dim] and embeddings of dim for each name."""
        order = tuple(pooled.keys())
        if order != self._order:
            self._set_order(order, dense.device)
        sparse = pooled.values().view(len(dense), len(order), -1)
        kind = dense.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else sparse.dtype
        products = _PairProducts.apply(dense.to(dtype), sparse.to(dtype), self.pairs, self.numbers)
        return torch.cat((dense, products), dim=1)

    def _set_order(self, order: tuple[str, ...], device: torch.device) -> None:
        """The dense vector comes first, then those of `order`."""
        self._order = order
        places = torch.tensor([0, *(1 + order.index(name) for name in self.names)])
        first, second = places[torch.triu_indices(len(places), len(places), offset=1)]
        # Of each pair of vectors the number of its product; those with themselves have none, which
        # is the number after the last.
        numbers = torch.full((len(places), len(places)), len(first))
        numbers[first, second] = numbers[second, first] = torch.arange(len(first))
        pairs = first * len(places) + second
        self.register_buffer("pairs", pairs.to(device), persistent=False)
        self.register_buffer("numbers", numbers.flatten().to(device), persistent=False)


class _PairProducts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        dense: torch.Tensor,
        sparse: torch.Tensor,
        pairs: torch.Tensor,
        numbers: torch.Tensor,
    ) -> torch.Tensor:
        vectors = torch.cat((dense.unsqueeze(1), sparse), dim=1)
        ctx.save_for_backward(vectors, numbers)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return products.gather(1, pairs.expand(len(dense), -1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        vectors, numbers = ctx.saved_tensors
        rows, count, _ = vectors.shape
        of_pairs = pad(gradient, (0, 1)).gather(1, numbers.expand(rows, -1))
        of_matrix = of_pairs.view(rows, count, count)
        # Apart, so that neither is a part of a larger tensor: that would be copied once more.
        of_dense = torch.bmm(of_matrix[:, :1], vectors).squeeze(1)
        return of_dense, torch.bmm(of_matrix[:, 1:], vectors), None, None
