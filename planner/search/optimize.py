"""The search: many first plans from the relaxation under different caps, the best ones improved.

Anytime and deterministic: the same seed gives the same sequence of plans; more rounds, or more
time, only go further along it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise, product, zip_longest
from typing import Any, NamedTuple

import numpy as np

from planner.options import DEVICE, HOST
from planner.search.construct import ALL, MEMORY, Recipe, construct, measure
from planner.search.improve import exchange, rebuild, reconsider
from planner.search.objective import Goal
from planner.search.pack import pack
from planner.search.placement import Placement
from planner.search.relaxation import FULL, Fractions, Relaxation, Room
from planner.shards import Ints

# Caps on the largest item of each group, as shares of a device's mean load: smaller items balance
# better and cost more in sum. The first are tried first.
CAPS: dict[int, list[tuple[float, ...]]] = {
    1: [(c,) for c in (0.9, 0.95, 0.7, 0.85, 0.97, 0.8, 1.0, 1.05, 0.5, 1.2, np.inf)],
    2: [*product((0.7, 0.5, 0.9, 0.35, 1.2), (0.26, 0.5, 0.7, 1.0, 1.5)), (np.inf, np.inf)],
}
SMALL = (0.1, 0.05, 0.02, 0.2, 0.3, 0.0)
POWERS = (7, 6, 5)
# Powers of the norm while a plan is improved, in turn: large plans want the slowest devices seen
# sharply at once, small ones a smooth way there.
SHARPENING = ((5, 6, 7, 8, 6, 7, 8), (1, 2, 3, 4, 5, 6, 8))
EXCHANGES = 12
REBUILDS = 15
# Where a device's memory is used so far on average, filling devices evenly is part of the measure,
# and every other start leaves room in memory.
TIGHT_MEMORY, MEMORY_WEIGHT = 0.7, 0.005
# Room is left by small pieces, which fill gaps, or by less in all, where that costs little.
SMALL_PIECES = [
    Room(filled, piece) for filled in (0.99, 1.0, 0.98, 0.95) for piece in (0.25, 0.2, 0.1)
]
LESS = Room(0.85), Room(0.95)
TIGHT_CAPS: dict[int, list[tuple[float, ...]]] = {
    1: [(0.5,), (1.0,), (2.0,)],
    2: [(1.0, np.inf), (2.0, np.inf), (0.5, np.inf)],
}
GOOD_ENOUGH = 3e-4  # of the relaxation's bound: there is next to nothing to gain


def search(relaxation: Relaxation, seed: int, deadline: float | None = None) -> Placement | None:
    """The best placement found; None where there is none, or none was found.

    Without a deadline (of time.monotonic) the effort depends on the size of the problem alone.
    """
    groups = len(relaxation.goal.groups)
    root = relaxation.solve(np.full(groups, np.inf), np.zeros(groups))
    if root is None:
        return None
    goal = relaxation.goal
    if relaxation.memory_used(root) > TIGHT_MEMORY:
        goal = replace(goal, memory_weight=MEMORY_WEIGHT * root.bound)
    searching = Search(relaxation, goal, root, seed)
    world, units = goal.problem.topology.world_size, len(goal.problem.units)
    effort = _effort(world, world * units)
    if goal.memory_weight:
        effort = effort._replace(starts=4 * effort.starts)
    if deadline is None:
        return searching.run(effort, np.inf)
    while True:
        searching.run(effort, deadline)
        if time.monotonic() > deadline or searching.is_over(deadline):
            return searching.best


class Effort(NamedTuple):
    """Starts, how many of the best are improved, and in how many steps each."""

    starts: int
    improvements: int
    steps: int = len(SHARPENING[0])


def _effort(world: int, size: int) -> Effort:
    """Seconds, for usual sizes: what more of it would gain, and no more than it is worth."""
    if size > 4_000_000:
        return Effort(2, 0 if size > 20_000_000 else 1)
    if size <= 2000:
        return Effort(24, 2 if size > 100 else 6)
    if world <= 64:
        return Effort(4 if world <= 16 else 6, 1, steps=4)
    return Effort(8, 1) if world <= 128 else Effort(16, 1 if world <= 256 else 2)


@dataclass(frozen=True)
class Start:
    """What a first plan is made from."""

    caps: tuple[float, ...]
    recipe: Recipe
    room: Room = FULL


def _first_starts(goal: Goal) -> list[Start]:
    """Caps in turn, both orders of items; in between, where memory is tight, those with room."""
    recipe, groups = Recipe(False, 0, SMALL[0], POWERS[0]), len(goal.groups)
    orders = recipe, recipe._replace(devices_first=True)
    usual = [Start(caps, order) for caps in CAPS[groups] for order in orders]
    if not goal.memory_weight:
        return usual
    by_memory = recipe._replace(group=MEMORY)
    small = [Start(caps, by_memory, room) for room in SMALL_PIECES for caps in TIGHT_CAPS[groups]]
    usual = [replace(start, room=room) for start in usual for room in (*LESS, FULL)]
    pairs = zip_longest(small, usual)
    return [start for pair in pairs for start in pair if start]


class Search:
    """Finds placements for one goal; `best` is the best so far."""

    def __init__(self, relaxation: Relaxation, goal: Goal, root: Fractions, seed: int) -> None:
        self.relaxation, self.goal, self.root = relaxation, goal, root
        self.generator = np.random.default_rng(seed)
        self.fractions: dict[tuple[tuple[float, ...], Room], Fractions | None] = {}
        self.found: list[tuple[float, int, Start, Placement]] = []
        self.best: Placement | None = None
        self.first_starts = _first_starts(goal)
        self.starts = 0

    def run(self, effort: Effort, deadline: float) -> Placement | None:
        """The best placement after so many more starts, and improvements of the best of all."""
        for _ in range(effort.starts):
            if self.is_over(deadline):
                return self.best
            self._start(self._next_start(self.starts))
            self.starts += 1
        if self.best is None:
            self._pack()
        ranked = sorted(self.found, key=lambda entry: entry[:2])
        for number in range(effort.improvements if ranked else 0):
            if self.is_over(deadline):
                return self.best
            placement = ranked[number // len(SHARPENING) % len(ranked)][3]
            powers = SHARPENING[number % len(SHARPENING)][: effort.steps]
            self._improve(placement.copy(), powers, deadline)
        return self.best

    def is_over(self, deadline: float) -> bool:
        if self.best is None:
            return False
        close = self.best.objective <= self.root.bound * (1 + GOOD_ENOUGH)
        return close or time.monotonic() > deadline

    def _next_start(self, number: int) -> Start:
        """The first starts; then those like the best with something changed."""
        if number < len(self.first_starts) or not self.found:
            return self.first_starts[number % len(self.first_starts)]
        ranked = sorted(self.found, key=lambda entry: entry[:2])
        like = ranked[int(self.generator.integers(min(4, len(ranked))))][2]
        lowest = MEMORY if self.goal.memory_weight else ALL
        changed: dict[str, Any] = {
            "devices_first": bool(self.generator.integers(2)),
            "group": int(self.generator.integers(lowest, len(self.goal.groups))),
            "small": float(self.generator.choice(SMALL)),
            "power": int(self.generator.choice(POWERS)),
        }
        name = str(self.generator.choice(list(changed)))
        return replace(like, recipe=like.recipe._replace(**{name: changed[name]}))

    def _start(self, start: Start) -> None:
        if any(start == entry[2] for entry in self.found):
            return
        fractions = self._fractions(start.caps, start.room)
        placement = construct(self.goal, fractions, start.recipe) if fractions else None
        if placement:
            self.found.append((placement.objective, len(self.found), start, placement))
            self._keep(placement)

    def _fractions(self, caps: tuple[float, ...], room: Room) -> Fractions | None:
        """The best ones under the caps, which are shares of those without caps."""
        key = caps, room
        if key not in self.fractions:
            uncapped = (np.inf,) * len(caps)
            free = None if caps == uncapped else self._fractions(uncapped, room)
            mean = np.ones(len(caps)) if free is None else self.relaxation.group_sums(free.maxima)
            absolute = np.full(len(caps), np.inf)
            np.multiply(caps, mean, out=absolute, where=np.isfinite(caps))
            self.fractions[key] = self.relaxation.solve(absolute, np.zeros(len(caps)), room)
        return self.fractions[key]

    def _pack(self) -> None:
        """A first plan where memory is so tight that no start fits: fill memory evenly first."""
        scale = measure(self.goal, self.root)
        placement = pack(self.goal, scale, POWERS[0], self.generator)
        if placement:
            start = Start((np.inf,) * len(self.goal.groups), Recipe(False, ALL, 0.0, POWERS[0]))
            self.found.append((placement.objective, len(self.found), start, placement))
            self._keep(placement)

    def _improve(self, placement: Placement, powers: tuple[int, ...], deadline: float) -> None:
        options = self._options()
        for power in powers:
            placement.sharpen(power)
            order = self.generator.permutation(len(placement.option))
            reconsider(placement, options, order)
            for _ in range(EXCHANGES):
                exchange(placement, DEVICE, self.generator)
                if placement.hosts > 1:
                    exchange(placement, HOST, self.generator)
            for _ in range(REBUILDS):
                rebuild(placement, options, self.generator)
            self._keep(placement)
            if self.is_over(deadline):
                return

    def _options(self) -> list[Ints]:
        """Of each unit, those worth considering."""
        candidates = self.relaxation.candidates
        unit = self.goal.options.unit[candidates]
        starts = np.searchsorted(unit, np.arange(len(self.goal.problem.units) + 1))
        return [candidates[a:b] for a, b in pairwise(starts)]

    def _keep(self, placement: Placement) -> None:
        if placement.fits and (
            self.best is None or placement.objective < self.best.objective * (1 - 1e-12)
        ):
            self.best = placement.copy()
