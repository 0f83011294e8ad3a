"""Our plan as TorchRec's ShardingPlan, and TorchRec's as ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from planner import Plan, TableSpec, Topology
from planner.torchrec_json import export_torchrec, import_torchrec, plan_by_module
from shardemb.sharding.tables import held_tables, tables_from_module


def to_torchrec(plan: Plan, model: nn.Module, device: torch.device) -> ShardingPlan:
    """The ShardingPlan of `model`'s embedding collections, on devices of `device`'s kind.

    PlannerError where the plan is for other tables.
    """
    plan.check_fits(tables_from_module(model), plan.topology)
    modules = {table.config.name: table.path for table in held_tables(model)}
    return torchrec_from_json(export_torchrec(plan, modules, device.type))


def plan_from_torchrec(
    sharding_plan: ShardingPlan | EmbeddingModuleShardingPlan,
    tables: nn.Module | Iterable[TableSpec],
    topology: Topology,
) -> Plan:
    """TorchRec's plan as one of ours, to look at, predict, compare and train with.

    `tables` are those that the plan is for, or the model that holds them. PlannerError where the
    plan is for other tables or for another topology, RequestError for what only TorchRec knows,
    such as kernels for SSDs.
    """
    specs = tables_from_module(tables) if isinstance(tables, nn.Module) else tables
    return import_torchrec(torchrec_to_json(sharding_plan), specs, topology)


def torchrec_from_json(document: Mapping[str, Any], module: str = "") -> ShardingPlan:
    """The ShardingPlan that `export_torchrec` or TorchRec has serialized.

    `module` is the path of the embedding collection, where `document` is the plan of one module.
    """
    modules: dict[str, Any] = {}
    for path, tables in plan_by_module(document, module).items():
        entries = {name: _parameter_sharding(entry) for name, entry in tables.items()}
        modules[path] = EmbeddingModuleShardingPlan(entries)
    return ShardingPlan(modules)


def _parameter_sharding(entry: Mapping[str, Any]) -> ParameterSharding:
    shards, cache = entry.get("shards"), entry.get("cache_params")
    return ParameterSharding(
        sharding_type=entry["sharding_type"],
        # Never left out: TorchRec would then choose the dense kernel, whose tables no fused
        # optimizer updates.
        compute_kernel=entry["compute_kernel"],
        ranks=entry["ranks"],
        sharding_spec=shards and EnumerableShardingSpec([ShardMetadata(**s) for s in shards]),
        cache_params=cache and CacheParams(**cache),
    )


def torchrec_to_json(plan: ShardingPlan | EmbeddingModuleShardingPlan) -> dict[str, Any]:
    """What TorchRec's `_serialize`, which is not public, gives; and the sizes of caches."""
    if isinstance(plan, ShardingPlan):
        return {"plan": {path: torchrec_to_json(module) for path, module in plan.plan.items()}}
    return {name: _table_to_json(parameter) for name, parameter in plan.items()}


def _table_to_json(parameter: ParameterSharding) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "sharding_type": parameter.sharding_type,
        "compute_kernel": parameter.compute_kernel,
        "ranks": parameter.ranks,
    }
    if isinstance(parameter.sharding_spec, EnumerableShardingSpec):
        entry["shards"] = [
            {
                "shard_offsets": list(shard.shard_offsets),
                "shard_sizes": list(shard.shard_sizes),
                "placement": str(shard.placement),
            }
            for shard in parameter.sharding_spec.shards
        ]
    if parameter.cache_params is not None and parameter.cache_params.load_factor is not None:
        entry["cache_params"] = {"load_factor": parameter.cache_params.load_factor}
    return entry
