"""A first plan from the relaxation's fractions: one option a unit, placed in a good order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planner.options import DEVICE, HOST, WORLD
from planner.search.objective import Goal
from planner.search.placement import Placement
from planner.search.relaxation import Fractions
from planner.shards import Floats, Ints

ALL, MEMORY = -1, -2


class Recipe(NamedTuple):
    """How to order the items and how sharply to tell devices apart.

    With `devices_first` the large items of single devices come first, alike next to alike, so
    that the devices of a host are filled evenly; then items that load whole hosts even the hosts
    out, and small ones fill the gaps. Without, all items come by size.
    """

    devices_first: bool
    group: int  # items are ordered by their load in this group of columns, ALL or MEMORY
    small: float  # items below this share of a device's mean load fill the gaps at the end
    power: int


def construct(goal: Goal, fractions: Fractions, recipe: Recipe) -> Placement | None:
    """A placement of all units; None where memory left no place for one."""
    options = likeliest_options(goal, fractions)
    mean = np.maximum(fractions.maxima, 1e-12)
    placement = Placement(goal, measure(goal, fractions), recipe.power)
    for unit in _order(goal, options, mean, recipe):
        if not placement.insert(unit, options[unit : unit + 1]):
            alternatives = goal.undominated[goal.options.unit[goal.undominated] == unit]
            if not placement.insert(unit, alternatives):
                return None
    return placement if placement.fits else None


def measure(goal: Goal, fractions: Fractions) -> Floats:
    """What loads are measured by: those of the fractions' average device, and a full memory."""
    full = [goal.memory_weight] if goal.memory_weight else []
    return np.maximum([*fractions.maxima, *full], 1e-12)


def likeliest_options(goal: Goal, fractions: Fractions) -> Ints:
    """[units]: the option with the largest share."""
    unit = goal.options.unit[fractions.chosen]
    order = np.lexsort((-fractions.share, unit))
    first = order[np.flatnonzero(np.diff(unit[order], prepend=-1))]
    return fractions.chosen[first]


def _order(goal: Goal, options: Ints, mean: Floats, recipe: Recipe) -> list[int]:
    """The units in the order of placing."""
    share = np.stack(
        [goal.group_load[options, i] / mean[g].sum() for i, g in enumerate(goal.groups)], axis=1
    )
    if recipe.group == MEMORY:
        size = goal.options.memory[options]
    else:
        size = share.sum(axis=1) if recipe.group == ALL else share[:, recipe.group]
    scope = goal.options.scope[options]
    turn = np.where(scope == WORLD, 0, 3)
    if recipe.devices_first:
        turn[(scope == DEVICE) & (share.max(axis=1) > recipe.small)] = 1
        turn[scope == HOST] = 2
        size = np.where(turn == 2, share.sum(axis=1), size)
    return [int(unit) for unit in np.lexsort((-size, turn))]
