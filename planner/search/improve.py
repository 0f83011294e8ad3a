"""Local search: units reconsidered one by one, and items exchanged between many places at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from planner.options import DEVICE, HOST
from planner.search.placement import Choice, Placement
from planner.shards import Bools, Floats, Ints

EXCHANGING = {DEVICE: 192, HOST: 128}  # places at a time: an assignment of so many takes some ms
SECOND_ITEM = 0.3  # how often a place gives two items
REBUILT_UNITS = 4  # at most, at a time
KEPT_OPTIONS = 0.6  # share of a unit's options that a rebuild considers
IMPOSSIBLE = 1e300

Item = tuple[int, int]  # a unit, and which of its items


def reconsider(placement: Placement, options: Sequence[Ints], order: Ints) -> None:
    """Take each unit out and put it back in the best way, under any of its `options`."""
    for unit in order:
        before = Choice(np.inf, int(placement.option[unit]), placement.places[unit])
        placement.remove(unit)
        if not placement.insert(unit, options[unit]):
            placement.put(unit, before)


def rebuild(placement: Placement, options: Sequence[Ints], generator: np.random.Generator) -> bool:
    """Take a few units out and put them back in a random order, each under some of its options.

    Finds what needs two changes at once, as where memory is full; True if it is better now,
    otherwise nothing has changed.
    """
    count = min(len(options), int(generator.integers(2, REBUILT_UNITS + 1)))
    units = generator.choice(len(options), count, replace=False)
    before = [Choice(np.inf, int(placement.option[u]), placement.places[u]) for u in units]
    norm = float(placement.norm(placement.sums))
    for unit in units:
        placement.remove(unit)
    done = []
    for unit in units:
        some = options[unit][generator.random(len(options[unit])) < KEPT_OPTIONS]
        if not placement.insert(int(unit), some if len(some) else options[unit]):
            break
        done.append(unit)
    if len(done) == count and placement.norm(placement.sums) < norm * (1 - 1e-9):
        return True
    for unit in done:
        placement.remove(unit)
    for unit, choice in zip(units, before, strict=True):
        placement.put(int(unit), choice)
    return False


def exchange(placement: Placement, scope: int, generator: np.random.Generator) -> bool:
    """Take an item or two from each of many places (devices, or hosts) and deal them anew.

    The deal is a linear assignment, so it is the best of all permutations; True if it changed
    something for the better.
    """
    span = 1 if scope == DEVICE else placement.local
    places = _some_places(placement, scope, span, generator)
    bundles = _bundles(placement, scope, places, generator)
    load = np.array([_sum(placement, bundle, placement.goal.measured) for bundle in bundles])
    memory = np.array([_sum(placement, b, placement.goal.options.memory) for b in bundles])
    devices = places[:, None] * span + np.arange(span)
    rest = placement.load[devices] - load[:, None]
    rest_memory = placement.memory[devices] - memory[:, None]
    cost = _prices(placement, rest, load)
    full = memory[:, None] + rest_memory.max(axis=1) > placement.goal.problem.memory_limit
    cost[full] = IMPOSSIBLE
    _keep_pieces_apart(placement, bundles, places, cost)
    bundle, target = linear_sum_assignment(cost)
    if not cost[bundle, target].sum() < np.trace(cost) * (1 - 1e-9):
        return False
    for i, j in zip(bundle, target, strict=True):
        for unit, item in bundles[i]:
            moved = list(placement.places[unit])
            moved[item] = int(places[j])
            placement.places[unit] = tuple(moved)
    placement.load[devices[target]] = rest[target] + load[bundle, None]
    placement.memory[devices[target]] = rest_memory[target] + memory[bundle, None]
    placement.measure_by(placement.scale, placement.power)
    return True


def _some_places(
    placement: Placement, scope: int, span: int, generator: np.random.Generator
) -> Ints:
    """All places, or the most loaded and others at random."""
    count, most = placement.world // span, EXCHANGING[scope]
    if count <= most:
        return np.arange(count)
    fullness = (placement.load / placement.scale).max(axis=1).reshape(count, span).max(axis=1)
    worst, others = np.split(np.argsort(-fullness, kind="stable"), [most // 4])
    some = generator.choice(others, most - len(worst), replace=False)
    return np.sort(np.concatenate([worst, some]))


def _bundles(
    placement: Placement, scope: int, places: Ints, generator: np.random.Generator
) -> list[list[Item]]:
    """One or two items at random of each place, none from a place without."""
    at: dict[int, list[Item]] = {int(place): [] for place in places}
    for unit in np.flatnonzero(_movable(placement, scope)):
        for item, place in enumerate(placement.places[unit]):
            if place in at:
                at[place].append((int(unit), item))
    bundles = []
    for items in at.values():
        count = min(len(items), 1 + int(generator.random() < SECOND_ITEM))
        bundles.append([items[i] for i in generator.permutation(len(items))[:count]])
    return bundles


def _movable(placement: Placement, scope: int) -> Bools:
    """Units whose items may be anywhere in this scope and take no host memory."""
    option = placement.option
    movable = (placement.scope[option] == scope) & ~placement.is_bound_to_host[option]
    movable &= placement.goal.options.host_memory[option] == 0
    movable[list(placement.goal.problem.allowed_ranks)] = False
    return np.asarray(movable)


def _sum(placement: Placement, bundle: list[Item], values: Floats) -> Floats:
    return np.asarray(values[[placement.option[unit] for unit, _ in bundle]].sum(axis=0))


def _prices(placement: Placement, rest: Floats, load: Floats) -> Floats:
    """[bundles, places]: how much each bundle there adds to the norm, to first order."""
    slope = placement.slope(placement.sums)
    prices = np.zeros((len(load), len(rest)))
    for column in range(load.shape[1]):
        together = rest[None, :, :, column] + load[:, None, None, column]
        prices += slope[column] * placement.raised(together, column).sum(axis=2)
    return prices


def _keep_pieces_apart(
    placement: Placement, bundles: list[list[Item]], places: Ints, cost: Floats
) -> None:
    """Two pieces of one table are of no use in one place."""
    where = {int(place): j for j, place in enumerate(places)}
    for i, bundle in enumerate(bundles):
        for unit, item in bundle:
            for other, place in enumerate(placement.places[unit]):
                if other != item and place in where:
                    cost[i, where[place]] = IMPOSSIBLE
