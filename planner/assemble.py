"""From chosen options and places to a plan with its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.constraints import TableConstraint
from planner.geometry import SHARDING_TYPES, Block, cut
from planner.options import HOST, WORLD, Problem
from planner.plan import DevicePlan, Plan, Shard, TablePlan
from planner.shards import COMPUTE_KERNELS, Ints


def assemble(
    problem: Problem,
    option: Ints,
    places: Sequence[tuple[int, ...]],
    constraints: Mapping[str, TableConstraint],
) -> Plan:
    """The plan that gives each unit its `option`, the items at `places` (devices, or hosts)."""
    planned: dict[int, TablePlan] = {}
    scope = problem.options.scope
    for unit, members in enumerate(problem.units):
        for table in members:
            planned[table] = _table_plan(
                problem,
                table,
                int(option[unit]),
                _ranks(problem, int(scope[option[unit]]), places[unit]),
                constraints,
            )
    tables = {table.name: planned[i] for i, table in enumerate(problem.tables)}
    devices = tuple(
        DevicePlan(rank=rank, memory_bytes=0) for rank in range(problem.topology.world_size)
    )
    return Plan(topology=problem.topology, devices=devices, tables=tables)


def _table_plan(
    problem: Problem,
    number: int,
    option: int,
    ranks: list[int],
    constraints: Mapping[str, TableConstraint],
) -> TablePlan:
    table, options = problem.tables[number], problem.options
    sharding_type = SHARDING_TYPES[options.sharding_type[option]]
    blocks = cut(table, sharding_type, problem.topology, int(options.column_shards[option]))
    factor = float(options.cache_load_factor[option])
    return TablePlan(
        sharding_type=sharding_type,
        compute_kernel=COMPUTE_KERNELS[options.compute_kernel[option]],
        cache_load_factor=factor or None,
        shards=tuple(_shard(block, rank) for block, rank in zip(blocks, ranks, strict=True)),
        spec=table,
        constraint=constraints.get(table.name),
    )


def _ranks(problem: Problem, scope: int, places: tuple[int, ...]) -> list[int]:
    topology = problem.topology
    if scope == WORLD:
        return list(range(topology.world_size))
    if scope == HOST:
        return [rank for host in places for rank in topology.ranks_of_host(host)]
    return list(places)


def _shard(block: Block, rank: int) -> Shard:
    return Shard.model_construct(
        rank=rank,
        row_offset=block.row_offset,
        rows=block.rows,
        column_offset=block.column_offset,
        columns=block.columns,
        memory_bytes=0,  # predict() fills it in
    )
