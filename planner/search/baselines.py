"""The published rules that plans are compared with: greedy ones, and one sharding type for all.

`random` and the greedy rules are those of DreamShard (Zha et al., NeurIPS 2022) and NeuroShard
(Zha et al., MLSys 2023) as released, in sharders.py of github.com/daochenzha/dreamshard and
.../neuroshard. They keep tables whole (table_wise) and in device memory. The tables come in
descending order of a weight, of equal ones the larger first; each goes to the device with the
lowest sum of weights so far that has room, of equal ones to that with the fewest bytes. The
release has `size_lookup_greedy` take the logarithm of the rows for the size. Its `random` knows no
memory limit; ours chooses among the devices that have room, as its environment does.

`all_table_wise`, `all_row_wise` and `all_table_row_wise` shard all tables alike, the longest of
the cost model first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from planner.assemble import assemble
from planner.constraints import TableConstraint
from planner.cost.predict import predict
from planner.cost.stages import CostModel
from planner.errors import PlannerError, RequestError
from planner.geometry import ShardingType
from planner.options import HOST, SCOPE, WORLD, Problem, make_problem
from planner.plan import Objective, Plan
from planner.shards import TYPE_CODE, Bools, Floats, Ints
from planner.tables import TableSpec
from planner.topology import Topology

Weigh = Callable[[Problem, Ints], Floats]


class Layout(NamedTuple):
    """The option of each unit, and the device or host of its one item."""

    option: Ints
    places: list[tuple[int, ...]]


def plan_by_baseline(
    name: str,
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
    """The plan of the rule `name` for the problem that `make_plan` solves, with predictions.

    PlannerError names the table that the rule has no room or no option for.
    """
    if name not in BASELINES:
        raise RequestError(f"there is no baseline {name!r}; choose {', '.join(BASELINES)}")
    constraints = constraints or {}
    problem = make_problem(tables, topology, cost_model, batch_size, constraints, dense_bytes)
    layout = BASELINES[name](problem, np.random.default_rng(seed))
    plan = assemble(problem, layout.option, layout.places, constraints)
    return predict(plan, cost_model, batch_size, objective, dense_bytes)


def _size(table: TableSpec) -> float:
    return table.num_embeddings * table.embedding_dim * table.bytes_per_element


def _dim(table: TableSpec) -> float:
    return table.embedding_dim


def _lookup(table: TableSpec) -> float:
    return table.embedding_dim * table.pooling_factor * table.num_features


def _size_lookup(table: TableSpec) -> float:
    return _lookup(table) * math.log10(table.num_embeddings)


def _sum_of(weight: Callable[[TableSpec], float]) -> Weigh:
    """Of the tables of each unit."""

    def weigh(problem: Problem, option: Ints) -> Floats:
        tables = problem.tables
        return np.array([sum(weight(tables[i]) for i in unit) for unit in problem.units])

    return weigh


def _total_ms(problem: Problem, option: Ints) -> Floats:
    return np.asarray(problem.options.cost[option].sum(axis=1))


def _deal(
    problem: Problem,
    generator: np.random.Generator,
    *,
    sharding_type: ShardingType = "table_wise",
    weigh: Weigh | None,
) -> Layout:
    """Each unit to the least loaded place with room; without a weight to any, as they come."""
    option = _options(problem, sharding_type)
    memory = problem.options.memory[option]
    weight = np.zeros(len(option)) if weigh is None else weigh(problem, option)
    order = np.arange(len(option))
    if weigh is not None:
        order = np.lexsort((order, memory, weight))[::-1]
    span = _span(problem.topology, sharding_type)
    count = problem.topology.world_size // span
    load, used = np.zeros(count), np.full(count, float(problem.fixed_memory))
    places: list[tuple[int, ...]] = [()] * len(option)
    for unit in order:
        allowed = allowed_places(problem, int(unit), span)
        free = np.flatnonzero(allowed & (used + memory[unit] <= problem.memory_limit))
        if not len(free):
            raise no_room(problem, int(unit), sharding_type, memory[unit], used[allowed])
        if weigh is None:
            place = int(generator.choice(free))
        else:
            place = int(free[np.lexsort((used[free], load[free]))[0]])
        load[place] += weight[unit]
        used[place] += memory[unit]
        places[unit] = (place,)
    return Layout(option, places)


def _options(problem: Problem, sharding_type: ShardingType) -> Ints:
    """The option of each unit with this type, in one piece and in device memory."""
    options = problem.options
    fits = (options.sharding_type == TYPE_CODE[sharding_type]) & (options.column_shards == 1)
    found = np.flatnonzero(fits & (options.host_memory == 0))
    chosen = np.full(len(problem.units), -1)
    chosen[options.unit[found]] = found
    if (chosen < 0).any():
        names = unit_names(problem, int(chosen.argmin()))
        raise PlannerError(
            f"table {names} cannot be {sharding_type} in device memory: its constraints or the "
            "topology leave no such option"
        )
    return chosen


def _span(topology: Topology, sharding_type: ShardingType) -> int:
    """How many devices, one after another, share a table."""
    spans = {HOST: topology.local_world_size, WORLD: topology.world_size}
    return spans.get(SCOPE[sharding_type], 1)


def allowed_places(problem: Problem, unit: int, span: int) -> Bools:
    """The places whose devices may all hold the unit."""
    world = np.arange(problem.topology.world_size)
    ranks = problem.allowed_ranks.get(unit)
    may = np.ones(len(world), dtype=np.bool_) if ranks is None else np.isin(world, list(ranks))
    return np.asarray(may.reshape(-1, span).all(axis=1))


def no_room(
    problem: Problem, unit: int, sharding_type: ShardingType, needed: float, used: Floats
) -> PlannerError:
    free = max(0.0, problem.memory_limit - used.min(initial=problem.memory_limit))
    return PlannerError(
        f"no room for table {unit_names(problem, unit)}: {sharding_type} it takes "
        f"{needed / 2**30:.3g} GiB of a device, and the emptiest has {free / 2**30:.3g} GiB left"
    )


def unit_names(problem: Problem, unit: int) -> str:
    return ", ".join(problem.tables[i].name for i in problem.units[unit])


BASELINES: dict[str, Callable[[Problem, np.random.Generator], Layout]] = {
    "random": partial(_deal, weigh=None),
    "size_greedy": partial(_deal, weigh=_sum_of(_size)),
    "dim_greedy": partial(_deal, weigh=_sum_of(_dim)),
    "lookup_greedy": partial(_deal, weigh=_sum_of(_lookup)),
    "size_lookup_greedy": partial(_deal, weigh=_sum_of(_size_lookup)),
    "all_table_wise": partial(_deal, weigh=_total_ms),
    "all_row_wise": partial(_deal, weigh=_total_ms, sharding_type="row_wise"),
    "all_table_row_wise": partial(_deal, weigh=_total_ms, sharding_type="table_row_wise"),
}
