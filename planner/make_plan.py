"""The road of a plan: tables and hardware -> options with costs -> search -> bound -> plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from planner.assemble import assemble
from planner.constraints import TableConstraint
from planner.cost.predict import predict
from planner.cost.stages import CostModel
from planner.options import make_problem
from planner.plan import Objective, Plan, Seconds
from planner.reasons import with_reasons
from planner.search.bound import lower_bound
from planner.search.objective import Goal
from planner.search.optimize import search
from planner.search.relaxation import Relaxation
from planner.tables import TableSpec
from planner.topology import Topology


def make_plan(
    tables: Sequence[TableSpec],
    topology: Topology,
    cost_model: CostModel,
    batch_size: int,
    *,
    objective: Objective = "stages",
    constraints: Mapping[str, TableConstraint] | None = None,
    dense_bytes: int = 0,
    seed: int = 0,
    time_budget: float | None = None,
) -> Plan:
    """The best plan the search finds, with its predicted cost and a certified lower bound.

    `batch_size` is rows a step on each rank, `dense_bytes` what the dense model takes on each
    device. The same seed gives the same plan; with `time_budget` (seconds) the search goes on
    until then, or until there is next to nothing to gain, and the plan depends on how far it came.

    Raises DoesNotFit where nothing fits, with the proof and the smallest changes that would
    fit; RequestError where tables, constraints and topology contradict each other.
    """
    constraints = constraints or {}
    began = time.monotonic()
    problem = make_problem(tables, topology, cost_model, batch_size, constraints, dense_bytes)
    goal = Goal(problem, objective)
    relaxation = Relaxation(goal)
    listed = time.monotonic()
    deadline = None if time_budget is None else began + time_budget
    placement = search(relaxation, seed, deadline)
    if placement is None:
        from planner.feasibility import DoesNotFit  # here: plans that fit need not wait for it
        from planner.inputs import Inputs

        tables = tuple(tables)
        raise DoesNotFit(
            Inputs(tables, topology, cost_model, batch_size, objective, constraints, dense_bytes)
        )
    bound = lower_bound(relaxation, placement.objective)
    plan = assemble(problem, placement.option, placement.places, constraints)
    plan = predict(plan, cost_model, batch_size, objective, dense_bytes)
    step_ms = plan.predicted.step_ms or 0.0
    predicted = plan.predicted.model_copy(
        update={
            "bound_ms": min(bound, step_ms),
            "gap_percent": max(0.0, 100 * (step_ms / bound - 1)) if bound > 0 else None,
        }
    )
    seconds = Seconds(
        options=listed - began - problem.cost_seconds,
        cost=problem.cost_seconds,
        search=time.monotonic() - listed,
    )
    plan = plan.model_copy(update={"predicted": predicted, "seconds": seconds})
    return with_reasons(plan, problem, placement.option)
