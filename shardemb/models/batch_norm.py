"""Batch norm over the rows of all ranks, on every device."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import batch_norm

from shardemb.collectives import sum_over_ranks

EPS, MOMENTUM = 1e-5, 0.1  # of nn.BatchNorm1d


class BatchNorm(nn.Module):
    """nn.BatchNorm1d whose statistics in training are those of a step's rows on all ranks, without
    padding: the same as unsharded, and the same buffers on every rank.

    (torch's SyncBatchNorm runs on GPUs alone and counts padding.) Evaluation, which uses the
    buffers, has no collective.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`values` [batch_size, num_features]; `mask` [batch_size] is 0 for rows of padding."""
        if not self.training:
            buffers = self.running_mean, self.running_var
            return batch_norm(values, *buffers, self.weight, self.bias, eps=EPS)
        mask = mask[:, None]
        rows = sum_over_ranks(mask.sum()).clamp(min=1)
        mean = sum_over_ranks((values * mask).sum(dim=0)) / rows
        # In a second sum, since the difference of two large sums would lose what is left.
        centered = values - mean
        variance = sum_over_ranks((centered.square() * mask).sum(dim=0)) / rows
        self._remember(mean.detach(), variance.detach() * rows / (rows - 1).clamp(min=1))
        return centered * torch.rsqrt(variance + EPS) * self.weight + self.bias

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_mean.lerp_(mean, MOMENTUM)
        self.running_var.lerp_(variance, MOMENTUM)
