"""All plans of a small problem, one by one: what bound and search are judged by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations, product

import numpy as np

from planner.cost.stages import STAGES
from planner.geometry import SHARDING_TYPES
from planner.hardware import PRESETS
from planner.options import Problem, make_problem
from planner.shards import ShardColumns
from planner.tables import TableSpec
from planner.topology import Topology


class RandomCost:
    """Costs without rhyme or reason, the same for the same shard."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> np.ndarray:
        generator = np.random.default_rng(self.seed)
        base = generator.uniform(0.1, 1.0, (len(shards), len(STAGES)))
        return base * generator.choice([0.1, 1.0, 3.0], (len(shards), 1))


def random_problem(seed: int, hosts: int, local: int, tables: int, memory: float) -> Problem:
    """`memory`: of a device, as a multiple of the mean weight bytes of a device."""
    generator = np.random.default_rng(seed)
    specs = [
        TableSpec(
            name=f"t{i}",
            num_embeddings=int(generator.integers(50, 3000)),
            embedding_dim=int(generator.choice([4, 8])),
            pooling_factor=float(generator.uniform(0.5, 4)),
            optimizer=str(generator.choice(["sgd", "adagrad"])),
        )
        for i in range(tables)
    ]
    need = sum(t.num_embeddings * t.embedding_dim * 4 for t in specs) / (hosts * local)
    hardware = PRESETS["A100-40GB"].model_copy(
        update={
            "device_memory_bytes": int(need * memory) + 1,
            "host_memory_bytes": 0,
            "reserved_memory_fraction": 0.0,
        }
    )
    topology = Topology(world_size=hosts * local, local_world_size=local, hardware=hardware)
    return make_problem(specs, topology, RandomCost(seed), batch_size=1)


def best_objective(problem: Problem, objective: str) -> float:
    """The objective of the best plan there is; infinite where none fits the memory."""
    choices = [_choices(problem, unit) for unit in range(len(problem.units))]
    load, memory = choices[0]
    for more_load, more_memory in choices[1:]:
        load = (load[:, None] + more_load[None]).reshape(-1, *load.shape[1:])
        memory = (memory[:, None] + more_memory[None]).reshape(-1, memory.shape[1])
    fits = (memory + problem.fixed_memory <= problem.memory_limit).all(axis=1)
    if objective == "stages":
        values = load.max(axis=1).sum(axis=1)
    else:
        values = load.sum(axis=2).max(axis=1)
    return float(values[fits].min(initial=np.inf))


def _choices(problem: Problem, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Loads [choices, devices, 4] and bytes [choices, devices] of all ways to place a unit."""
    loads, memories = [], []
    for option in np.flatnonzero(problem.options.unit == unit):
        for counts in _placements(problem, option):
            loads.append(np.outer(counts, problem.options.cost[option]))
            memories.append(counts * problem.options.memory[option])
    return np.array(loads), np.array(memories)


def _placements(problem: Problem, option: int) -> Iterator[np.ndarray]:
    """How many items of the option are on each device, in every possible way."""
    world, local = problem.topology.world_size, problem.topology.local_world_size
    kind = SHARDING_TYPES[problem.options.sharding_type[option]]
    items = int(problem.options.column_shards[option])
    hosts = [list(range(h * local, (h + 1) * local)) for h in range(world // local)]
    if kind in ("row_wise", "data_parallel"):
        places = [range(world)]
    elif kind in ("table_row_wise", "grid_shard"):
        places = [list(chain(*chosen)) for chosen in combinations(hosts, items)]
    elif kind == "table_column_wise":
        places = [c for host in hosts for c in combinations(host, items)]
    else:
        places = list(combinations(range(world), items))
    for chosen in places:
        yield np.bincount(list(chosen), minlength=world).astype(float)


SHAPES = [(1, 2, 3), (2, 2, 2), (1, 3, 3), (3, 1, 2), (1, 1, 3)]  # hosts, devices a host, tables


def small_problems(count: int) -> Iterator[Problem]:
    for seed, memory in product(range(count // 4), (0.9, 1.3, 2.0, 50.0)):
        hosts, local, tables = SHAPES[seed % len(SHAPES)]
        yield random_problem(seed, hosts, local, tables, memory)
