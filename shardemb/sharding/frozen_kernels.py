"""Fused kernels whose tables can stand still."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardemb.sharding.kernels import Kernel, kernels, uncounted


class FreezableKernel:
    """While `is_frozen`, a kernel looks up, and its backward is not run: weights and optimizer
    state keep their bits. Gradients still come to it, for the ranks exchange those of all tables.

    FBGEMM counts forwards as steps of its optimizers; those that train nothing are not counted.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.tables, self.is_frozen = kernel.tables, False
        self._module, self._plain_forward = kernel.module, kernel.module.forward
        self._hook = torch.zeros((), requires_grad=True)
        kernel.module.forward = self.forward

    def forward(self, *args: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and not self.is_frozen:
            trained: torch.Tensor = self._plain_forward(*args, **options)
            return trained
        with torch.no_grad(), uncounted(self._module):
            pooled: torch.Tensor = self._plain_forward(*args, **options)
        constant: torch.Tensor = _Constant.apply(self._hook, pooled)
        return constant


class _Constant(torch.autograd.Function):
    """What comes out is part of the graph, and backward ends there."""

    @staticmethod
    def forward(ctx: Any, hook: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        return None, None


def make_freezable(sharded: nn.Module) -> list[FreezableKernel]:
    return [FreezableKernel(kernel) for kernel in kernels(sharded)]
