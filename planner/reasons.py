"""Why each table got its option, in a few words."""

from __future__ import annotations

import numpy as np

from planner.geometry import SHARDING_TYPES
from planner.options import Problem
from planner.plan import Plan
from planner.shards import Floats, Ints


def with_reasons(plan: Plan, problem: Problem, option: Ints) -> Plan:
    """`plan` with the reason of each table's choice: cheapest, or what it is better in."""
    options = problem.options
    work = options.cost.sum(axis=1) * options.devices(problem.topology)
    largest = options.cost.sum(axis=1)
    tables = dict(plan.tables)
    starts = np.searchsorted(options.unit, np.arange(len(problem.units) + 1))
    for unit, members in enumerate(problem.units):
        own = np.arange(starts[unit], starts[unit + 1])
        reason = _reason(problem, own, int(option[unit]), work, largest)
        for table in members:
            name = problem.tables[table].name
            tables[name] = tables[name].model_copy(update={"reason": reason})
    return plan.model_copy(update={"tables": tables})


def _reason(problem: Problem, own: Ints, chosen: int, work: Floats, largest: Floats) -> str:
    options = problem.options
    cheapest = int(own[work[own].argmin()])
    if work[chosen] <= work[cheapest] * (1 + 1e-3):
        return "the least work of all its options"
    other = SHARDING_TYPES[options.sharding_type[cheapest]]
    more = f"{100 * (work[chosen] / work[cheapest] - 1):.0f}% more work"
    if largest[chosen] < largest[cheapest]:
        return (
            f"pieces of {largest[chosen]:.3g} ms instead of {largest[cheapest]:.3g} ms "
            f"({other}), for {more}"
        )
    if options.memory[chosen] < options.memory[cheapest]:
        return f"less memory on a device than {other}, for {more}"
    return f"evens out the devices better than {other}, for {more}"
