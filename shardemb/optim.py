"""Optimizers of tables (inside backward) and of dense parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchrec.optim import (
    CombinedOptimizer,
    KeyedOptimizerWrapper,
    PartialRowWiseAdam,
    RowWiseAdagrad,
    apply_optimizer_in_backward,
)

from planner import Plan
from shardemb.config import ADAMS, DenseOptimizerConfig, TableOptimizerConfig
from shardemb.row_adam import ReplicatedRowAdam, RowAdam
from shardemb.sharding.tables import HeldTable

# They stand for FBGEMM's kernels, and are those of data_parallel tables but for the Adams.
_TABLE: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
    "partial_rowwise_adam": PartialRowWiseAdam,
}
_DENSE: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
}


def table_optimizer_kwargs(config: TableOptimizerConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"lr": config.lr}
    if config.name != "sgd":
        kwargs["eps"] = config.eps
    if config.name in ADAMS:
        kwargs |= {"betas": config.betas, "weight_decay": config.weight_decay}
    return kwargs


def cpu_rule(config: TableOptimizerConfig) -> RowAdam | None:
    """What changes the rows of CPU kernels; None where FBGEMM's kernels do that."""
    if config.name not in ADAMS:
        return None
    is_rowwise = config.name == "partial_rowwise_adam"
    return RowAdam(config.lr, config.betas, config.eps, config.weight_decay, is_rowwise)


def attach_table_optimizer(
    tables: Iterable[HeldTable], plan: Plan, config: TableOptimizerConfig, device_type: str
) -> None:
    """Have each table that the plan shards updated inside backward, by FBGEMM's fused kernel.

    For a `cpu_rule` FBGEMM's kernel is one that keeps no state: its updates are taken over.
    """
    if device_type == "cpu" and cpu_rule(config):
        config = TableOptimizerConfig(name="sgd", lr=0.0)
    for table in tables:
        if plan.tables[table.config.name].sharding_type == "data_parallel":
            continue
        kwargs = table_optimizer_kwargs(config)
        with warnings.catch_warnings():
            # The public name forwards to PyTorch's private one and says so each time.
            warnings.simplefilter("ignore", DeprecationWarning)
            apply_optimizer_in_backward(_TABLE[config.name], [table.parameter], kwargs)


def make_optimizer(
    model: nn.Module, plan: Plan, dense: DenseOptimizerConfig, tables: TableOptimizerConfig
) -> CombinedOptimizer:
    """The optimizer of all that is updated after backward: `model` as sharded by `plan`.

    Dense parameters get `dense`; tables sharded `data_parallel` get the tables' optimizer, so
    that a table learns the same way however it is sharded.
    """
    replicated: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        table = table_of(name, plan)
        if table is None:
            others[name] = parameter
        elif plan.tables[table].sharding_type == "data_parallel":
            replicated[name] = parameter
    optimizers: list[tuple[str, Any]] = []
    if others:
        kwargs: dict[str, Any] = {"lr": dense.lr, "weight_decay": dense.weight_decay}
        optimizers.append(("dense", _keyed(others, _DENSE[dense.name], kwargs)))
    if replicated:
        rule = cpu_rule(tables)
        make = ReplicatedRowAdam if rule else _TABLE[tables.name]
        kwargs = vars(rule) if rule else table_optimizer_kwargs(tables)
        optimizers.append(("tables", _keyed(replicated, make, kwargs)))
    return CombinedOptimizer(optimizers)


def _keyed(
    parameters: dict[str, nn.Parameter], make: type[Optimizer], kwargs: dict[str, Any]
) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper(parameters, lambda values: make(values, **kwargs))


def table_of(parameter_name: str, plan: Plan) -> str | None:
    """The table whose weight this is; TorchRec names it `...embedding_bags.TABLE.weight`."""
    *_, collection, table, leaf = ["", "", *parameter_name.split(".")]
    is_table = collection in ("embedding_bags", "embeddings") and leaf == "weight"
    return table if is_table and table in plan.tables else None
