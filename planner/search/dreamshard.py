"""Plans by DreamShard's policy: a profile's network decides the device of every shard.

As published (Zha et al., NeurIPS 2022): tables come in descending order of predicted cost, the
policy scores the devices for each in view of what a profile predicts for them, and those without
room are left out. The likeliest devices make one plan, draws by the policy's probabilities others;
the one is taken that the profile predicts to be fastest.

Published are whole tables alone, and memory of their weights alone. Here memory is all that the
planner counts, and tables may be cut: before they are placed, each gets an option by a cap on what
one item may cost (planner.search.caps). Whole tables make the first plan, every cap another; drawn
is under the best cap. Items that load all devices come first, then those that load whole hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from planner.assemble import assemble
from planner.constraints import TableConstraint
from planner.cost.features import dreamshard_features
from planner.cost.learned import LearnedCost
from planner.cost.predict import predict
from planner.cost.stages import CostModel
from planner.errors import PlannerError, RequestError
from planner.geometry import SHARDING_TYPES
from planner.options import HOST, WORLD, Options, Problem, make_problem
from planner.plan import Objective, Plan
from planner.search.baselines import Layout, allowed_places, no_room
from planner.search.caps import options_under
from planner.search.episodes import Episodes, Items
from planner.search.policy import PlacementPolicy
from planner.shards import TYPE_CODE, Floats, Ints, ShardColumns, TableColumns, row_sharers
from planner.tables import TableSpec
from planner.topology import Topology

CAPS = (np.inf, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25)  # of an item, as shares of an even device
DRAWS = 8


def plan_by_policy(
    tables: Sequence[TableSpec],
    topology: Topology,
    cost_model: CostModel,
    batch_size: int,
    *,
    objective: Objective = "stages",
    constraints: Mapping[str, TableConstraint] | None = None,
    dense_bytes: int = 0,
    seed: int = 0,
) -> Plan:
    """The policy's best plan for the problem that `make_plan` solves, with predictions.

    RequestError where `cost_model` is no profile, or a profile without a policy; PlannerError names
    the table that no device has room for.
    """
    model, policy = _with_policy(cost_model)
    constraints = constraints or {}
    problem = make_problem(tables, topology, model, batch_size, constraints, dense_bytes)
    found: list[tuple[float, int, Ints, Plan]] = []
    errors: list[PlannerError] = []

    def deal(option: Ints, episodes: int, generator: np.random.Generator | None) -> None:
        """Keep what comes of it."""
        try:
            layouts = Deal(problem, model, policy, option).layouts(episodes, generator)
        except PlannerError as error:
            errors.append(error)
            return
        for layout in layouts:
            plan = assemble(problem, layout.option, layout.places, constraints)
            found.append((model.estimate(plan).step_ms, len(found), option, plan))

    for option in dict.fromkeys(tuple(options_under(problem, cap)) for cap in CAPS):
        deal(np.array(option), 1, None)
    if not found:
        raise errors[0]
    deal(min(found)[2], DRAWS, np.random.default_rng(seed))
    return predict(min(found)[3], model, batch_size, objective, dense_bytes)


def _with_policy(cost_model: CostModel) -> tuple[LearnedCost, PlacementPolicy]:
    if not isinstance(cost_model, LearnedCost):
        raise RequestError(
            f"--search dreamshard needs a profile's costs and its policy, not {cost_model.name}: "
            "give --cost PROFILE.json, which `shardemb profile` makes, or --cost cpu-2core"
        )
    policy = cost_model.profile.policy
    if policy is None:
        raise RequestError(
            f"the profile {cost_model.name} has no policy for --search dreamshard: train one with "
            f"`python -m shardemb.profiler.train_policy {cost_model.name}`, which measures "
            "nothing and takes some seconds"
        )
    return cost_model, policy


@dataclass(frozen=True)
class Deal:
    """Places all units of a problem under one option each."""

    problem: Problem
    model: LearnedCost
    policy: PlacementPolicy
    option: Ints  # [units]

    def layouts(self, episodes: int, generator: np.random.Generator | None) -> list[Layout]:
        """Those of the `episodes` that found room for all: the likeliest devices every time, or
        with a generator draws by the policy. PlannerError where there are none."""
        problem, options = self.problem, self._options
        topology, tasks = problem.topology, [self._items] * episodes
        copies = options.devices(topology)
        state = Episodes(self.model.profile.compute, tasks, copies, topology.world_size)
        used = np.full((episodes, topology.world_size), float(problem.fixed_memory))
        places = [np.zeros((episodes, 0), dtype=np.int64)] * len(copies)
        for unit in np.lexsort((-options.cost.sum(axis=1), -options.scope)).tolist():
            scores = self.policy.score(state.worth, state.look(unit))
            if generator is not None:
                scores += generator.gumbel(size=scores.shape)  # the highest are draws by softmax
            allowed = allowed_places(problem, unit, 1)
            is_full = used + options.memory[unit] > problem.memory_limit
            scores[is_full | ~allowed] = -np.inf
            places[unit] = self._best_places(unit, scores)
            devices = self._devices(unit, places[unit])
            rows = np.arange(len(devices))[:, None]
            has_room = np.asarray(np.isfinite(scores[rows, devices]).all(axis=1))
            if not has_room.any():
                kind = SHARDING_TYPES[options.sharding_type[unit]]
                raise no_room(problem, unit, kind, options.memory[unit], used[0, allowed])
            state.put(unit, devices)
            used[rows, devices] += options.memory[unit]
            if not has_room.all():
                state.keep(has_room)
                used, places = used[has_room], [found[has_room] for found in places]
        return [
            Layout(self.option, [tuple(found[episode].tolist()) for found in places])
            for episode in range(len(used))
        ]

    @cached_property
    def _options(self) -> Options:
        """One a unit."""
        return self.problem.options.select(self.option)

    @cached_property
    def _items(self) -> Items:
        """One a unit; of several equal ones the first."""
        problem, options = self.problem, self._options
        unit = np.repeat(np.arange(len(problem.units)), [len(unit) for unit in problem.units])
        table = np.array(list(chain(*problem.units)))
        columns, sharding_type = TableColumns.of(problem.tables), options.sharding_type[unit]
        shards = ShardColumns(
            tables=columns,
            table=table,
            sharding_type=sharding_type,
            compute_kernel=options.compute_kernel[unit],
            rows=-(-columns.num_embeddings[table] // row_sharers(sharding_type, problem.topology)),
            columns=columns.embedding_dim[table] // options.column_shards[unit],
            cache_load_factor=options.cache_load_factor[unit],
        )
        costs = self.model.stage_costs(shards, problem.topology)
        worth = self.policy.worth(dreamshard_features(shards))
        return Items.of(shards, unit, costs, worth, self.model, problem.topology)

    def _best_places(self, unit: int, scores: Floats) -> Ints:
        """[episodes, items]: those with the highest scores, of devices [episodes, devices] or of
        hosts; none for an item that loads all devices."""
        items, scope = int(self._options.items[unit]), self._options.scope[unit]
        topology = self.problem.topology
        by_host = scores.reshape(len(scores), topology.num_hosts, topology.local_world_size)
        if scope == WORLD:
            return np.zeros((len(scores), 0), dtype=np.int64)
        if scope == HOST:
            return _highest(by_host.mean(axis=2), items)
        if self._options.sharding_type[unit] == TYPE_CODE["table_column_wise"]:
            best = np.sort(by_host, axis=2)[:, :, -items:].sum(axis=2)
            host = np.arange(topology.world_size) // topology.local_world_size
            scores = np.where(host == best.argmax(axis=1)[:, None], scores, -np.inf)
        return _highest(scores, items)

    def _devices(self, unit: int, places: Ints) -> Ints:
        """[episodes, copies]: those that the items at `places` load."""
        topology, scope = self.problem.topology, self._options.scope[unit]
        if scope == WORLD:
            return np.tile(np.arange(topology.world_size), (len(places), 1))
        if scope == HOST:
            of_host = np.arange(topology.local_world_size)
            devices = places[:, :, None] * topology.local_world_size + of_host
            return np.asarray(devices.reshape(len(places), -1))
        return places


def _highest(scores: Floats, count: int) -> Ints:
    """[episodes, count]: places in descending order of their scores; the first of equal ones."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]
