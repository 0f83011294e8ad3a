"""Every way to shard every table, as columns: what the bound and the search choose from.

An option of a table is a sharding type, a kernel and a number of column shards. It puts `items`
equal pieces somewhere; a piece of scope DEVICE loads one device, HOST every device of one host,
WORLD every device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.constraints import TableConstraint, check_constraints
from planner.cost.stages import CostModel
from planner.errors import RequestError
from planner.geometry import COLUMN_MULTIPLE, ShardingType, column_shard_counts
from planner.reuse import cache_load_factors
from planner.shards import (
    KERNEL_CODE,
    TYPE_CODE,
    Bools,
    ComputeKernel,
    Floats,
    Ints,
    ShardColumns,
    TableColumns,
    row_sharers,
)
from planner.storage import buffer_bytes, received_bytes, table_memory
from planner.tables import TableSpec
from planner.topology import Topology

DEVICE, HOST, WORLD = 0, 1, 2
SCOPE: dict[ShardingType, int] = {
    "table_wise": DEVICE,
    "column_wise": DEVICE,
    "table_column_wise": DEVICE,
    "table_row_wise": HOST,
    "grid_shard": HOST,
    "row_wise": WORLD,
    "data_parallel": WORLD,
}
CUT_BY_COLUMN: tuple[ShardingType, ...] = ("column_wise", "table_column_wise", "grid_shard")
# What TorchRec's EmbeddingCollectionSharder offers for tables that are not pooled.
UNPOOLED_TYPES = ("table_wise", "row_wise", "column_wise", "data_parallel")
_SCOPE_OF_CODE = np.array([SCOPE[name] for name in TYPE_CODE])


@dataclass(frozen=True)
class Options:
    """One entry an option; those of a unit (a table, or tables kept together) are adjacent."""

    unit: Ints
    sharding_type: Ints
    compute_kernel: Ints
    column_shards: Ints
    cache_load_factor: Floats
    items: Ints
    cost: Floats  # [options, 4] ms that an item adds to each device in its scope
    memory: Floats  # device bytes that it adds to each device in its scope
    host_memory: Floats  # host bytes that it adds for each device in its scope

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def scope(self) -> Ints:
        return np.asarray(_SCOPE_OF_CODE[self.sharding_type])

    def devices(self, topology: Topology) -> Ints:
        """Devices that each option loads, those with two of its items counted twice."""
        span = np.array([1, topology.local_world_size, topology.world_size])
        return np.asarray(self.items * span[self.scope])

    def select(self, chosen: Bools | Ints) -> Options:
        return Options(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class Problem:
    """What is to be planned: choose an option for each unit, and a place for each item."""

    tables: tuple[TableSpec, ...]
    topology: Topology
    batch_size: int
    units: tuple[tuple[int, ...], ...]  # indices of the tables of each unit
    options: Options
    allowed_ranks: dict[int, frozenset[int]]  # of the units that may not be everywhere
    fixed_memory: int  # bytes on every device under any plan: embeddings received, dense model
    memory_limit: float
    host_memory_limit: float
    cost_seconds: float  # what the cost model took


def make_problem(
    tables: Sequence[TableSpec],
    topology: Topology,
    cost_model: CostModel,
    batch_size: int,
    constraints: Mapping[str, TableConstraint] | None = None,
    dense_bytes: int = 0,
) -> Problem:
    """All options of all tables with their costs; RequestError where constraints leave none."""
    if not tables:
        raise RequestError("there are no tables to plan for")
    constraints = constraints or {}
    check_constraints(tables, constraints, topology)
    shards, column_shards = _enumerate(tables, topology, constraints)
    order = np.argsort(shards.table, kind="stable")
    shards, column_shards = shards.select(order), column_shards[order]
    memory, limit = table_memory(shards), topology.device_memory_limit_bytes
    began = time.monotonic()
    cost = cost_model.stage_costs(shards, topology)
    cost_seconds = time.monotonic() - began
    options = Options(
        unit=shards.table,
        sharding_type=shards.sharding_type,
        compute_kernel=shards.compute_kernel,
        column_shards=column_shards,
        cache_load_factor=shards.cache_load_factor,
        items=column_shards,
        cost=cost,
        memory=memory.device + buffer_bytes(shards, topology, batch_size),
        host_memory=memory.host,
    )
    units, options = _group(tables, options, constraints)
    return Problem(
        tables=tuple(tables),
        topology=topology,
        batch_size=batch_size,
        units=units,
        options=options,
        allowed_ranks=_allowed_ranks(tables, units, constraints),
        fixed_memory=dense_bytes + received_bytes(tables, batch_size),
        memory_limit=np.inf if limit is None else limit,
        host_memory_limit=topology.host_memory_limit_bytes or 0,
        cost_seconds=cost_seconds,
    )


def _enumerate(
    tables: Sequence[TableSpec],
    topology: Topology,
    constraints: Mapping[str, TableConstraint],
) -> tuple[ShardColumns, Ints]:
    """The largest shard of every option, and its number of column shards."""
    columns = TableColumns.of(tables)
    factors = cache_load_factors(columns)
    limits = [constraints.get(table.name, TableConstraint()) for table in tables]
    parts: list[tuple[Ints, ShardingType, ComputeKernel, int, Floats]] = []
    for sharding_type in SCOPE:
        for kernel in _kernels(sharding_type, topology):
            wanted = _admitting(tables, limits, sharding_type, kernel, topology)
            counts = _column_counts(sharding_type, topology, columns.embedding_dim[wanted])
            for count in counts:
                chosen = wanted[_can_cut(columns, limits, wanted, count, counts)]
                chosen = chosen[_have_places(limits, chosen, count, sharding_type, topology)]
                if kernel != "fused_uvm_caching":
                    parts.append((chosen, sharding_type, kernel, count, np.zeros(len(chosen))))
                    continue
                for factor in factors.T:
                    some = chosen[~np.isnan(factor[chosen])]
                    parts.append((some, sharding_type, kernel, count, factor[some]))
    parts = [part for part in parts if len(part[0])]
    table = _join([part[0] for part in parts])
    column_shards = _join([np.full(len(part[0]), part[3]) for part in parts])
    types = _join([np.full(len(part[0]), TYPE_CODE[part[1]]) for part in parts])
    shards = ShardColumns(
        tables=columns,
        table=table,
        sharding_type=types,
        compute_kernel=_join([np.full(len(part[0]), KERNEL_CODE[part[2]]) for part in parts]),
        rows=-(-columns.num_embeddings[table] // row_sharers(types, topology)),
        columns=columns.embedding_dim[table] // column_shards,
        cache_load_factor=np.concatenate([part[4] for part in parts] or [np.zeros(0)]),
    )
    return shards, column_shards


def _join(parts: list[Ints]) -> Ints:
    return np.concatenate([*parts, np.zeros(0, dtype=np.int64)])


def _kernels(sharding_type: ShardingType, topology: Topology) -> tuple[ComputeKernel, ...]:
    if sharding_type == "data_parallel":
        return ("dense",)
    has_host_memory = topology.hardware is not None and topology.hardware.host_memory_bytes
    return ("fused", "fused_uvm", "fused_uvm_caching") if has_host_memory else ("fused",)


def _admitting(
    tables: Sequence[TableSpec],
    limits: Sequence[TableConstraint],
    sharding_type: ShardingType,
    kernel: ComputeKernel,
    topology: Topology,
) -> Ints:
    """The tables that kernels can train so, and whose constraints admit this type and kernel."""

    def admits(table: TableSpec, limit: TableConstraint) -> bool:
        if kernel != "dense" and table.embedding_dim % COLUMN_MULTIPLE:
            return False
        if not table.pooled and sharding_type not in UNPOOLED_TYPES:
            return False
        if limit.sharding_types is None:
            # On one host, or with one device on each, these only repeat another type.
            if topology.num_hosts == 1 and sharding_type in _ACROSS_HOSTS:
                return False
        elif sharding_type not in limit.sharding_types:
            return False
        return limit.compute_kernels is None or kernel in limit.compute_kernels

    numbers = range(len(tables))
    return np.array([i for i in numbers if admits(tables[i], limits[i])], dtype=np.int64)


def _have_places(
    limits: Sequence[TableConstraint],
    tables: Ints,
    count: int,
    sharding_type: ShardingType,
    topology: Topology,
) -> Bools:
    """Which of `tables` have a place of its own for each of `count` pieces on their ranks."""
    ranks = [limits[table].ranks for table in tables]
    free = [r is None or _places_within(r, sharding_type, topology) >= count for r in ranks]
    return np.array(free, dtype=np.bool_)


def _places_within(ranks: tuple[int, ...], sharding_type: ShardingType, topology: Topology) -> int:
    """How many places these ranks have for pieces of that type."""
    world, allowed = topology.world_size, set(ranks)
    of_hosts = [allowed & set(topology.ranks_of_host(h)) for h in range(topology.num_hosts)]
    if SCOPE[sharding_type] == WORLD:
        return int(len(allowed) == world)
    if SCOPE[sharding_type] == HOST:
        return sum(len(ranks) == topology.local_world_size for ranks in of_hosts)
    return max(map(len, of_hosts)) if sharding_type == "table_column_wise" else len(allowed)


_ACROSS_HOSTS = ("table_row_wise", "table_column_wise", "grid_shard")


def _column_counts(sharding_type: ShardingType, topology: Topology, dims: Ints) -> list[int]:
    """How many column shards the tables with these dims may have."""
    if sharding_type not in CUT_BY_COLUMN:
        return [1]
    at_most = {
        "column_wise": topology.world_size,
        "table_column_wise": topology.local_world_size,
        "grid_shard": topology.num_hosts,
    }[sharding_type]
    counts = {k for dim in np.unique(dims) for k in column_shard_counts(int(dim))}
    return sorted(k for k in counts if k <= at_most)


def _can_cut(
    columns: TableColumns,
    limits: Sequence[TableConstraint],
    tables: Ints,
    count: int,
    counts: list[int],
) -> Bools:
    """Which of `tables` may be cut into `count` column shards, of all the `counts` there are.

    A type that cuts columns leaves a table whole only where a constraint names the type and there
    is no way to cut: table_wise and table_row_wise say the same.
    """
    dims = columns.embedding_dim[tables]
    cuttable = {int(dim): set(column_shard_counts(int(dim))) for dim in np.unique(dims)}

    def admits(table: int, dim: int) -> bool:
        limit = limits[table]
        if limit.column_shards is not None or counts == [1]:
            return count == (limit.column_shards or 1) and count in cuttable[dim]
        cuts = [k for k in counts if k > 1 and k in cuttable[dim] and dim // k >= limit.min_columns]
        return count in cuts or (count == 1 and not cuts and limit.sharding_types is not None)

    return np.array([admits(t, int(d)) for t, d in zip(tables, dims, strict=True)], dtype=np.bool_)


def _group(
    tables: Sequence[TableSpec], options: Options, constraints: Mapping[str, TableConstraint]
) -> tuple[tuple[tuple[int, ...], ...], Options]:
    """Make units of the tables; those of one group get the options, and the costs, of all."""
    members: dict[object, list[int]] = {}
    for i, table in enumerate(tables):
        constraint = constraints.get(table.name)
        members.setdefault(constraint.group if constraint and constraint.group else i, []).append(i)
    units = tuple(tuple(group) for group in members.values())
    if len(units) < len(tables):
        starts = np.searchsorted(options.unit, np.arange(len(tables) + 1))
        own = [[np.arange(starts[i], starts[i + 1]) for i in group] for group in units]
        parts = [_unit_options(u, options.select(_join(o)), len(o)) for u, o in enumerate(own)]
        options = _concatenate(parts)
    empty = np.setdiff1d(np.arange(len(units)), options.unit)
    if len(empty):
        names = ", ".join(tables[i].name for i in units[empty[0]])
        raise RequestError(
            f"constraints leave no way to shard {names}: sharding_types, compute_kernels, "
            "min_columns, column_shards and ranks contradict each other, this topology or the "
            f"kernels (which take a multiple of {COLUMN_MULTIPLE} columns, except data_parallel's)"
        )
    return units, options


def _unit_options(unit: int, own: Options, tables: int) -> Options:
    """Of several tables the options that all have, in one piece, with their costs summed."""
    if tables > 1:
        whole = own.select((own.column_shards == 1) & (own.cache_load_factor == 0))
        keys = whole.sharding_type * len(KERNEL_CODE) + whole.compute_kernel
        _, first, where, count = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        summed = whole.select(first)
        for name in ("cost", "memory", "host_memory"):
            total = np.zeros_like(getattr(summed, name))
            np.add.at(total, where, getattr(whole, name))
            summed = replace(summed, **{name: total})
        own = summed.select(count == tables)
    return replace(own, unit=np.full(len(own), unit))


def _concatenate(parts: Sequence[Options]) -> Options:
    names = [field.name for field in fields(Options)]
    return Options(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _allowed_ranks(
    tables: Sequence[TableSpec],
    units: tuple[tuple[int, ...], ...],
    constraints: Mapping[str, TableConstraint],
) -> dict[int, frozenset[int]]:
    allowed = {}
    for unit, group in enumerate(units):
        limits = [constraints[tables[i].name] for i in group if tables[i].name in constraints]
        ranks = [frozenset(limit.ranks) for limit in limits if limit.ranks is not None]
        if not ranks:
            continue
        allowed[unit] = frozenset.intersection(*ranks)
        if not allowed[unit]:
            names = ", ".join(tables[i].name for i in group)
            raise RequestError(f"constraints.ranks of {names}, one group, have no rank in common")
    return allowed
