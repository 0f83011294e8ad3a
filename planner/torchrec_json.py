"""Plans in the form in which TorchRec serializes its own. Imports no torch.

`ShardingPlan._serialize` of TorchRec 1.8 (torchrec/distributed/types.py), which has no way back:

    {"plan": {MODULE PATH: {TABLE: {
        "sharding_type": "row_wise", "compute_kernel": "fused", "ranks": [0, 1],
        "shards": [{"shard_offsets": [ROW, COLUMN], "shard_sizes": [ROWS, COLUMNS],
                    "placement": "rank:0/cuda:0"}, ...]}}}}

`EmbeddingModuleShardingPlan._serialize`, of one module, gives what is behind a path. Tables that
are data_parallel have no shards. TorchRec leaves out its CacheParams; here a table with a cache has
them, as `"cache_params": {"load_factor": 0.2}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.errors import PlannerError, RequestError
from planner.geometry import COLUMN_MULTIPLE, Block, ShardingType, row_blocks
from planner.plan import DevicePlan, HostPlan, Plan, Shard, TablePlan
from planner.reuse import DEFAULT_LOAD_FACTOR
from planner.shards import KERNEL_CODE, TYPE_CODE, ComputeKernel, ShardColumns, TableColumns
from planner.storage import Memory, table_memory
from planner.tables import TableSpec
from planner.topology import Topology
from planner.validation import explain, shorten


def export_torchrec(
    plan: Plan,
    modules: Mapping[str, str] | str | None = None,
    device_type: str = "cuda",
) -> dict[str, Any]:
    """`plan` as TorchRec serializes its own, ready for json.dumps.

    `modules` is the path in the model of each table's embedding collection, or one path for all;
    without it the result is the plan of one module. PlannerError where a table has no path.
    """
    local_world_size = plan.topology.local_world_size
    tables = {n: _export_table(t, local_world_size, device_type) for n, t in plan.tables.items()}
    if modules is None:
        return tables
    by_module: dict[str, dict[str, Any]] = {}
    for name, entry in tables.items():
        path = modules if isinstance(modules, str) else modules.get(name)
        if path is None:
            raise PlannerError(f"table {name} of the plan is in no module of the model")
        by_module.setdefault(path, {})[name] = entry
    return {"plan": by_module}


def _export_table(table: TablePlan, local_world_size: int, device_type: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "sharding_type": table.sharding_type,
        "compute_kernel": table.compute_kernel,
        "ranks": [shard.rank for shard in table.shards],
    }
    if table.sharding_type != "data_parallel":
        entry["shards"] = [
            {
                "shard_offsets": [shard.row_offset, shard.column_offset],
                "shard_sizes": [shard.rows, shard.columns],
                "placement": _placement(shard.rank, local_world_size, device_type),
            }
            for shard in table.shards
        ]
    if table.cache_load_factor is not None:
        entry["cache_params"] = {"load_factor": table.cache_load_factor}
    return entry


def _placement(rank: int, local_world_size: int, device_type: str) -> str:
    local = f"{device_type}:{rank % local_world_size}" if device_type != "cpu" else "cpu"
    return f"rank:{rank}/{local}"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _ShardEntry(_Record):
    shard_offsets: list[int] = Field(min_length=2, max_length=2)
    shard_sizes: list[int] = Field(min_length=2, max_length=2)
    placement: str = Field(pattern=r"^rank:[0-9]{1,7}/")

    @property
    def rank(self) -> int:
        return int(self.placement.removeprefix("rank:").partition("/")[0])

    @property
    def block(self) -> Block:
        (row, column), (rows, columns) = self.shard_offsets, self.shard_sizes
        return Block(row, rows, column, columns)


class _CacheEntry(_Record):
    load_factor: float | None = Field(default=None, gt=0, le=1)


class _TableEntry(_Record):
    sharding_type: ShardingType
    compute_kernel: ComputeKernel
    ranks: list[int] | None = None
    shards: list[_ShardEntry] | None = Field(default=None, min_length=1)
    cache_params: _CacheEntry | None = None


class _Document(_Record):
    plan: dict[str, dict[str, _TableEntry]]


def import_torchrec(
    document: Mapping[str, Any], tables: Iterable[TableSpec], topology: Topology
) -> Plan:
    """The plan that `document`, a serialized ShardingPlan or the plan of one module, makes for
    `tables` on `topology`; nothing is predicted for it.

    RequestError where the document is no such plan, PlannerError where it is one for other tables
    or for another topology.
    """
    entries = _entries(document)
    specs = {table.name: table for table in tables}
    unplanned = sorted(specs.keys() - entries.keys())
    unknown = sorted(entries.keys() - specs.keys())
    if unplanned or unknown:
        name, place = (unplanned[0], "not in") if unplanned else (unknown[0], "only in")
        raise PlannerError(f"table {name} is {place} TorchRec's plan: the plan is for other tables")
    planned = {name: _import_table(spec, entries[name], topology) for name, spec in specs.items()}
    return Plan(
        topology=topology,
        devices=_devices(planned, topology),
        hosts=_hosts(planned, topology),
        tables=planned,
    )


def plan_by_module(document: Mapping[str, Any], module: str = "") -> dict[str, Any]:
    """MODULE PATH -> TABLE -> its sharding; `module` is the path for a plan of one module."""
    plan = document.get("plan")
    is_table = isinstance(plan, dict) and "sharding_type" in plan
    if "plan" not in document or is_table:
        return {module: dict(document)}
    return plan  # type: ignore[return-value]


def _entries(document: Mapping[str, Any]) -> dict[str, _TableEntry]:
    """The tables of all modules."""
    try:
        modules = _Document.model_validate({"plan": plan_by_module(document)}).plan
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, _Document)[:10])
        raise RequestError(f"this is no plan of TorchRec's:\n{lines}") from error
    entries: dict[str, _TableEntry] = {}
    for path, module in modules.items():
        for name, entry in module.items():
            if name in entries:
                raise RequestError(
                    f"two modules of TorchRec's plan have a table {name} (one is {shorten(path)}): "
                    "give each table a name of its own"
                )
            entries[name] = entry
    return entries


def _import_table(spec: TableSpec, entry: _TableEntry, topology: Topology) -> TablePlan:
    blocks, ranks = _blocks(spec, entry, topology)
    _check_blocks(spec, entry.sharding_type, blocks, topology)
    _check_ranks(spec, entry.sharding_type, ranks, topology)
    factor = None
    if entry.compute_kernel == "fused_uvm_caching":
        given = entry.cache_params and entry.cache_params.load_factor
        factor = given or DEFAULT_LOAD_FACTOR
    memory = _memory(spec, entry, blocks, factor)
    shards = tuple(
        Shard(
            rank=rank,
            memory_bytes=round(memory.device[i]),
            host_memory_bytes=round(memory.host[i]),
            **block._asdict(),
        )
        for i, (block, rank) in enumerate(zip(blocks, ranks, strict=True))
    )
    return TablePlan(
        sharding_type=entry.sharding_type,
        compute_kernel=entry.compute_kernel,
        cache_load_factor=factor,
        shards=shards,
        spec=spec,
    )


def _blocks(
    spec: TableSpec, entry: _TableEntry, topology: Topology
) -> tuple[list[Block], list[int]]:
    """The table's blocks and the rank of each."""
    if entry.sharding_type == "data_parallel":
        ranks = list(range(topology.world_size))
        return [Block(0, spec.num_embeddings, 0, spec.embedding_dim)] * len(ranks), ranks
    if entry.shards is None:
        raise RequestError(
            f"table {spec.name} of TorchRec's plan is {entry.sharding_type}, but has no shards"
        )
    ranks = [shard.rank for shard in entry.shards]
    if entry.ranks is not None and entry.ranks != ranks:
        raise RequestError(
            f"table {spec.name} of TorchRec's plan has ranks {entry.ranks}, its shards have "
            f"placements on ranks {ranks}"
        )
    return [shard.block for shard in entry.shards], ranks


