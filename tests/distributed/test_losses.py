"""Every loss trains, on any number of ranks, what plain PyTorch trains on all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, softplus
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from planner import ShardingRule, plan_by_rule
from shardemb.checkpoint.checkpoints import Checkpoints
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema, LabelSchema
from shardemb.models.mlp import MLP, Norm
from shardemb.optimizer_config import DenseOptimizerConfig, TableOptimizerConfig
from shardemb.sharding.shard_model import current_topology, shard_model
from shardemb.sharding.tables import tables_from_module
from shardemb.tasks import Task, num_outputs
from shardemb.trainer import Trainer
from tests.distributed.pool import WorkerPool
from tests.distributed.test_trainer import whole_table

ROWS, GLOBAL_BATCH = 70, 32  # the last of three steps is not full
RATE = 0.5

CLICK = Task("click", "binary_cross_entropy", ("click",))
TAGS = Task("tags", "binary_cross_entropy", ("click", "tag"), weight=0.5)
GENRE = Task("genre", "cross_entropy", ("genre",), num_classes=3, weight=2.0)
STARS = Task("stars", "mse", ("stars",), weight=0.25)
PRICE = Task("price", "mae", ("stars", "tag"))
ORDER = Task("order", "bpr", ("genre",), weight=3.0)
LIST = Task("list", "listwise_softmax", ("genre",))
ALL = (TAGS, GENRE, STARS, PRICE, ORDER, LIST)

# Of outputs and labels [rows, columns] and groups [rows]; loops and pairs, not what is tested.
Reference = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plain_bpr(outputs: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    losses = [
        softplus(outputs[j, 0] - outputs[i, 0])
        for i in range(len(groups))
        for j in range(len(groups))
        if groups[i] == groups[j] and labels[i, 0] > labels[j, 0]
    ]
    return torch.stack(losses).mean()


def plain_list(outputs: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    losses = []
    for group in groups.unique():
        scores, relevance = outputs[groups == group, 0], labels[groups == group, 0]
        if relevance.sum() > 0:
            losses.append(-(relevance / relevance.sum() * log_softmax(scores, 0)).sum())
    return torch.stack(losses).mean()


PLAIN: dict[str, Reference] = {
    "binary_cross_entropy": lambda x, y, g: binary_cross_entropy_with_logits(x, y),
    "cross_entropy": lambda x, y, g: -log_softmax(x, 1)[range(len(x)), y[:, 0].long()].mean(),
    "mse": lambda x, y, g: ((x - y) ** 2).mean(),
    "mae": lambda x, y, g: (x - y).abs().mean(),
    "bpr": plain_bpr,
    "listwise_softmax": plain_list,
}


class Net(torch.nn.Module):
    def __init__(self, outputs: int, norm: Norm | None) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name="t", num_embeddings=50, embedding_dim=4, feature_names=["t"]
        )
        self.embeddings = EmbeddingBagCollection([config], device="meta")
        self.hidden = MLP(4, [6], norm=norm)
        self.over = torch.nn.Linear(6, outputs)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.over(self.hidden(self.embeddings(batch.sparse)["t"], batch.mask))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of about ten rows, which come one at a time, so that ranks share them."""
    path, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    columns = {
        "t": random.integers(0, 50, ROWS),
        "click": random.integers(0, 2, ROWS),
        "tag": random.random(ROWS),
        "genre": random.integers(0, 3, ROWS),
        "stars": random.normal(size=ROWS) * 3,
        "user": [f"user {n}" for n in random.integers(0, 7, ROWS)],
    }
    pq.write_table(pa.table(columns), path / "rows.parquet", row_group_size=10)
    return path


def make_trainer(tasks: tuple[Task, ...], norm: Norm | None = None, seed: int = 5) -> Trainer:
    torch.manual_seed(seed)
    model = Net(num_outputs(tasks), norm)
    specs = tables_from_module(model, optimizer="sgd")
    plan = plan_by_rule(specs, current_topology(), ShardingRule(sharding_type="row_wise"))
    sharded = shard_model(model, plan, TableOptimizerConfig(name="sgd", lr=RATE))
    return Trainer(sharded, DenseOptimizerConfig(name="sgd", lr=RATE), tasks=tasks)


def make_schema(trainer: Trainer) -> BatchSchema:
    labels = tuple(
        LabelSchema(name, *task.label_range) for task in trainer.tasks for name in task.labels
    )
    schema = BatchSchema.for_tables(trainer.model.table_specs, label=labels)
    return BatchSchema(schema.label, features=schema.features, group="user")


