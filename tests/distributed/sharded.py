"""The same model and rows as the reference, sharded: runs inside the pool's workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from planner import Plan
from shardemb.checkpoint.state import table_pieces
from shardemb.data.batch import Batch
from shardemb.optim import row_rule
from shardemb.optimizer_config import (
    DenseOptimizerConfig,
    FreezeConfig,
    GradientClippingConfig,
    TableOptimizerConfig,
)
from shardemb.precision_config import CommunicationConfig
from shardemb.ranks import pick_device
from shardemb.sharding.shard_model import ShardedModel, shard_model
from shardemb.trainer import Trainer
from tests.distributed.pool import DeviceType
from tests.distributed.reference import (
    DENSE_LR,
    EPS,
    FEATURES,
    TABLE_LR,
    TABLES,
    DenseLayers,
    Rows,
    Rule,
    first_weights,
)


class Model(nn.Module):
    def __init__(self, weighted: bool) -> None:
        super().__init__()
        first = first_weights()
        self.embeddings = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table.name,
                    num_embeddings=table.rows,
                    embedding_dim=table.dim,
                    feature_names=list(table.features),
                    pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
                )
                for table in TABLES
            ],
            is_weighted=weighted,
        )
        self.layers = DenseLayers()
        self.layers.load_state_dict({n: first[n] for n in self.layers.state_dict()})
        with torch.no_grad():
            for table in TABLES:
                self.embeddings.embedding_bags[table.name].weight.copy_(first[table.name])

    def forward(self, batch: Batch) -> torch.Tensor:
        # By name: the order of `.values()` depends on how tables are sharded.
        pooled = self.embeddings(batch.sparse)
        return self.layers(batch.dense, torch.cat([pooled[f] for f in FEATURES], dim=1))


def pad_batch(rows: Rows, size: int, global_rows: int, weighted: bool) -> Batch:
    """`rows` and padding up to `size`."""
    padding = size - len(rows)
    lengths = [len(bag) for f in FEATURES for bag in rows.ids[f] + [[]] * padding]
    values = [i for f in FEATURES for bag in rows.ids[f] for i in bag]
    weights = [w for f in FEATURES for bag in rows.weights[f] for w in bag]
    return Batch(
        dense=torch.nn.functional.pad(rows.dense, (0, 0, 0, padding)),
        sparse=KeyedJaggedTensor(
            keys=list(FEATURES),
            values=torch.tensor(values, dtype=torch.long),
            lengths=torch.tensor(lengths),
            weights=torch.tensor(weights) if weighted else None,
        ),
        labels=torch.nn.functional.pad(rows.labels, (0, padding)),
        mask=torch.tensor([1.0] * len(rows) + [0.0] * padding),
        global_rows=global_rows,
    )


def train(
    plan: Plan,
    table_optimizer: str,
    dense_optimizer: str,
    weighted: bool,
    steps: list[Rows],
    batch_size: int,
    device: DeviceType,
    own: Own | None = None,
) -> dict[str, Any]:
    """Train on this rank's part of `steps`; what the rank then holds, for `assemble`."""
    trainer = make_trainer(plan, table_optimizer, dense_optimizer, weighted, device, own)
    train_steps(trainer, steps, batch_size, weighted)
    return holdings(trainer.model, trainer)


@dataclass(frozen=True)
class Own:
    """What is not the same for all tables, or not plain."""

    rules: dict[str, Rule] = field(default_factory=dict)
    clipping: GradientClippingConfig = field(default_factory=GradientClippingConfig)
    communication: CommunicationConfig = field(default_factory=CommunicationConfig)


