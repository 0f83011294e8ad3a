"""Options for all units under a cap on what one item may cost: tables are whole unless large."""

from __future__ import annotations

import numpy as np

from planner.errors import PlannerError
from planner.options import Problem
from planner.search.baselines import unit_names
from planner.shards import TYPE_CODE, Ints


def options_under(problem: Problem, cap: float) -> Ints:
    """[units]: an option in device memory of each, table_wise where it has that option and its item
    costs no more than `cap` of an even device; otherwise, of those whose items do not, the one that
    costs least in sum, or the one with the smallest items.

    An even device has its part of all tables, whole. Options whose items fit no empty device are
    the last choice. PlannerError names a unit that has no option in device memory.
    """
    options = problem.options
    chosen = np.flatnonzero(options.host_memory == 0)
    unit, item_ms = options.unit[chosen], options.cost[chosen].sum(axis=1)
    total_ms = item_ms * options.devices(problem.topology)[chosen]
    cut = options.sharding_type[chosen] != TYPE_CODE["table_wise"]
    free = problem.memory_limit - problem.fixed_memory
    too_large = options.memory[chosen] > free

    def best(most_ms: float) -> Ints:
        """Positions in `chosen`, one a unit."""
        beyond = np.maximum(item_ms, most_ms)
        order = np.lexsort((total_ms, cut, beyond, too_large, unit))
        first = order[np.flatnonzero(np.diff(unit[order], prepend=-1))]
        return np.asarray(first)

    whole = best(np.inf)
    if len(whole) < len(problem.units):
        missing = np.setdiff1d(np.arange(len(problem.units)), unit)[0]
        raise PlannerError(
            f"table {unit_names(problem, int(missing))} has no option in device memory: its "
            "constraints leave none"
        )
    even_ms = total_ms[whole].sum() / problem.topology.world_size
    return np.asarray(chosen[best(cap * even_ms)])
