"""The models' hidden layers, with normalization and dropout where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from shardemb.models.batch_norm import BatchNorm

Norm = Literal["batch", "layer"]
_NORMS = ("batch", "layer")


class HiddenLayer(nn.Module):
    """Linear, norm, ReLU, dropout."""

    def __init__(self, in_size: int, out_size: int, dropout: float, norm: Norm | None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_size, out_size)
        self.norm: nn.Module = nn.Identity()
        if norm is not None:
            self.norm = BatchNorm(out_size) if norm == "batch" else nn.LayerNorm(out_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`values` [batch_size, in_size]; `mask` [batch_size] is 0 for rows of padding."""
        values = self.linear(values)
        is_batch_norm = isinstance(self.norm, BatchNorm)
        values = self.norm(values, mask) if is_batch_norm else self.norm(values)
        return self.dropout(torch.relu(values))


class MLP(nn.Module):
    """Hidden layers of `sizes`; without any, values pass through."""

    def __init__(
        self, in_size: int, sizes: Sequence[int], dropout: float = 0.0, norm: Norm | None = None
    ) -> None:
        super().__init__()
        if norm is not None and norm not in _NORMS:
            raise ValueError(f"norm is {norm!r}; choose {' or '.join(_NORMS)}, or leave it out")
        pairs = zip([in_size, *sizes], sizes, strict=False)
        self.layers = nn.ModuleList(HiddenLayer(*pair, dropout, norm) for pair in pairs)

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`values` [batch_size, in_size]; `mask` [batch_size] is 0 for rows of padding."""
        for layer in self.layers:
            values = layer(values, mask)
        return values
