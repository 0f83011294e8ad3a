"""What make_plan is given, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.constraints import TableConstraint
from planner.cost.stages import STAGES, CostModel
from planner.options import Problem, make_problem
from planner.plan import Objective
from planner.shards import Floats, ShardColumns
from planner.tables import TableSpec
from planner.topology import Topology


@dataclass(frozen=True)
class Inputs:
    """Those of make_plan."""

    tables: tuple[TableSpec, ...]
    topology: Topology
    cost_model: CostModel
    batch_size: int
    objective: Objective = "stages"
    constraints: Mapping[str, TableConstraint] = field(default_factory=dict)
    dense_bytes: int = 0

    def problem(self) -> Problem:
        """RequestError where the constraints leave a table no option."""
        return self._problem(self.cost_model)

    def memory_problem(self) -> Problem:
        """Without costs, for questions of memory alone."""
        return self._problem(_NoCost())

    def _problem(self, cost_model: CostModel) -> Problem:
        return make_problem(
            self.tables,
            self.topology,
            cost_model,
            self.batch_size,
            self.constraints,
            self.dense_bytes,
        )


class _NoCost:
    name = "none"

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        return np.zeros((len(shards), len(STAGES)))