def train(
    folder: Path, tasks: tuple[Task, ...], norm: Norm | None
) -> tuple[Trainer, list[float], dict[str, torch.Tensor]]:
    """The trainer after an epoch, the losses that its steps tell, and its first weights."""
    trainer = make_trainer(tasks, norm)
    first = weights_of(trainer)
    size = GLOBAL_BATCH // dist.get_world_size()
    losses = []
    for batch in ParquetReader(folder, make_schema(trainer), batch_size=size).epoch():
        loss = trainer.train_step(batch)
        dist.all_reduce(loss)
        losses.append(loss.item() / batch.global_rows)
    return trainer, losses, first


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    dense = {
        name: value.detach().clone()
        for name, value in trainer.model.state_dict().items()
        if "embedding_bags" not in name
    }
    return {"t": whole_table(trainer), **dense}


def check(folder: Path, tasks: tuple[Task, ...], norm: Norm | None) -> None:
    """Losses and weights, buffers too, are those of plain PyTorch."""
    trainer, losses, first = train(folder, tasks, norm)
    table = first.pop("t").requires_grad_()
    norms = {"batch": torch.nn.BatchNorm1d, "layer": torch.nn.LayerNorm}
    plain = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(4, 6),
            "norm": norms[norm](6) if norm else torch.nn.Identity(),
            "over": torch.nn.Linear(6, num_outputs(tasks)),
        }
    )
    ours = {name.replace("hidden.layers.0.", ""): name for name in first}
    plain.load_state_dict({name: first[own] for name, own in ours.items()}, strict=False)
    optimizer = torch.optim.SGD([table, *plain.parameters()], lr=RATE)
    options = {"batch_size": GLOBAL_BATCH, "rank": 0, "world_size": 1}
    reader = ParquetReader(folder, make_schema(trainer), **options)
    for step, batch in enumerate(reader.epoch()):
        rows = batch.mask > 0
        hidden = plain["norm"](plain["linear"](table[batch.sparse.values()])).relu()
        outputs, loss = plain["over"](hidden), torch.zeros(())
        labels, groups = batch.labels.view(GLOBAL_BATCH, -1)[rows], batch.groups[rows]
        for task in tasks:
            x, outputs = outputs.tensor_split([task.num_outputs], dim=1)
            y, labels = labels.tensor_split([len(task.labels)], dim=1)
            loss = loss + task.weight * PLAIN[task.loss](x, y, groups)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = weights_of(trainer)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(after["t"], table.detach(), **close)
    for name, value in plain.state_dict().items():
        if name in ours:
            torch.testing.assert_close(after[ours[name]], value, **close)
    assert not torch.equal(after["over.weight"], first["over.weight"])


@pytest.mark.parametrize(
    "tasks", [(CLICK,), *((task,) for task in ALL), ALL], ids=lambda t: "-".join(x.name for x in t)
)
def test_losses_are_of_all_ranks_rows(
    pool: WorkerPool, folder: Path, tasks: tuple[Task, ...]
) -> None:
    """Alone and summed with weights, on rows whose groups lie on several ranks and a step that is
    not full: losses and weights are those of plain PyTorch on whole batches."""
    pool.run(check, folder, tasks, None)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_norms_are_of_all_ranks_rows(pool: WorkerPool, folder: Path, norm: Norm) -> None:
    """Batch norm has the statistics of a step's rows on all ranks, without padding: weights and
    running statistics are those of nn.BatchNorm1d on whole batches. So for layer norm."""
    pool.run(check, folder, (STARS,), norm)


def buffers_after_loading(folder: Path, place: Path) -> list[tuple[bool, float]]:
    """Whether running statistics come along in a checkpoint; what they evaluate to."""
    trainer, _, first = train(folder, (STARS,), "batch")
    Checkpoints(place).save(trainer, trains_on=False)
    loaded = make_trainer((STARS,), "batch", seed=6)
    Checkpoints(place).load(loaded, weights_only=True)
    found = []
    for each in (trainer, loaded):
        reader = ParquetReader(folder, make_schema(each), batch_size=8)
        name = "hidden.layers.0.norm.running_var"
        is_trained = not torch.equal(weights_of(each)[name], first[name])
        found.append((is_trained, each.evaluate(reader.epoch()).metrics["mse"]))
    return found


def test_checkpoints_hold_running_statistics(
    pool: WorkerPool, folder: Path, tmp_path: Path
) -> None:
    """A model that was loaded evaluates as the one that was saved, on all ranks alike."""
    found = pool.run(buffers_after_loading, folder, tmp_path)
    (own, again), *_ = found
    assert own == again and own[0]
    assert all(rank == found[0] for rank in found)