def _check_blocks(
    spec: TableSpec, sharding_type: ShardingType, blocks: list[Block], topology: Topology
) -> None:
    """Row shards as TorchRec's ids find them; columns in any whole vectors, side by side."""
    if sharding_type == "data_parallel":
        return
    parts = {
        "row_wise": topology.world_size,
        "table_row_wise": topology.local_world_size,
        "grid_shard": topology.local_world_size,
    }.get(sharding_type, 1)
    groups = [blocks[i : i + parts] for i in range(0, len(blocks), parts)]
    rows = row_blocks(spec.num_embeddings, parts)
    end = 0
    fits = len(groups) == 1 or sharding_type in ("column_wise", "table_column_wise", "grid_shard")
    for group in groups:
        _, _, column, columns = group[0]
        fits &= group == [Block(offset, count, column, columns) for offset, count in rows]
        fits &= column == end and columns > 0
        fits &= columns % COLUMN_MULTIPLE == 0 or columns == spec.embedding_dim
        end = column + columns
    if not fits or end != spec.embedding_dim:
        raise PlannerError(
            f"table {spec.name} of TorchRec's plan: its {len(blocks)} shards are not those of a "
            f"{spec.num_embeddings} x {spec.embedding_dim} table cut {sharding_type} for "
            f"{_describe(topology)}"
        )


