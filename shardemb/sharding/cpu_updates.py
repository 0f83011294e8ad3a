"""Row rules inside backward on CPU, where FBGEMM has no kernel for them.

FBGEMM's kernel keeps the weights and pools; its backward, which would be SGD's, is never run.
Instead the gradients of a row's lookups are summed, and the row is changed by the table's rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import PoolingMode
from torch import nn

from shardemb.row_rules import RowRule
from shardemb.sharding.kernels import Kernel, cpu_kernels


class KernelUpdates:
    """Takes over the updates of one kernel's tables."""

    def __init__(self, kernel: Kernel, rule: RowRule) -> None:
        module = kernel.module
        self.rule, self.tables = rule, kernel.tables
        self.steps = [0] * len(self.tables)  # of each table so far
        self.weights: list[torch.Tensor] = module.split_embedding_weights()
        self.states = [rule.new_states(weight) for weight in self.weights]
        self.plain_forward = module.forward
        self._table_of_feature = list(module.feature_table_map)
        self._is_pooled = module.pooling_mode != PoolingMode.NONE
        # Of no use but to have autograd call backward.
        self._hook = torch.zeros((), requires_grad=True)
        module.forward = self.forward

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As the kernel's: [batch_size, sum of dims], or [ids, dim] where it does not pool."""
        pooled: torch.Tensor = _Lookup.apply(
            self._hook, self, indices, offsets, per_sample_weights, options
        )
        return pooled

    def update(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> None:
        """One step, by the gradient of what `forward` gave."""
        self.steps = [step + 1 for step in self.steps]
        lookups = list(self._lookups(indices.long(), offsets.long(), weights, gradient.float()))
        for table, weight in enumerate(self.weights):
            own = [lookup[1:] for lookup in lookups if lookup[0] == table]
            if not own or not sum(len(ids) for ids, _, _, _ in own):
                continue
            rows, summed = _sum_over_lookups(own)
            self.rule.update(weight, self.states[table], rows, summed, self.steps[table])

    def _lookups(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """For each feature: its table, ids, which row of the gradients each id's is, its weight,
        and the gradients."""
        features = self._table_of_feature
        batch_size = (len(offsets) - 1) // len(features)
        dims = [self.weights[table].shape[1] for table in features]
        columns = [0, *accumulate(dims)]
        ends = offsets[::batch_size].tolist()
        for feature, table in enumerate(features):
            ids = slice(ends[feature], ends[feature + 1])
            if self._is_pooled:
                own = offsets[feature * batch_size : (feature + 1) * batch_size + 1]
                bags = torch.arange(batch_size).repeat_interleave(own.diff())
                rows = gradient[:, columns[feature] : columns[feature + 1]]
            else:
                bags, rows = torch.arange(ids.stop - ids.start), gradient[ids]
            yield table, indices[ids], bags, None if weights is None else weights[ids], rows


def _sum_over_lookups(
    lookups: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each id once, and the sum of the gradients of its lookups."""
    ids = torch.cat([lookup[0] for lookup in lookups])
    starts = [0, *accumulate(len(lookup[3]) for lookup in lookups)]
    bags = torch.cat([lookup[1] + start for lookup, start in zip(lookups, starts, strict=False)])
    gradients = torch.cat([lookup[3] for lookup in lookups])
    weights = [lookup[2] for lookup in lookups if lookup[2] is not None]
    ids, order = ids.sort(stable=True)
    rows, counts = ids.unique_consecutive(return_counts=True)
    summed = nn.functional.embedding_bag(
        bags[order],
        gradients,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=torch.cat(weights)[order] if weights else None,
    )
    return rows, summed


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hook: torch.Tensor,
        optimizer: KernelUpdates,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        ctx.optimizer, ctx.lookups = optimizer, (indices, offsets, weights)
        result: torch.Tensor = optimizer.plain_forward(
            indices=indices, offsets=offsets, per_sample_weights=weights, **options
        )
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        ctx.optimizer.update(*ctx.lookups, gradient)
        return (None,) * 6


def take_over_updates(
    sharded: nn.Module, rules: Mapping[str, RowRule | None]
) -> list[KernelUpdates]:
    """Have the CPU kernels of tables that have a rule updated by it; tables of one kernel have the
    same optimizer."""
    return [
        KernelUpdates(kernel, rule)
        for kernel in cpu_kernels(sharded)
        if (rule := rules[kernel.tables[0]])
    ]
