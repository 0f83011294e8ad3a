"""What tables need of the memory of devices and hosts, and what there is."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel

from planner.certificate import MARGIN, Demand
from planner.geometry import SHARDING_TYPES
from planner.options import Problem
from planner.shards import COMPUTE_KERNELS
from planner.storage import shard_bytes
from planner.tables import TableSpec

SHOWN_UNITS = 5


class Tier(BaseModel, frozen=True):
    """Memory of one kind, bytes of each device or host.

    `needed_bytes` is the least if tables could be cut at will and the other tier were full; None
    where no amount would do, because some table may not be there.
    """

    name: Literal["device", "host"]
    needed_bytes: int | None
    available_bytes: int
    count: int


class UnitNeed(BaseModel, frozen=True):
    """What a table, or tables that stay together, take where they are cut smallest."""

    tables: tuple[str, ...]
    whole_bytes: int  # weights and optimizer state
    option: str
    devices: int
    device_bytes: int  # on each of these devices; buffers of a step too
    host_bytes: int  # for each of these devices


def tiers(problem: Problem) -> tuple[Tier, Tier]:
    """Device memory and host memory."""
    topology, fixed, limit = problem.topology, problem.fixed_memory, problem.memory_limit
    demand = Demand.of(problem, np.ones(len(problem.options), dtype=np.bool_))
    world, hosts = topology.world_size, topology.num_hosts
    host_limit = problem.host_memory_limit
    device = _each(demand, hosts * host_limit, world)
    host = _each(demand.swapped(), world * max(limit - fixed, 0.0), hosts)
    needed = None if device is None else device + fixed
    return (
        Tier(name="device", needed_bytes=needed, available_bytes=int(limit), count=world),
        Tier(name="host", needed_bytes=host, available_bytes=int(host_limit), count=hosts),
    )


def _each(demand: Demand, other_limit: float, count: int) -> int | None:
    """Bytes of one of `count` places, rounded up; None where the other tier is too small anyhow."""
    if demand.cheapest(0.0, 1.0) > other_limit * (1 + MARGIN):
        return None
    return int(np.ceil(demand.least(other_limit)[0] / count - 1e-6))


def largest_units(problem: Problem) -> tuple[UnitNeed, ...]:
    """The few that take most."""
    sizes = [sum(table_bytes(problem.tables[i]) for i in unit) for unit in problem.units]
    largest = sorted(range(len(sizes)), key=lambda unit: -sizes[unit])
    return tuple(_unit_need(problem, unit, sizes[unit]) for unit in largest[:SHOWN_UNITS])


def table_bytes(table: TableSpec) -> int:
    """Weights and optimizer state."""
    return shard_bytes(table, table.num_embeddings, table.embedding_dim)


def _unit_need(problem: Problem, unit: int, whole_bytes: int) -> UnitNeed:
    """Of the option with the smallest items; of those on devices, where there are such."""
    options = problem.options.select(problem.options.unit == unit)
    smallest = options.select(np.lexsort((options.memory, options.host_memory > 0))[:1])
    sharding_type = SHARDING_TYPES[smallest.sharding_type[0]]
    return UnitNeed(
        tables=tuple(problem.tables[i].name for i in problem.units[unit]),
        whole_bytes=whole_bytes,
        option=f"{sharding_type}, {COMPUTE_KERNELS[smallest.compute_kernel[0]]}",
        devices=int(smallest.devices(problem.topology)[0]),
        device_bytes=round(float(smallest.memory[0])),
        host_bytes=round(float(smallest.host_memory[0])),
    )
