"""Sums over ranks that gradients flow through, where rows of several ranks meet in one number."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Sum(torch.autograd.Function):
    """Every rank's result depends on every rank's input, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` of all ranks, added up; the gradient is that of the sum of all ranks' losses.

    A process without a process group is alone.
    """
    return _Sum.apply(values) if dist.is_initialized() else values


def rows_of_all_ranks(rows: torch.Tensor) -> torch.Tensor:
    """[ranks, n, ...] of `rows` [n, ...], of as many on each rank; the gradient as above."""
    places = rows.new_zeros(dist.get_world_size(), *rows.shape)
    places[dist.get_rank()] = rows
    return sum_over_ranks(places)
