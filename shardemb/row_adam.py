"""Adam for tables: only the rows that a step has looked up change.

The arithmetic is that of FBGEMM's GPU kernels (`ADAM`, `PARTIAL_ROWWISE_ADAM`), which have no
counterpart for CPU: the count of steps is the table's, so that a row that is rarely looked up is
corrected for the steps since the start, and weight decay is decoupled. Where every row is looked up
in every step this is `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer


@dataclass
class RowAdam:
    """`lr` may be changed between steps. `is_rowwise`: one second moment for each row, the mean
    over its columns."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    is_rowwise: bool

    def new_states(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """For a table [rows, columns]: moments in fp32."""
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
        """Change `rows`, each named once, by the rows of `gradient` [len(rows), columns]; `step`
        counts from 1."""
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
        weight[rows] = values.sub_(change, alpha=self.lr).to(weight.dtype)


class ReplicatedRowAdam(Optimizer):
    """The same for tables that every rank holds, whose gradients are dense: rows with a gradient
    of zero are taken for rows that were not looked up."""

    def __init__(self, params: Iterable[torch.nn.Parameter], **rule: Any) -> None:
        super().__init__(params, rule)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _rule_of(group).new_states(parameter)
                self.state[parameter]["step"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rule = _rule_of(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                rows = parameter.grad.any(dim=1).nonzero()[:, 0]
                rule.update(parameter, state, rows, parameter.grad[rows], int(state["step"]))


def _rule_of(group: dict[str, Any]) -> RowAdam:
    return RowAdam(**{key: group[key] for key in RowAdam.__dataclass_fields__})
