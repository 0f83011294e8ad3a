"""Plans by rule: the sharding type is given, shards go to the ranks with the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict, Field

from planner.errors import PlannerError
from planner.geometry import Block, ShardingType, column_shard_count, cut
from planner.plan import DevicePlan, Plan, Shard, TablePlan
from planner.storage import shard_bytes
from planner.tables import TableSpec
from planner.topology import Topology


class ShardingRule(BaseModel):
    """How one table is to be sharded; what is left out is chosen by balance of bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sharding_type: ShardingType
    ranks: tuple[int, ...] | None = Field(default=None, description="the rank of each shard")
    column_shards: int | None = Field(default=None, gt=0, description="how many column shards")


def plan_by_rule(
    tables: Iterable[TableSpec],
    topology: Topology,
    default: ShardingRule,
    rules: Mapping[str, ShardingRule] | None = None,
) -> Plan:
    """Shard every table by its rule, or by `default`.

    Tables are placed largest first, each shard on the rank (table_row_wise, table_column_wise:
    the host; grid_shard: hosts) that holds the fewest bytes so far.
    """
    rules = rules or {}
    specs = list(tables)
    _check_names(specs, rules)
    used = [0] * topology.world_size
    chosen: dict[str, TablePlan] = {}
    for table in sorted(specs, key=lambda t: -shard_bytes(t, t.num_embeddings, t.embedding_dim)):
        chosen[table.name] = _shard_table(table, topology, rules.get(table.name, default), used)
    return Plan(
        topology=topology,
        devices=tuple(DevicePlan(rank=r, memory_bytes=b) for r, b in enumerate(used)),
        tables={table.name: chosen[table.name] for table in specs},
    )


def _check_names(specs: list[TableSpec], rules: Mapping[str, ShardingRule]) -> None:
    names = [table.name for table in specs]
    if not names:
        raise PlannerError("there are no tables to plan for")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlannerError(f"more than one table is named {', '.join(twice)}: give each its own")
    unknown = sorted(rules.keys() - set(names))
    if unknown:
        raise PlannerError(f"a sharding rule names table {unknown[0]}, which does not exist")


def _shard_table(
    table: TableSpec, topology: Topology, rule: ShardingRule, used: list[int]
) -> TablePlan:
    column_shards = rule.column_shards or _default_column_shards(table, topology, rule)
    blocks = cut(table, rule.sharding_type, topology, column_shards)
    ranks = _given_ranks(table, blocks, topology, rule)
    if ranks is None:
        ranks = _lightest_ranks(rule.sharding_type, blocks, topology, used)
    shards = []
    for block, rank in zip(blocks, ranks, strict=True):
        memory = shard_bytes(table, block.rows, block.columns)
        used[rank] += memory
        shards.append(Shard(rank=rank, memory_bytes=memory, **block._asdict()))
    kernel = "dense" if rule.sharding_type == "data_parallel" else "fused"
    return TablePlan(
        sharding_type=rule.sharding_type,
        compute_kernel=kernel,
        shards=tuple(shards),
        spec=table,
    )


def _default_column_shards(table: TableSpec, topology: Topology, rule: ShardingRule) -> int:
    if rule.ranks and rule.sharding_type in ("column_wise", "table_column_wise"):
        return len(rule.ranks)
    if rule.ranks and rule.sharding_type == "grid_shard":
        return max(1, len(rule.ranks) // topology.local_world_size)
    at_most = {
        "column_wise": topology.world_size,
        "table_column_wise": topology.local_world_size,
        "grid_shard": topology.num_hosts,
    }.get(rule.sharding_type, 1)
    return column_shard_count(table.embedding_dim, at_most)


def _given_ranks(
    table: TableSpec, blocks: list[Block], topology: Topology, rule: ShardingRule
) -> list[int] | None:
    if rule.ranks is None:
        return None
    where = f"table {table.name}, {rule.sharding_type}: ranks {list(rule.ranks)}"
    if len(rule.ranks) != len(blocks):
        raise PlannerError(f"{where}: {len(blocks)} shards need {len(blocks)} ranks")
    beyond = [rank for rank in rule.ranks if not 0 <= rank < topology.world_size]
    if beyond:
        raise PlannerError(f"{where}: there are ranks 0 to {topology.world_size - 1} only")
    fixed = _fixed_ranks(rule.sharding_type, rule.ranks, topology)
    if fixed is not None and list(rule.ranks) != fixed:
        raise PlannerError(f"{where}: this type takes its ranks in order, here {fixed}")
    hosts = {rank // topology.local_world_size for rank in rule.ranks}
    if rule.sharding_type == "table_column_wise" and len(hosts) > 1:
        raise PlannerError(f"{where}: the ranks must be of one host")
    return list(rule.ranks)


def _fixed_ranks(
    sharding_type: ShardingType, ranks: tuple[int, ...], topology: Topology
) -> list[int] | None:
    """The only rank order TorchRec takes for row shards, given the host of each row of them."""
    if sharding_type in ("row_wise", "data_parallel"):
        return list(range(topology.world_size))
    if sharding_type in ("table_row_wise", "grid_shard"):
        size = topology.local_world_size
        hosts = [rank // size for rank in ranks[::size]]
        return [rank for host in hosts for rank in topology.ranks_of_host(host)]
    return None


def _lightest_ranks(
    sharding_type: ShardingType, blocks: list[Block], topology: Topology, used: list[int]
) -> list[int]:
    if sharding_type in ("row_wise", "data_parallel"):
        return list(range(topology.world_size))
    if sharding_type in ("table_wise", "column_wise"):
        return _in_turn(_by_weight(range(topology.world_size), used), len(blocks))
    of_hosts = [sum(used[r] for r in topology.ranks_of_host(h)) for h in range(topology.num_hosts)]
    hosts = _by_weight(range(topology.num_hosts), of_hosts)
    if sharding_type == "table_column_wise":
        return _in_turn(_by_weight(topology.ranks_of_host(hosts[0]), used), len(blocks))
    groups = len(blocks) // topology.local_world_size
    return [r for host in _in_turn(hosts, groups) for r in topology.ranks_of_host(host)]


def _by_weight(ranks: Iterable[int], used: list[int]) -> list[int]:
    return sorted(ranks, key=lambda rank: (used[rank], rank))


def _in_turn(choices: list[int], count: int) -> list[int]:
    return [choices[i % len(choices)] for i in range(count)]
