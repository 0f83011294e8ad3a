"""Which tables stand still in which steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torchrec.optim import CombinedOptimizer

from shardemb.optim import TABLES, parts_named, table_of
from shardemb.sharding.shard_model import ShardedModel

_PREFIX = "frozen_steps/"


class Freezing:
    """Holds tables: neither weights nor optimizer state of a frozen table change by a bit."""

    def __init__(self, model: ShardedModel, optimizer: CombinedOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._table = {
            parameter: table_of(name, model.planner_plan)
            for part in parts_named(TABLES, optimizer)
            for name, parameter in part.params.items()
        }
        self.frozen_steps: Counter[str] = Counter()  # of each table so far
        self.set(step=1, epoch=1)

    def set(self, step: int, epoch: int) -> None:
        """As in `step` of `epoch`, which count from 1; before its forward."""
        self._frozen = {
            table for table, freeze in self._model.frozen.items() if freeze.holds(step, epoch)
        }
        for kernel in self._model.kernels:
            kernel.is_frozen = kernel.tables[0] in self._frozen  # its tables freeze together

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the optimizer makes its step: it does not see frozen tables that it would update.
        (All data_parallel tables share one gradient, so none can be without.)"""
        before = [(group, group["params"]) for group in self._groups()]
        for group, parameters in before:
            group["params"] = [p for p in parameters if self._table[p] not in self._frozen]
        yield
        for group, parameters in before:
            group["params"] = parameters
        self.frozen_steps.update(self._frozen)

    def _groups(self) -> list[dict[str, Any]]:
        parts = parts_named(TABLES, self._optimizer)
        return [group for part in parts for group in part.param_groups]

    def trained_steps(self, step: int) -> dict[str, int]:
        """How often each table has been trained when the run has made `step` steps."""
        return {table: step - self.frozen_steps[table] for table in self._model.planner_plan.tables}

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {
            _PREFIX + table: torch.tensor([steps]) for table, steps in self.frozen_steps.items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.frozen_steps = Counter(
            {
                name.removeprefix(_PREFIX): int(steps)
                for name, steps in tensors.items()
                if name.startswith(_PREFIX)
            }
        )
