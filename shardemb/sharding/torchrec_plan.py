"""Our plan as TorchRec's ShardingPlan."""

from __future__ import annotations

import torch
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from planner import Plan, PlannerError, TablePlan
from shardemb.sharding.tables import held_tables


def to_torchrec(plan: Plan, model: nn.Module, device: torch.device) -> ShardingPlan:
    """The ShardingPlan of `model`'s embedding collections, on devices of `device`'s kind."""
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for path, module, config, _ in held_tables(model):
        table = plan.tables[config.name]
        _refuse_broken(config.name, table, isinstance(module, EmbeddingCollection), device)
        entry = modules.setdefault(path, EmbeddingModuleShardingPlan())
        entry[config.name] = _parameter_sharding(table, plan.topology.local_world_size, device)
    return ShardingPlan(plan=dict(modules))


def _refuse_broken(name: str, table: TablePlan, sequence: bool, device: torch.device) -> None:
    if sequence and table.sharding_type == "data_parallel" and device.type == "cpu":
        raise PlannerError(
            f"table {name}: TorchRec cannot train a data_parallel EmbeddingCollection on CPU; "
            "shard it table_wise, row_wise or column_wise"
        )


def _parameter_sharding(
    table: TablePlan, local_world_size: int, device: torch.device
) -> ParameterSharding:
    ranks = [shard.rank for shard in table.shards]
    spec = None
    if table.sharding_type != "data_parallel":
        spec = EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.row_offset, shard.column_offset],
                    shard_sizes=[shard.rows, shard.columns],
                    placement=_placement(shard.rank, local_world_size, device),
                )
                for shard in table.shards
            ]
        )
    return ParameterSharding(
        sharding_type=table.sharding_type,
        # Never left out: TorchRec would then choose the dense kernel, whose tables no fused
        # optimizer updates.
        compute_kernel=table.compute_kernel,
        ranks=ranks,
        sharding_spec=spec,
    )


def _placement(rank: int, local_world_size: int, device: torch.device) -> str:
    local = f"{device.type}:{rank % local_world_size}" if device.type != "cpu" else "cpu"
    return f"rank:{rank}/{local}"
