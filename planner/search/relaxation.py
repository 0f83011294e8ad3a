"""The linear relaxation: options in fractions, loads spread evenly over the devices.

Devices are alike, so averaging a plan over all ways to rename hosts and the devices in them gives
a solution of this program that costs no more: no plan beats its value. Only options whose items
stay below given caps take part, which makes it a relaxation of the plans whose maxima do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, vstack

from planner.certificate import prove
from planner.options import WORLD
from planner.search.objective import Goal
from planner.shards import Bools, Floats, Ints


class Room(NamedTuple):
    """What a plan leaves free: memory that is filled to the last byte is hard to place."""

    filled: float = 1.0  # share of all memory
    piece: float = np.inf  # largest item of a device or a host, as a share of a device's memory


FULL = Room()


@dataclass(frozen=True)
class Fractions:
    """A solution: `share` of each option in `chosen`; no plan under the caps costs less than
    `bound`, which is recomputed from the program's dual and trusts no solver."""

    bound: float
    chosen: Ints
    share: Floats
    maxima: Floats  # [columns]


class Relaxation:
    """The relaxation of one goal, to be solved for many caps."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        problem, options = goal.problem, goal.options
        world, hosts = problem.topology.world_size, problem.topology.num_hosts
        # Loads and memory of an average device, memory as a share of what is free.
        self.mean_load = goal.load * (goal.devices / world)[:, None]
        memory = [options.memory * goal.devices / world / self._free_memory]
        if options.host_memory.any():
            memory.append(options.host_memory * goal.devices / hosts / problem.host_memory_limit)
        self.mean_memory = np.stack(memory, axis=1)
        # Host memory is slower in every stage: it is of use only where device memory is scarce.
        self.candidates = goal.in_device_memory if options.host_memory.any() else goal.undominated

    @property
    def _free_memory(self) -> float:
        return max(self.goal.problem.memory_limit - self.goal.problem.fixed_memory, 1.0)

    def solve(self, caps: Floats, floors: Floats, room: Room = FULL) -> Fractions | None:
        """The best fractions where each group's maximum is between its floor and its cap.

        The bound is for plans that leave such room in memory. None where the solver finds that no
        plan has such maxima; `excludes` proves it.
        """
        within = self._within(caps) & self._leaving(room)
        if not self._cover_all_units(np.flatnonzero(within)):
            return None
        chosen = self.candidates[within[self.candidates]]
        solution = None
        if self._cover_all_units(chosen):
            solution = self._solve_program(chosen, floors, room.filled)
        if self.candidates is not self.goal.undominated and (
            solution is None or solution[2].max() > 0
        ):
            # Device memory is scarce: tables in host memory may save some.
            self.candidates = self.goal.undominated
            return self.solve(caps, floors, room)
        if solution is None:
            return None
        share, load_price, memory_price = solution
        bound = self.dual_value(within, floors, room.filled, load_price, memory_price)
        return Fractions(bound, chosen, share, share @ self.mean_load[chosen])

    def excludes(self, caps: Floats) -> bool:
        """Whether it is proven that no plan keeps all its items under these caps."""
        problem, within = self.goal.problem, self._within(caps)
        if not self._cover_all_units(np.flatnonzero(within)):
            return True
        return prove(replace(problem, options=problem.options.select(within))) is not None

    def _within(self, caps: Floats) -> Bools:
        return self.goal.fits & (self.goal.group_load <= caps * (1 + 1e-12)).all(axis=1)

    def _leaving(self, room: Room) -> Bools:
        options = self.goal.options
        small = options.memory <= room.piece * self._free_memory
        return np.asarray(small | (options.scope == WORLD))

    def _cover_all_units(self, options: Ints) -> bool:
        return len(np.unique(self.goal.options.unit[options])) == len(self.goal.problem.units)

    def _solve_program(
        self, chosen: Ints, floors: Floats, memory: float
    ) -> tuple[Floats, Floats, Floats] | None:
        """Shares of the options, prices of load and of memory; None if nothing fits."""
        columns, kinds = self.mean_load.shape[1], self.mean_memory.shape[1]
        # Units that are alike share their variables.
        unit = self.goal.options.unit[chosen]
        firsts, units = np.unique(self._alike, return_counts=True)
        own = chosen[np.isin(unit, firsts)]
        count = len(own)
        above_load = np.hstack([self.mean_load[own].T, -np.eye(columns)])
        in_memory = np.hstack([self.mean_memory[own].T, np.zeros((kinds, columns))])
        above_floor = np.hstack([np.zeros((len(floors), count)), -self._members])
        row = np.searchsorted(firsts, self.goal.options.unit[own])
        units_of_kind = coo_array(
            (np.ones(count), (row, np.arange(count))), shape=(len(firsts), count + columns)
        )
        limits = np.concatenate([np.zeros(columns), np.full(kinds, memory), -floors])
        solved = linprog(
            np.concatenate([np.zeros(count), np.ones(columns)]),
            A_ub=vstack([csr_array(part) for part in (above_load, in_memory, above_floor)]),
            b_ub=limits,
            A_eq=csr_array(units_of_kind),
            b_eq=units,
            method="highs",
        )
        if solved.x is None:
            return None
        prices = -solved.ineqlin.marginals
        share = self._deal(own, solved.x[:count], chosen)
        return share, prices[:columns], prices[columns : columns + kinds]

    @cached_property
    def _alike(self) -> Ints:
        """[units]: the first unit with the same options at the same costs."""
        options = self.goal.options
        of_option = [options.sharding_type, options.compute_kernel, options.column_shards]
        rows = np.column_stack([*of_option, self.mean_load, self.mean_memory])
        starts = np.searchsorted(options.unit, np.arange(len(self.goal.problem.units) + 1))
        seen: dict[bytes, int] = {}
        keys = (rows[a:b].tobytes() for a, b in pairwise(starts))
        return np.array([seen.setdefault(key, unit) for unit, key in enumerate(keys)])

    def _deal(self, own: Ints, amount: Floats, chosen: Ints) -> Floats:
        """Shares of all chosen options from the amounts that the first of each kind has of its own.

        The n-th of a kind gets what lies between n and n + 1 when the amounts are laid end to end,
        so that few units get parts of several options.
        """
        unit, alike = self.goal.options.unit, self._alike
        begin = np.searchsorted(unit[own], alike[unit[chosen]])  # where the first's options are
        place = np.arange(len(chosen)) - np.searchsorted(unit[chosen], unit[chosen])
        ends = np.concatenate([[0.0], np.cumsum(amount)])
        low, high = ends[begin + place] - ends[begin], ends[begin + place + 1] - ends[begin]
        turn = self._turn[unit[chosen]]
        return np.asarray(np.maximum(np.minimum(high, turn + 1) - np.maximum(low, turn), 0.0))

    @cached_property
    def _turn(self) -> Ints:
        """[units]: how many of its kind come before it."""
        order = np.argsort(self._alike, kind="stable")
        kind = self._alike[order]
        turn = np.empty_like(order)
        turn[order] = np.arange(len(order)) - np.searchsorted(kind, kind)
        return turn

    def memory_used(self, fractions: Fractions) -> float:
        """Share of the scarcest memory that these fractions take."""
        return float((fractions.share @ self.mean_memory[fractions.chosen]).max())

    def group_sums(self, columns: Floats) -> Floats:
        """[groups] from [columns]."""
        return self._members @ columns

    @cached_property
    def _members(self) -> Floats:
        """[groups, columns]: 1 where a column is in a group."""
        members = np.zeros((len(self.goal.groups), self.mean_load.shape[1]))
        for group, columns in enumerate(self.goal.groups):
            members[group, columns] = 1
        return members

    def dual_value(
        self,
        within: Bools,
        floors: Floats,
        memory: float,
        load_price: Floats,
        memory_price: Floats,
    ) -> float:
        """What the prices prove: a lower bound for every plan, whatever prices are given."""
        load_price, memory_price = np.clip(load_price, 0, 1), np.maximum(memory_price, 0)
        floor_price = np.array([1 - max(load_price[g]) for g in self.goal.groups])
        unit = self.goal.options.unit[within]
        priced = self.mean_load[within] @ load_price + self.mean_memory[within] @ memory_price
        cheapest = np.minimum.reduceat(priced, np.flatnonzero(np.diff(unit, prepend=-1)))
        return float(cheapest.sum() + floor_price @ floors - memory * memory_price.sum())
