"""shard_model: a model and a plan become a model whose tables live on many ranks."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardingEnv

from planner import Plan, PlannerError, TableSpec, Topology
from shardemb.config import TableOptimizerConfig
from shardemb.optim import attach_table_optimizer, cpu_rule
from shardemb.sharding.cpu_adam import KernelAdam, take_over_updates
from shardemb.sharding.empty_shards import mend_empty_shards
from shardemb.sharding.initialize import fill, from_parameter, from_seed
from shardemb.sharding.limits import refuse_unsupported
from shardemb.sharding.mean_pooling import divide_output, take_over_mean_pooling
from shardemb.sharding.sharders import sharders
from shardemb.sharding.tables import HeldTable, held_tables, tables_from_module
from shardemb.sharding.torchrec_plan import to_torchrec

logger = logging.getLogger(__name__)

ROWWISE = ("rowwise_adagrad", "partial_rowwise_adam")


class ShardedModel(DistributedModelParallel):
    """TorchRec's DistributedModelParallel, which remembers its plan and table optimizer.

    Gradients are those of the mean loss over the rows of all ranks, for every sharding type:
    each rank's loss is the mean over its own rows, and ranks are averaged.
    """

    planner_plan: Plan  # DistributedModelParallel.plan is the same as TorchRec has it
    table_specs: tuple[TableSpec, ...]
    table_optimizer: TableOptimizerConfig
    kernel_adams: list[KernelAdam]  # of CPU kernels that FBGEMM cannot update itself


def current_topology() -> Topology:
    """The ranks of the default process group, as torchrun or `shardemb` started them."""
    world_size = dist.get_world_size()
    return Topology(
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )


def shard_model(
    model: nn.Module,
    plan: Plan,
    table_optimizer: TableOptimizerConfig | None = None,
    *,
    device: torch.device | None = None,
    seed: int = 0,
    deterministic: bool = False,
) -> ShardedModel:
    """Shard the embedding collections of `model` as `plan` says; replicate all else.

    Call it on every rank, with the process group initialized. Tables on the meta device get
    first values from `seed` and their name alone, the same under every plan; others keep the
    values they have. The tables' optimizer runs inside backward; tables that the plan has as
    `data_parallel` and dense layers are left to `shardemb.Trainer` or
    `shardemb.optim.make_optimizer`.

    `deterministic`: gradients are summed in one order in all steps, so that a run that goes on from
    a checkpoint has the bits of one that never stopped, on any number of ranks; otherwise DDP may
    change the order after its first step.

    Raises PlannerError where the plan is for other tables or for another topology.
    """
    group = _world()
    optimizer = table_optimizer or TableOptimizerConfig()
    device = device or torch.device("cpu")
    specs = tables_from_module(model, optimizer=optimizer.name)
    plan.check_fits(specs, current_topology())
    refuse_unsupported(plan, specs, device.type)
    torchrec_plan = to_torchrec(plan, model, device)  # the last check; the model changes below
    _warn_of_column_momentum(plan, optimizer)
    held = list(held_tables(model))
    attach_table_optimizer(held, plan, optimizer, device.type)
    means = {
        path: take_over_mean_pooling(module)
        for path, module in model.named_modules()
        if isinstance(module, EmbeddingBagCollection)
    }
    sharded = ShardedModel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=torchrec_plan,
        sharders=sharders(),
        init_data_parallel=False,
        data_parallel_wrapper=_in_fixed_order() if deterministic else None,
    )
    for path, keys in means.items():
        collection = sharded.module.get_submodule(path)
        divide_output(collection, keys)
        mend_empty_shards(collection)
    rule = cpu_rule(optimizer) if device.type == "cpu" else None
    sharded.kernel_adams = take_over_updates(sharded, rule) if rule else []
    _initialize_tables(sharded, held, device, seed)
    sharded.init_data_parallel()
    sharded.planner_plan, sharded.table_optimizer = plan, optimizer
    sharded.table_specs = tuple(specs)
    return sharded


def _in_fixed_order() -> DefaultDataParallelWrapper:
    """DDP puts gradients into other buckets after the first step, unless it looks for unused
    parameters; which bucket a gradient is in decides the order of its sum over ranks."""
    return DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        raise PlannerError(
            "no process group: use shard_model inside `with shardemb.process_group():`, and start "
            "the script with torchrun"
        )
    return group


def _initialize_tables(
    sharded: ShardedModel, held: list[HeldTable], device: torch.device, seed: int
) -> None:
    state = sharded.state_dict()
    for path, _, config, parameter in held:
        source = from_seed(config, seed, device) if parameter.is_meta else from_parameter(parameter)
        if source is not None:
            fill(_table_in(state, path, config.name), source)


def _table_in(state: dict[str, torch.Tensor], path: str, table: str) -> torch.Tensor:
    prefix = f"{path}." if path else ""
    for collection in ("embedding_bags", "embeddings"):
        key = f"{prefix}{collection}.{table}.weight"
        if key in state:
            return state[key]
    raise AssertionError(f"TorchRec's state_dict has no table {path}.{table}")


def _warn_of_column_momentum(plan: Plan, optimizer: TableOptimizerConfig) -> None:
    if optimizer.name not in ROWWISE or dist.get_rank() != 0:
        return
    split = [
        name
        for name, table in plan.tables.items()
        if any(shard.columns < table.embedding_dim for shard in table.shards)
    ]
    if split:
        logger.warning(
            f"{optimizer.name} keeps one momentum for each column shard of a row, not one for the "
            "row: tables %s will train slightly differently than unsharded",
            ", ".join(split[:10]) + (" ..." if len(split) > 10 else ""),
        )
