"""Optimizers of tables (inside backward) and of dense parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torchrec.optim
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torchrec.optim import (
    CombinedOptimizer,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    apply_optimizer_in_backward,
)

from planner import Plan
from shardemb.optimizer_config import (
    ADAMS,
    DenseOptimizerConfig,
    FreezeConfig,
    GradientClippingConfig,
    TableOptimizerConfig,
)
from shardemb.row_rules import ReplicatedRows, RowAdam, RowRule, RowWiseAdagradWithDecay
from shardemb.sharding.tables import HeldTable

# They stand for FBGEMM's kernels, and take the arguments of those.
_FUSED: dict[str, type[Optimizer]] = {
    "sgd": torchrec.optim.SGD,
    "adagrad": torchrec.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adam": torchrec.optim.Adam,
    "partial_rowwise_adam": torchrec.optim.PartialRowWiseAdam,
    "lamb": torchrec.optim.LAMB,
    "partial_rowwise_lamb": torchrec.optim.PartialRowWiseLAMB,
}
# Of data_parallel tables, where no row rule is needed.
_REPLICATED: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
}
_DENSE: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
}


DENSE, TABLES = "dense", "tables"  # parts of the optimizer


def row_rule(config: TableOptimizerConfig) -> RowRule | None:
    """What changes the rows of data_parallel tables and of CPU kernels; None where PyTorch's
    optimizers and FBGEMM's CPU kernels do that."""
    if config.name in ADAMS:
        return RowAdam(
            config.lr,
            config.betas,
            config.eps,
            config.weight_decay,
            is_rowwise=config.name.startswith("partial_rowwise"),
            has_trust_ratio=config.name.endswith("lamb"),
        )
    if config.weight_decay:
        return RowWiseAdagradWithDecay(config.lr, config.eps, config.weight_decay)
    return None


def kernel_arguments(config: TableOptimizerConfig) -> dict[str, Any]:
    """Of FBGEMM's fused kernel that trains by `config`."""
    arguments: dict[str, Any] = {"lr": config.lr}
    if config.name != "sgd":
        arguments["eps"] = config.eps
    if config.name in ADAMS:
        arguments |= {"beta1": config.betas[0], "beta2": config.betas[1]}
    if config.weight_decay:
        arguments["weight_decay"] = config.weight_decay
        if config.name not in ADAMS:  # whose kernels know decoupled decay alone
            arguments["weight_decay_mode"] = WeightDecayMode.DECOUPLE
    return arguments


def attach_table_optimizers(
    tables: Iterable[HeldTable],
    plan: Plan,
    optimizers: Mapping[str, TableOptimizerConfig],
    frozen: Mapping[str, FreezeConfig],
    device_type: str,
) -> None:
    """Have each table that the plan shards updated inside backward, by FBGEMM's fused kernel.

    Tables share a kernel where they have the same optimizer and are frozen together. For a
    `row_rule` a CPU kernel is one that keeps no state: its updates are taken over.
    """
    for table in tables:
        name = table.config.name
        config = optimizers[name]
        if plan.tables[name].sharding_type == "data_parallel":
            continue
        # TorchRec groups tables by all their arguments, and keeps this one from the kernel.
        group = {"_batch_key": f"{config!r} {frozen.get(name)!r}"}
        if device_type == "cpu" and row_rule(config):
            config = TableOptimizerConfig(name="sgd", lr=0.0)
        with warnings.catch_warnings():
            # The public name forwards to PyTorch's private one and says so each time.
            warnings.simplefilter("ignore", DeprecationWarning)
            apply_optimizer_in_backward(
                _FUSED[config.name], [table.parameter], kernel_arguments(config) | group
            )


def make_optimizer(
    model: nn.Module,
    plan: Plan,
    dense: DenseOptimizerConfig,
    tables: Mapping[str, TableOptimizerConfig],
) -> CombinedOptimizer:
    """The optimizer of all that is updated after backward: `model` as sharded by `plan`.

    Dense parameters get `dense`; tables sharded `data_parallel` get their own optimizer, so that a
    table learns the same way however it is sharded.
    """
    replicated: dict[TableOptimizerConfig, dict[str, nn.Parameter]] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        table = table_of(name, plan)
        if table is None:
            others[name] = parameter
        elif plan.tables[table].sharding_type == "data_parallel":
            replicated.setdefault(tables[table], {})[name] = parameter
    optimizers: list[tuple[str, KeyedOptimizer]] = []
    if others:
        make = partial(_DENSE[dense.name], lr=dense.lr, weight_decay=dense.weight_decay)
        optimizers.append((DENSE, KeyedOptimizerWrapper(others, make)))
    for config, parameters in replicated.items():
        optimizers.append((TABLES, KeyedOptimizerWrapper(parameters, _replicated(config))))
    return CombinedOptimizer(optimizers)


def _replicated(config: TableOptimizerConfig) -> Any:
    rule = row_rule(config)
    if rule:
        return partial(ReplicatedRows, rule=rule)
    return partial(_REPLICATED[config.name], **kernel_arguments(config))


def parts_named(name: str, optimizer: CombinedOptimizer) -> list[KeyedOptimizer]:
    """`DENSE`, or those of `TABLES`, one for each way to update them."""
    return [part for own, part in optimizer.optimizers if own == name]


def clip_dense_gradients(optimizer: CombinedOptimizer, config: GradientClippingConfig) -> None:
    """Limit the gradients of all dense parameters, which are the same on every rank.

    Tables have no part in it, not even those that are data_parallel: what training does must not
    depend on the plan.
    """
    parameters = [p for part in parts_named(DENSE, optimizer) for p in part.params.values()]
    if config.norm:
        clip_grad_norm_(parameters, config.norm)
    if config.value:
        clip_grad_value_(parameters, config.value)


def table_of(parameter_name: str, plan: Plan) -> str | None:
    """The table whose weight this is; TorchRec names it `...embedding_bags.TABLE.weight`."""
    *_, collection, table, leaf = ["", "", *parameter_name.split(".")]
    is_table = collection in ("embedding_bags", "embeddings") and leaf == "weight"
    return table if is_table and table in plan.tables else None
