"""shard_model: a model and a plan become a model whose tables live on many ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardingEnv

from planner import Plan, PlannerError, RequestError, TableSpec, Topology
from planner.validation import nearest
from shardemb.optim import attach_table_optimizers, row_rule
from shardemb.optimizer_config import FreezeConfig, TableOptimizerConfig
from shardemb.precision_config import CommunicationConfig
from shardemb.sharding.cpu_updates import KernelUpdates, take_over_updates
from shardemb.sharding.empty_shards import mend_empty_shards
from shardemb.sharding.frozen_kernels import FreezableKernel, make_freezable
from shardemb.sharding.gradient_limits import gradient_limits, limit_gradients
from shardemb.sharding.initialize import fill, from_parameter, from_seed
from shardemb.sharding.limits import refuse_unsendable, refuse_unsupported
from shardemb.sharding.mean_pooling import divide_output, take_over_mean_pooling
from shardemb.sharding.sharders import sharders
from shardemb.sharding.tables import HeldTable, held_tables, tables_from_module
from shardemb.sharding.torchrec_plan import to_torchrec

logger = logging.getLogger(__name__)

# What these keep or compute once for each row of a column shard.
OF_ROWS = {
    "rowwise_adagrad": "momentum",
    "partial_rowwise_adam": "momentum",
    "lamb": "trust ratio",
    "partial_rowwise_lamb": "momentum and trust ratio",
}


class ShardedModel(DistributedModelParallel):
    """TorchRec's DistributedModelParallel, which remembers its plan and table optimizers.

    Gradients are those of the mean loss over the rows of all ranks, for every sharding type:
    each rank's loss is the mean over its own rows, and ranks are averaged.
    """

    planner_plan: Plan  # DistributedModelParallel.plan is the same as TorchRec has it
    table_specs: tuple[TableSpec, ...]
    table_optimizers: dict[str, TableOptimizerConfig]
    frozen: dict[str, FreezeConfig]  # of tables that stand still at some time
    kernels: list[FreezableKernel]
    own_updates: list[KernelUpdates]  # of CPU kernels that FBGEMM cannot update itself


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
    table_optimizers: Mapping[str, TableOptimizerConfig] | None = None,
    frozen: Mapping[str, FreezeConfig] | None = None,
    communication: CommunicationConfig | None = None,
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

    `table_optimizers` and `frozen` are of some tables, by name; the others have `table_optimizer`
    and are always trained. `shardemb.Trainer` freezes and unfreezes.

    `deterministic`: gradients are summed in one order in all steps, so that a run that goes on from
    a checkpoint has the bits of one that never stopped, on any number of ranks; otherwise DDP may
    change the order after its first step.

    Raises PlannerError where the plan is for other tables or for another topology, RequestError
    where `table_optimizers` or `frozen` name tables that there are not.
    """
    group = _world()
    device = device or torch.device("cpu")
    frozen, communication = dict(frozen or {}), communication or CommunicationConfig()
    specs = tables_from_module(model)
    optimizers = dict.fromkeys(
        (spec.name for spec in specs), table_optimizer or TableOptimizerConfig()
    )
    _check_names({"table_optimizers": table_optimizers or {}, "frozen": frozen}, optimizers)
    optimizers |= table_optimizers or {}
    specs = [spec.model_copy(update={"optimizer": optimizers[spec.name].name}) for spec in specs]
    plan.check_fits(specs, current_topology())
    refuse_unsupported(plan, specs, device.type)
    refuse_unsendable(communication, device.type)
    torchrec_plan = to_torchrec(plan, model, device)  # the last check; the model changes below
    _warn_of_column_shards(plan, optimizers)
    held = list(held_tables(model))
    attach_table_optimizers(held, plan, optimizers, frozen, device.type)
    max_gradients = {name: optimizer.max_gradient for name, optimizer in optimizers.items()}
    limits = {table.path: gradient_limits(table.module, max_gradients) for table in held}
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
        sharders=sharders(communication, device),
        init_data_parallel=False,
        data_parallel_wrapper=_in_fixed_order() if deterministic else None,
    )
    for path, keys in means.items():
        collection = sharded.module.get_submodule(path)
        divide_output(collection, keys)
        mend_empty_shards(collection)
    for path, own in limits.items():
        limit_gradients(sharded.module.get_submodule(path), own)
    rules = {name: row_rule(optimizer) for name, optimizer in optimizers.items()}
    sharded.own_updates = take_over_updates(sharded, rules)
    sharded.kernels = make_freezable(sharded)
    _initialize_tables(sharded, held, device, seed)
    sharded.init_data_parallel()
    sharded.planner_plan, sharded.table_specs = plan, tuple(specs)
    sharded.table_optimizers, sharded.frozen = optimizers, frozen
    return sharded


def _check_names(options: Mapping[str, Mapping[str, object]], tables: Mapping[str, object]) -> None:
    for option, values in options.items():
        for name in values.keys() - tables.keys():
            raise RequestError(f"{option}: there is no table {name}{nearest(name, tables)}")


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


def _warn_of_column_shards(plan: Plan, optimizers: Mapping[str, TableOptimizerConfig]) -> None:
    if dist.get_rank() != 0:
        return
    for optimizer, value in OF_ROWS.items():
        split = [
            name
            for name, table in plan.tables.items()
            if optimizers[name].name == optimizer
            and any(shard.columns < table.embedding_dim for shard in table.shards)
        ]
        if split:
            logger.warning(
                f"{optimizer} keeps one {value} for each column shard of a row, not one for the "
                "row: tables %s will train slightly differently than unsharded",
                ", ".join(split[:10]) + (" ..." if len(split) > 10 else ""),
            )
