"""From a run config to its readers and its trainer, on every rank."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from planner import Plan, Topology
from shardemb.best_step import BestStep
from shardemb.config import RunConfig
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.models import build_model
from shardemb.planning import plan_run
from shardemb.sharding.shard_model import current_topology, shard_model
from shardemb.trainer import Trainer


def tell(stage: str) -> None:
    """One line on rank 0 for each thing that takes its time before the first step."""
    if dist.get_rank() == 0:
        print(stage, file=sys.stderr, flush=True)


def build_reader(config: RunConfig, split: str) -> ParquetReader:
    return ParquetReader(
        config.data.split(split),
        BatchSchema.from_config(config),
        batch_size=config.train.batch_size,
        shuffle=config.data.shuffle and split == "train",
        seed=config.seed,
        skip_damaged=config.data.on_error == "skip",
    )


def build_trainer(config: RunConfig, device: torch.device) -> Trainer:
    """The config's model, sharded by rank 0's plan."""
    tell("building the model")
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    model = build_model(config)
    plan = _agree_on_plan(config, current_topology())
    tell(f"sharding {len(plan.tables)} tables")
    sharded = shard_model(
        model,
        plan,
        table_optimizers={name: config.table_optimizer(name) for name in config.tables},
        frozen={name: table.frozen for name, table in config.tables.items() if table.frozen},
        communication=config.train.communication,
        device=device,
        seed=config.seed,
        deterministic=config.train.deterministic,
    )
    torch.manual_seed(config.seed + 1 + dist.get_rank())  # ranks drop other units out
    return Trainer(
        sharded,
        config.train.dense_optimizer,
        config.train.schedule,
        gradient_clipping=config.train.gradient_clipping,
        precision=config.train.precision,
        tasks=config.tasks,
        metrics=config.metrics,
        best=best_step(config),
    )


def best_step(config: RunConfig) -> BestStep | None:
    """That of a run which has evaluated nothing yet; None where none is looked for."""
    if config.evaluation.every_steps is None:
        return None
    metric, stopping = config.best_metric, config.evaluation.early_stopping
    assert metric.kind.best
    if stopping is None:
        return BestStep(metric.key, metric.kind.best)
    return BestStep(metric.key, metric.kind.best, stopping.patience, stopping.min_delta)


def _agree_on_plan(config: RunConfig, topology: Topology) -> Plan:
    """Rank 0's plan, on every rank."""
    plan = [plan_run(config, topology) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(plan, src=0)
    assert plan[0] is not None
    return plan[0]
