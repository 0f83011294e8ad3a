"""Plans for tight memory: fill the fullest device and host as little as possible."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from planner.options import DEVICE, HOST, Problem
from planner.search.improve import exchange, reconsider
from planner.search.objective import Goal
from planner.search.placement import Choice, Placement
from planner.shards import Floats

SHARPENING = (3, 5, 7, 5, 7)
EXCHANGES = 12


@dataclass(frozen=True)
class _Fill(Goal):
    """Minimize how full the fullest is; `within` has the limits, `problem` has none, so that
    placements on the way may exceed them."""

    within: Problem = field(kw_only=True)

    @cached_property
    def load(self) -> Floats:
        options, problem = self.options, self.within
        filled = [options.memory / max(problem.memory_limit - problem.fixed_memory, 1)]
        if options.host_memory.any():
            local = problem.topology.local_world_size
            filled.append(options.host_memory * local / problem.host_memory_limit)
        return np.stack(filled, axis=1)


class _Filling(Placement):
    """Measured by the fullest of all, be it a device or a host: one norm over both columns."""

    def norm(self, sums: Floats) -> Floats:
        return np.asarray(np.maximum(sums.sum(axis=-1), 0) ** (2.0**-self.power) * self.scale[0])

    def slope(self, sums: Floats) -> Floats:
        return np.ones_like(self.scale)

    def sharpen(self, power: int) -> None:
        self.measure_by(np.full_like(self.scale, self.load.max()), power)


def pack(goal: Goal, scale: Floats, power: int, generator: np.random.Generator) -> Placement | None:
    """A placement for `goal` that fits, measured by `scale` and `power`; None if none is found."""
    unlimited = replace(goal.problem, memory_limit=np.inf, host_memory_limit=np.inf)
    filling = _Fill(unlimited, goal.objective, within=goal.problem)
    possible = np.flatnonzero(goal.fits)
    bounds = np.searchsorted(goal.options.unit[possible], np.arange(len(unlimited.units) + 1))
    options = [possible[a:b] for a, b in pairwise(bounds)]
    packed = _Filling(filling, np.ones(filling.load.shape[1]), SHARPENING[-1])
    smallest = [min((filling.load[own] * goal.devices[own, None]).sum(axis=1)) for own in options]
    for unit in np.argsort(-np.array(smallest), kind="stable"):
        packed.insert(int(unit), options[unit])
    for sharpening in SHARPENING:
        placement = _under_limits(packed, goal, scale, power)
        if placement:
            return placement
        packed.sharpen(sharpening)
        reconsider(packed, options, generator.permutation(len(options)))
        for _ in range(EXCHANGES):
            exchange(packed, DEVICE, generator)
            exchange(packed, HOST, generator)
    return _under_limits(packed, goal, scale, power)


def _under_limits(packed: Placement, goal: Goal, scale: Floats, power: int) -> Placement | None:
    """The same placement seen with the goal's loads and limits, if it keeps them."""
    placement = Placement(goal, scale, power)
    for unit, places in enumerate(packed.places):
        placement.put(unit, Choice(0.0, int(packed.option[unit]), places))
    return placement if placement.fits else None
