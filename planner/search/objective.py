"""The objective in the form that bound and search work on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.cost.stages import COMPUTE, LINKS
from planner.options import Options, Problem
from planner.plan import Objective
from planner.shards import Bools, Floats, Ints


@dataclass(frozen=True)
class Goal:
    """Minimize the sum over the columns of `load` of the most loaded device's.

    `stages` has a column for each stage; `max_total` one, for their sum.
    """

    problem: Problem
    objective: Objective
    # What a full device counts, in ms, where the search should fill devices evenly too.
    memory_weight: float = 0.0

    @property
    def options(self) -> Options:
        return self.problem.options

    @cached_property
    def load(self) -> Floats:
        """[options, columns]: ms that an item adds to each device in its scope."""
        cost = self.options.cost
        return cost if self.objective == "stages" else cost.sum(axis=1, keepdims=True)

    @cached_property
    def measured(self) -> Floats:
        """[options, columns or one more]: what placements are measured by, memory at last."""
        if not self.memory_weight:
            return self.load
        free = self.problem.memory_limit - self.problem.fixed_memory
        filled = self.options.memory[:, None] / free * self.memory_weight
        return np.concatenate([self.load, filled], axis=1)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Columns whose maxima are bounded together."""
        return [COMPUTE, LINKS] if self.objective == "stages" else [[0]]

    @cached_property
    def group_load(self) -> Floats:
        """[options, groups]: what an item adds to a device, summed over each group."""
        return np.stack([self.load[:, group].sum(axis=1) for group in self.groups], axis=1)

    @cached_property
    def fits(self) -> Bools:
        """Options one item of which fits an empty device."""
        options, problem = self.options, self.problem
        free = problem.memory_limit - problem.fixed_memory
        return np.asarray(
            (options.memory <= free) & (options.host_memory <= problem.host_memory_limit)
        )

    @cached_property
    def devices(self) -> Ints:
        return self.options.devices(self.problem.topology)

    @cached_property
    def undominated(self) -> Ints:
        """Options that no other of their unit beats in everything a plan could care about."""
        options = self.options
        devices = self.devices[:, None]
        worth = np.concatenate(
            [
                self.load * devices,
                self.group_load,
                np.stack([options.memory, options.host_memory], axis=1),
                np.stack([options.memory, options.host_memory], axis=1) * devices,
            ],
            axis=1,
        )
        worth[~self.fits] = np.inf
        return np.flatnonzero(~_dominated(options.unit, worth) & self.fits)

    @cached_property
    def in_device_memory(self) -> Ints:
        """The undominated options without those in host memory."""
        in_host = self.options.host_memory[self.undominated] > 0
        return np.asarray(self.undominated[~in_host])


def _dominated(unit: Ints, worth: Floats) -> Bools:
    """Which rows another row of their unit is no worse than; of equal rows all but the first.

    `unit` is sorted.
    """
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    counts = np.diff(np.append(starts, len(unit)))
    dominated = np.zeros(len(unit), dtype=np.bool_)
    for step in range(1, int(counts.max(initial=1))):
        # Compare each row with the one `step` after it in its unit, both ways.
        first = np.flatnonzero(unit[:-step] == unit[step:])
        a, b = worth[first], worth[first + step]
        a_wins, b_wins = (a <= b).all(axis=1), (b <= a).all(axis=1)
        dominated[first[b_wins & ~a_wins]] = True
        dominated[first[a_wins] + step] = True
    return dominated
