"""Where every item is, what each device has to do for it, and what a change would cost.

Placements are compared by the sum over the load's columns of the p-norm over devices: it follows
the slowest device as p grows, and yet tells apart plans with the same slowest one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planner.options import DEVICE, HOST, WORLD
from planner.search.objective import Goal
from planner.shards import TYPE_CODE, Bools, Floats, Ints

_ALL = slice(None)
LARGEST_POWER = 1e290  # sums of as many as there are devices stay finite


class Choice(NamedTuple):
    """An option and the places of its items: devices, hosts, or nothing for all devices."""

    norm: float
    option: int
    places: tuple[int, ...]


class Placement:
    """A plan in the making; options and places of the units are in `option` and `places`."""

    def __init__(self, goal: Goal, scale: Floats, power: int) -> None:
        """`scale` [columns] are loads to measure by; p is 2^`power`."""
        self.goal = goal
        topology, problem = goal.problem.topology, goal.problem
        self.world, self.local = topology.world_size, topology.local_world_size
        self.hosts = topology.num_hosts
        self.scope = goal.options.scope
        self.is_bound_to_host = goal.options.sharding_type == TYPE_CODE["table_column_wise"]
        units = len(problem.units)
        self.option = np.full(units, -1)
        self.places: list[tuple[int, ...]] = [()] * units
        self.load = np.zeros((self.world, goal.measured.shape[1]))
        self.memory = np.full(self.world, float(problem.fixed_memory))
        self.host_memory = np.zeros(self.hosts)
        self.measure_by(scale, power)

    def copy(self) -> Placement:
        twin = object.__new__(Placement)
        twin.__dict__.update(self.__dict__)
        for name in ("option", "load", "memory", "host_memory", "powers", "sums"):
            setattr(twin, name, getattr(self, name).copy())
        twin.places = list(self.places)
        return twin

    @property
    def objective(self) -> float:
        return float(self.load[:, : self.goal.load.shape[1]].max(axis=0).sum())

    def measure_by(self, scale: Floats, power: int) -> None:
        self.scale, self.power = np.maximum(scale, 1e-300), power
        self.highest = LARGEST_POWER ** (2.0**-power)
        self.powers = self.raised(self.load)
        self.sums = self.powers.sum(axis=0)

    def sharpen(self, power: int) -> None:
        """Measure by the slowest devices of now; also drops rounding errors."""
        self.measure_by(self.load.max(axis=0), power)

    def raised(self, load: Floats, column: int | slice = _ALL) -> Floats:
        """(load / scale)^p, of all columns or one."""
        powers = np.minimum(load / self.scale[column], self.highest)
        for _ in range(self.power):
            powers *= powers
        return np.asarray(powers)

    def norm(self, sums: Floats) -> Floats:
        """Of sums over devices of raised loads, [..., columns]."""
        roots = np.maximum(sums, 0)
        for _ in range(self.power):
            np.sqrt(roots, out=roots)
        return roots @ self.scale

    def insert(self, unit: int, options: Ints) -> bool:
        """Put the unit where it is best, under the best of `options`; False if none fits."""
        choices = [choice for option in options if (choice := self.best(unit, int(option)))]
        if not choices:
            return False
        self.put(unit, min(choices))
        return True

    def put(self, unit: int, choice: Choice) -> None:
        self.option[unit], self.places[unit] = choice.option, choice.places
        self._add(choice.option, choice.places, 1)

    def remove(self, unit: int) -> None:
        self._add(self.option[unit], self.places[unit], -1)
        self.option[unit] = -1

    def _add(self, option: int, places: tuple[int, ...], sign: int) -> None:
        options = self.goal.options
        for devices, hosts in self._spans(option, places):
            self.sums -= self.powers[devices].sum(axis=0)
            self.load[devices] = np.maximum(
                self.load[devices] + sign * self.goal.measured[option], 0
            )
            self.memory[devices] += sign * options.memory[option]
            self.powers[devices] = self.raised(self.load[devices])
            self.sums += self.powers[devices].sum(axis=0)
            if options.host_memory[option]:
                loaded = min(self.local, devices.stop - devices.start)
                self.host_memory[hosts] += sign * options.host_memory[option] * loaded

    def _spans(self, option: int, places: tuple[int, ...]) -> list[tuple[slice, slice]]:
        """The devices, and their hosts, that each item loads."""
        if self.scope[option] == WORLD:
            return [(slice(0, self.world), slice(0, self.hosts))]
        if self.scope[option] == HOST:
            return [(slice(h * self.local, (h + 1) * self.local), slice(h, h + 1)) for h in places]
        return [(slice(d, d + 1), slice(d // self.local, d // self.local + 1)) for d in places]

    def best(self, unit: int, option: int) -> Choice | None:
        """The best places for the items of `option`; None where they do not fit."""
        grown = self.raised(self.load + self.goal.measured[option])
        grown -= self.powers
        full = self.memory + self.goal.options.memory[option] > self.goal.problem.memory_limit
        if self.goal.options.host_memory[option]:
            full |= self._host_is_full(option)
        if self.scope[option] == WORLD:
            return self._everywhere(option, grown, full)
        allowed = self.goal.problem.allowed_ranks.get(unit)
        if allowed is not None:
            full = full | ~np.isin(np.arange(self.world), list(allowed))
        if self.scope[option] == HOST:
            grown = grown.reshape(self.hosts, self.local, -1).sum(axis=1)
            full = full.reshape(self.hosts, self.local).any(axis=1)
        elif self.is_bound_to_host[option]:
            return self._within_a_host(option, grown, full)
        return self._cheapest(option, grown, full)

    def _everywhere(self, option: int, grown: Floats, full: Bools) -> Choice | None:
        if full.any():
            return None
        return Choice(float(self.norm(self.sums + grown.sum(axis=0))), option, ())

    def _cheapest(self, option: int, grown: Floats, full: Bools) -> Choice | None:
        """An item at each of the places that raise the norm least."""
        count = self.goal.options.items[option]
        if count > len(grown):
            return None
        norms = self.norm(grown + self.sums)
        norms[full] = np.inf
        if count == 1:
            place = int(norms.argmin())
            return Choice(float(norms[place]), option, (place,)) if norms[place] < np.inf else None
        chosen = np.sort(np.argpartition(norms, count - 1)[:count])
        if norms[chosen].max() == np.inf:
            return None
        norm = float(self.norm(self.sums + grown[chosen].sum(axis=0)))
        return Choice(norm, option, tuple(chosen.tolist()))

    def slope(self, sums: Floats) -> Floats:
        """[columns]: how fast the norm grows with the sums of raised loads, there."""
        return np.asarray(self.scale * np.maximum(sums, 1e-200) ** (2.0**-self.power - 1))

    def _within_a_host(self, option: int, grown: Floats, full: Bools) -> Choice | None:
        choices = []
        for host in range(self.hosts):
            here = slice(host * self.local, (host + 1) * self.local)
            found = self._cheapest(option, grown[here], full[here])
            if found:
                places = tuple(place + host * self.local for place in found.places)
                choices.append(found._replace(places=places))
        return min(choices, default=None)

    def _host_is_full(self, option: int) -> Bools:
        """[world]: an item there would exceed the memory of its host.

        Two items on the devices of one host are looked at one by one: such plans are refused
        when they are complete, if at all.
        """
        extra = self.goal.options.host_memory[option]
        loaded = 1 if self.scope[option] == DEVICE else self.local
        limit = self.goal.problem.host_memory_limit
        return np.repeat(self.host_memory + extra * loaded > limit, self.local)

    @property
    def fits(self) -> bool:
        """Nothing exceeds its memory, of device or host."""
        problem = self.goal.problem
        slack = 1 + 1e-9  # rounding of sums
        return bool(
            (self.option >= 0).all()
            and (self.memory <= problem.memory_limit * slack).all()
            and (self.host_memory <= problem.host_memory_limit * slack).all()
        )