def make_trainer(
    plan: Plan,
    table_optimizer: str,
    dense_optimizer: str,
    weighted: bool,
    device: DeviceType,
    own: Own | None = None,
) -> Trainer:
    own = own or Own()
    tables = TableOptimizerConfig(name=table_optimizer, lr=TABLE_LR, eps=EPS)
    model = shard_model(
        Model(weighted),
        plan,
        tables,
        table_optimizers={
            table: TableOptimizerConfig(
                name=rule.name,
                lr=rule.lr,
                eps=EPS,
                weight_decay=rule.weight_decay,
                max_gradient=rule.max_gradient,
            )
            for table, rule in own.rules.items()
        },
        frozen={
            table: FreezeConfig(
                from_step=rule.frozen.start - 1 or None, until_step=rule.frozen.stop - 1
            )
            for table, rule in own.rules.items()
            if rule.frozen
        },
        communication=own.communication,
        device=pick_device(device),
    )
    dense = DenseOptimizerConfig(name=dense_optimizer, lr=DENSE_LR)
    return Trainer(model, dense, gradient_clipping=own.clipping)


def train_steps(trainer: Trainer, steps: list[Rows], batch_size: int, weighted: bool) -> None:
    """Each step's ids are exchanged during the one before, but those of the first."""
    batches = own_batches(steps, batch_size, weighted)
    for batch, following in zip_longest(batches, batches[1:]):
        trainer.freezing.set(trainer.step + 1, epoch=1)
        trainer.train_step(batch, following)
        trainer.step, trainer.samples = trainer.step + 1, trainer.samples + batch.global_rows


def own_batches(steps: list[Rows], batch_size: int, weighted: bool) -> list[Batch]:
    """This rank's part of `steps`."""
    start = dist.get_rank() * batch_size
    parts = [rows.part(start, start + batch_size) for rows in steps]
    return [
        pad_batch(part, batch_size, len(rows), weighted)
        for part, rows in zip(parts, steps, strict=True)
    ]


def holdings(model: ShardedModel, trainer: Trainer) -> dict[str, Any]:
    """name -> list of (row offset, column offset, values) that this rank holds, on CPU."""
    held: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        held[_short(name)] = _pieces(value)
    for optimizer in (model.fused_optimizer, trainer.optimizer):
        for name, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if "embedding_bags" in name and ("momentum" in key or key == "sum"):
                    held[_short(name) + ".state"] = _pieces(value)
    return held | _states_of_row_rules(model, trainer)


def _states_of_row_rules(model: ShardedModel, trainer: Trainer) -> dict[str, Any]:
    """In the order of the plan's shards, as TorchRec lists those of its own optimizers."""
    found = {
        (piece.table, piece.row, piece.column): _on_cpu(piece.tensor.reshape(piece.rows, -1))
        for piece in table_pieces(model, trainer.optimizer)
        if piece.rows and piece.state in ("exp_avg_sq", "sum")
    }
    held: dict[str, Any] = {}
    for name, table in model.planner_plan.tables.items():
        if row_rule(model.table_optimizers[name]) is None:
            continue
        is_replicated = table.sharding_type == "data_parallel"
        here = [s for s in table.shards if is_replicated or s.rank == dist.get_rank()]
        held[f"{name}.state"] = [
            (s.row_offset, s.column_offset, found[name, s.row_offset, s.column_offset])
            if s.rows
            else (s.row_offset, s.column_offset, torch.empty(0, s.columns))
            for s in (here[:1] if is_replicated else here)
        ]
    return held


def _short(name: str) -> str:
    """`embeddings.embedding_bags.narrow.weight` -> `narrow`, `layers.out.bias` -> `out.bias`."""
    if "embedding_bags" in name:
        return name.split(".")[-2]
    return name.removeprefix("layers.")


def _pieces(value: Any) -> list[tuple[int, int, torch.Tensor]]:
    if not hasattr(value, "local_shards"):
        return [(0, 0, _on_cpu(value))]
    pieces = []
    for shard in value.local_shards():
        row, *column = shard.metadata.shard_offsets  # row-wise momentum has one dimension
        pieces.append((row, column[0] if column else 0, _on_cpu(shard.tensor)))
    return pieces


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    """A copy, which training no longer changes and every process can open."""
    return value.detach().to("cpu", copy=True)
