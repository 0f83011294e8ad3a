"""Optimizers of tables in which only the rows that a step has looked up change.

The arithmetic is that of FBGEMM's GPU kernels, for what its CPU kernels lack: Adam and LAMB, and
weight decay, which is decoupled. The count of steps is the table's, so that a row that is rarely
looked up is corrected for all steps since the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.optim import Optimizer


class RowRule(Protocol):
    """A dataclass; `lr` may be changed between steps."""

    lr: float

    def new_states(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """For a table [rows, columns]: in fp32."""
        ...

    def update(
        self,
        weight: torch.Tensor,
        states: dict[str, torch.Tensor],
        rows: torch.Tensor,
        gradient: torch.Tensor,
        step: int,
    ) -> None:
        """Change `rows`, each named once, by the rows of `gradient` [len(rows), columns]; `step`
        counts from 1."""
        ...


@dataclass
class RowAdam:
    """Where every row is looked up in every step this is `torch.optim.AdamW`.

    `is_rowwise`: one second moment for each row, the mean over its columns. `has_trust_ratio`: each
    row's change is scaled to the length of the row (LAMB: You et al., ICLR 2020). A row of zeros
    stays one, as on GPUs; a change of zero is none, where FBGEMM divides by zero.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    is_rowwise: bool
    has_trust_ratio: bool = False

    def new_states(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        second = weight.shape[:1] if self.is_rowwise else weight.shape
        return {
            "exp_avg": torch.zeros(weight.shape, device=weight.device),
            "exp_avg_sq": torch.zeros(second, device=weight.device),
        }

    @torch.no_grad()
    def update(
        self,
        weight: torch.Tensor,
        states: dict[str, torch.Tensor],
        rows: torch.Tensor,
        gradient: torch.Tensor,
        step: int,
    ) -> None:
        beta1, beta2 = self.betas
        squares = gradient.square()
        if self.is_rowwise:
            squares = squares.mean(dim=1)
        first = states["exp_avg"][rows].lerp_(gradient, 1 - beta1)
        second = states["exp_avg_sq"][rows].mul_(beta2).add_(squares, alpha=1 - beta2)
        states["exp_avg"][rows], states["exp_avg_sq"][rows] = first, second
        size = second.div(1 - beta2**step).sqrt_().add_(self.eps)
        change = first.div_(1 - beta1**step).div_(size[:, None] if self.is_rowwise else size)
        values = weight[rows].float()
        change.add_(values, alpha=self.weight_decay)
        if self.has_trust_ratio:
            ratio = values.norm(dim=1) / change.norm(dim=1)
            change.mul_(ratio.nan_to_num_(posinf=0.0)[:, None])
        weight[rows] = values.sub_(change, alpha=self.lr).to(weight.dtype)


@dataclass
class RowWiseAdagradWithDecay:
    """Row-wise Adagrad; each row that is looked up is multiplied by 1 - lr * weight_decay too."""

    lr: float
    eps: float
    weight_decay: float

    def new_states(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": torch.zeros(weight.shape[:1], device=weight.device)}

    @torch.no_grad()
    def update(
        self,
        weight: torch.Tensor,
        states: dict[str, torch.Tensor],
        rows: torch.Tensor,
        gradient: torch.Tensor,
        step: int,
    ) -> None:
        total = states["sum"][rows].add_(gradient.square().mean(dim=1))
        states["sum"][rows] = total
        change = gradient / total.sqrt_().add_(self.eps)[:, None]
        values = weight[rows].float()
        change.add_(values, alpha=self.weight_decay)
        weight[rows] = values.sub_(change, alpha=self.lr).to(weight.dtype)


class ReplicatedRows(Optimizer):
    """A rule for tables that every rank holds, whose gradients are dense: rows with a gradient of
    zero are taken for rows that were not looked up."""

    def __init__(self, params: Iterable[torch.nn.Parameter], rule: Any) -> None:
        super().__init__(params, {"lr": rule.lr})
        self.rule = rule
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = rule.new_states(parameter)
                self.state[parameter]["step"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rule = replace(self.rule, lr=group["lr"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                rows = parameter.grad.any(dim=1).nonzero()[:, 0]
                rule.update(parameter, state, rows, parameter.grad[rows], int(state["step"]))