def _check_ranks(
    spec: TableSpec, sharding_type: ShardingType, ranks: list[int], topology: Topology
) -> None:
    size = topology.local_world_size
    hosts = [rank // size for rank in ranks]
    fits = max(ranks) < topology.world_size
    if sharding_type == "row_wise":
        fits &= ranks == list(range(topology.world_size))
    elif sharding_type == "table_column_wise":
        fits &= len(set(hosts)) == 1
    elif sharding_type in ("table_row_wise", "grid_shard"):
        fits &= ranks == [host * size + i for host in hosts[::size] for i in range(size)]
    if not fits:
        raise PlannerError(
            f"table {spec.name} of TorchRec's plan: ranks {ranks} cannot hold it {sharding_type} "
            f"on {_describe(topology)}"
        )


def _describe(topology: Topology) -> str:
    return f"{topology.world_size} devices, {topology.local_world_size} a host"


def _memory(
    spec: TableSpec, entry: _TableEntry, blocks: list[Block], factor: float | None
) -> Memory:
    count = len(blocks)
    return table_memory(
        ShardColumns(
            tables=TableColumns.of([spec]),
            table=np.zeros(count, dtype=np.int64),
            sharding_type=np.full(count, TYPE_CODE[entry.sharding_type]),
            compute_kernel=np.full(count, KERNEL_CODE[entry.compute_kernel]),
            rows=np.array([block.rows for block in blocks]),
            columns=np.array([block.columns for block in blocks]),
            cache_load_factor=np.full(count, factor or 0.0),
        )
    )


def _devices(tables: Mapping[str, TablePlan], topology: Topology) -> tuple[DevicePlan, ...]:
    used = [0] * topology.world_size
    for table in tables.values():
        for shard in table.shards:
            used[shard.rank] += shard.memory_bytes
    limit = topology.device_memory_limit_bytes
    return tuple(
        DevicePlan(rank=rank, memory_bytes=memory, memory_limit_bytes=limit)
        for rank, memory in enumerate(used)
    )


def _hosts(tables: Mapping[str, TablePlan], topology: Topology) -> tuple[HostPlan, ...]:
    used = [0] * topology.num_hosts
    for table in tables.values():
        for shard in table.shards:
            used[shard.rank // topology.local_world_size] += shard.host_memory_bytes
    if not any(used):
        return ()
    limit = topology.host_memory_limit_bytes
    return tuple(
        HostPlan(host=host, memory_bytes=memory, memory_limit_bytes=limit)
        for host, memory in enumerate(used)
    )
