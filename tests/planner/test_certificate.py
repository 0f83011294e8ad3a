"""Proofs and remedies against all plans of small problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations_with_replacement

import numpy as np
import pytest

from planner.certificate import prove, verify
from planner.constraints import TableConstraint
from planner.feasibility import DoesNotFit
from planner.geometry import SHARDING_TYPES
from planner.inputs import Inputs
from planner.options import Problem
from planner.search.objective import Goal
from planner.search.relaxation import Relaxation

from .tight_memory import asked, assert_remedies_hold, gpus, planned, table


def small_requests(count: int) -> Iterator[Inputs]:
    for seed in range(count):
        yield _small_request(np.random.default_rng(seed))


def _small_request(generator: np.random.Generator) -> Inputs:
    """Memory around what the tables need, now and then with hosts' memory and constraints."""
    shapes = [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (1, 4)]
    hosts, local = shapes[generator.integers(len(shapes))]
    tables = [
        table(
            f"t{i}",
            int(generator.integers(200, 20_000)),
            int(generator.choice([4, 8, 16])),
            optimizer=str(generator.choice(["rowwise_adagrad", "adam"])),
            pooling_factor=float(generator.uniform(0.5, 3)),
        )
        for i in range(generator.integers(2, 5))
    ]
    total = sum(t.num_embeddings * t.embedding_dim * 4 for t in tables)
    device = total / (hosts * local) * generator.uniform(0.8, 3)
    host = total / hosts * generator.uniform(0.1, 0.8) if generator.random() < 0.5 else 0
    constraints = {
        t.name: _random_constraint(generator, hosts * local)
        for t in tables
        if generator.random() < 0.4
    }
    inputs = asked(tables, gpus(device, host, hosts, local), 4, **constraints)
    return replace(inputs, objective=str(generator.choice(["stages", "max_total"])))


def _random_constraint(generator: np.random.Generator, world: int) -> TableConstraint:
    choices = [
        {"sharding_types": ("table_wise",)},
        {"sharding_types": ("table_wise", "row_wise")},
        {"compute_kernels": ("fused",)},
        {"ranks": (int(generator.integers(world)),)},
        {"group": "g"},
    ]
    return TableConstraint.model_validate(choices[generator.integers(len(choices))])


def some_plan_fits(problem: Problem) -> bool:
    """By trying all choices of options and places; pieces may even share a device."""
    free = problem.memory_limit - problem.fixed_memory
    limits = np.array(
        [free] * problem.topology.world_size
        + [problem.host_memory_limit] * problem.topology.num_hosts
    )
    used = np.zeros((1, len(limits)))
    for unit in range(len(problem.units)):
        choices = _without_worse(np.array(list(_uses(problem, unit))))
        used = (used[:, None] + choices[None]).reshape(-1, len(limits))
        used = _without_worse(used[(used <= limits * (1 + 1e-12)).all(axis=1)])
    return len(used) > 0


def _without_worse(used: np.ndarray) -> np.ndarray:
    """Without rows that are nowhere smaller than another, where there are few enough to say."""
    used = np.unique(used, axis=0)
    if len(used) > 1500:
        return used
    no_larger = (used[None] <= used[:, None]).all(axis=2)
    return used[no_larger.sum(axis=1) == 1]


def _uses(problem: Problem, unit: int) -> Iterator[np.ndarray]:
    """Bytes on each device and each host, for every option and place."""
    topology, options = problem.topology, problem.options
    world, local = topology.world_size, topology.local_world_size
    allowed = problem.allowed_ranks.get(unit, frozenset(range(world)))
    hosts = [list(topology.ranks_of_host(h)) for h in range(topology.num_hosts)]
    for option in np.flatnonzero(options.unit == unit):
        kind = SHARDING_TYPES[options.sharding_type[option]]
        items = int(options.items[option])
        if kind in ("row_wise", "data_parallel"):
            places = [tuple(range(world))]
        elif kind in ("table_row_wise", "grid_shard"):
            places = [list(chain(*c)) for c in combinations_with_replacement(hosts, items)]
        elif kind == "table_column_wise":
            places = [c for host in hosts for c in combinations_with_replacement(host, items)]
        else:
            places = list(combinations_with_replacement(range(world), items))
        for chosen in places:
            if not set(chosen) <= allowed:
                continue
            use = np.zeros(world + len(hosts))
            for rank in chosen:
                use[rank] += options.memory[option]
                use[world + rank // local] += options.host_memory[option]
            yield use


def test_no_plan_fits_where_it_is_proven() -> None:
    """200 small problems: what is proven is true, and what no relaxation admits is proven."""
    outcomes = {"fits": 0, "proven": 0, "unproven": 0}
    for inputs in small_requests(200):
        problem = inputs.problem()
        certificate = prove(problem)
        if certificate:
            assert verify(certificate, problem)
            assert not some_plan_fits(problem)
            outcomes["proven"] += 1
            continue
        if problem.memory_limit > problem.fixed_memory:
            root = Relaxation(Goal(problem, "stages")).solve(np.full(2, np.inf), np.zeros(2))
            assert root is not None
        outcomes["fits" if some_plan_fits(problem) else "unproven"] += 1
    assert outcomes["proven"] > 50 and outcomes["fits"] > 50
    assert outcomes["unproven"] < outcomes["proven"] / 4


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 8), *(pytest.param(n, 48, marks=pytest.mark.slow) for n in range(8, 200, 48))],
)
def test_every_remedy_holds(first: int, count: int) -> None:
    """Of 200 small problems: each change that is shown really gives a plan within the limits."""
    shown = 0
    for inputs in list(small_requests(first + count))[first:]:
        try:
            planned(inputs)
        except DoesNotFit as error:
            assert_remedies_hold(inputs, error.report)
            shown += len(error.report.remedies)
    assert shown > count / 2
