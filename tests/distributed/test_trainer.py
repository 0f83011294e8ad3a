"""The trainer's loop: how many steps, what it reports, when it stops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from planner import Plan, PlannerError, ShardingRule, UserError, plan_by_rule
from planner.geometry import SHARDING_TYPES
from shardemb.checkpoint.checkpoints import Checkpoints
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.optimizer_config import DenseOptimizerConfig, ScheduleConfig, TableOptimizerConfig
from shardemb.sharding.shard_model import current_topology, shard_model
from shardemb.sharding.tables import tables_from_module
from shardemb.trainer import Progress, Trainer
from tests.distributed.pool import WorkerPool

ROWS, BATCH_SIZE = 700, 16


class Clicks(torch.nn.Module):
    def __init__(self, dtype: DataType = DataType.FP32) -> None:
        super().__init__()
        config = EmbeddingBagConfig(
            name="t", num_embeddings=50, embedding_dim=4, feature_names=["t"], data_type=dtype
        )
        self.embeddings = EmbeddingBagCollection([config], device="meta")
        self.over = torch.nn.Linear(4, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.over(self.embeddings(batch.sparse)["t"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids below 25 are clicked."""
    path = tmp_path_factory.mktemp("clicks")
    ids = np.random.default_rng(0).integers(0, 50, ROWS)
    rows = pa.table({"label": (ids < 25).astype(np.int8), "t": ids})
    pq.write_table(rows, path / "rows.parquet", row_group_size=20)
    return path


def plan_for(model: torch.nn.Module, sharding_type: str, optimizer: str) -> Plan:
    specs = tables_from_module(model, optimizer=optimizer)
    return plan_by_rule(specs, current_topology(), ShardingRule(sharding_type=sharding_type))


def make_trainer(
    sharding_type: str,
    lr: float = 0.1,
    dtype: str = "FP32",
    optimizer: str = "adagrad",
    schedule: ScheduleConfig | None = None,
) -> Trainer:
    model = Clicks(DataType[dtype])
    tables = TableOptimizerConfig(name=optimizer, lr=lr)
    sharded = shard_model(model, plan_for(model, sharding_type, optimizer), tables)
    return Trainer(sharded, DenseOptimizerConfig(name="sgd", lr=lr), schedule)


def run(folder: Path, lr: float, epochs: int, max_steps: int | None) -> list[Progress]:
    trainer = make_trainer("row_wise", lr)
    schema = BatchSchema.for_tables(tables_from_module(Clicks()))
    reader = ParquetReader(folder, schema, batch_size=BATCH_SIZE, shuffle=True)
    reports: list[Progress] = []
    trainer.train(reader, epochs=epochs, max_steps=max_steps, report_every=5, report=reports.append)
    return reports


@pytest.mark.parametrize(
    ("epochs", "max_steps"), [(1, None), (3, None), (2, 10), (1, 3), (2, 10_000)]
)
def test_steps_and_reports(
    pool: WorkerPool, folder: Path, epochs: int, max_steps: int | None
) -> None:
    """Epochs, or max_steps if that is less; the first step, every fifth and the last are told,
    the same on every rank, with a speed; the loss falls."""
    a_epoch = -(-ROWS // (BATCH_SIZE * pool.world_size))
    # A lane more or less of the rows may need one step more.
    steps = min(epochs * a_epoch, max_steps or epochs * a_epoch)
    first, *others = pool.run(run, folder, 0.1, epochs, max_steps)
    last = first[-1].step
    assert abs(last - steps) <= (0 if max_steps == steps else epochs)
    assert [p.step for p in first] == sorted({1, *range(5, last + 1, 5), last})
    if max_steps is None:
        assert first[-1].samples == epochs * ROWS
    assert all(p.samples_per_second > 0 for p in first)
    if epochs == 3 and pool.world_size < 4:
        assert first[-1].train_loss < 0.6 < first[0].train_loss
    for other in others:
        assert [p.train_loss for p in other] == [p.train_loss for p in first]


def failure_of(folder: Path, lr: float) -> str:
    with pytest.raises(UserError) as caught:
        run(folder, lr, 1, None)
    return str(caught.value)


def test_a_loss_that_is_no_number_stops_all_ranks(pool: WorkerPool, folder: Path) -> None:
    """Every rank raises the same error, which names step, loss and the keys to lower."""
    first, *others = pool.run(failure_of, folder, 1e38)
    assert "at step" in first
    assert "train.table_optimizer.lr" in first
    assert all(other == first for other in others)


class Poisoned(Clicks):
    """No number for the batch that has the id 49."""

    def forward(self, batch: Batch) -> torch.Tensor:
        bad = (batch.sparse.values() == 49).any()
        return super().forward(batch) * torch.where(bad, torch.nan, 1.0)


def poison(folder: Path, checkpoints: Path, shuffle: bool) -> tuple[str, int]:
    """What training says of it, and the step of the batch that has the id."""
    model = Poisoned()
    sharded = shard_model(
        model, plan_for(model, "row_wise", "sgd"), TableOptimizerConfig(name="sgd")
    )
    trainer = Trainer(sharded, DenseOptimizerConfig(name="sgd"))
    schema = BatchSchema.for_tables(trainer.model.table_specs)
    options: dict[str, Any] = {"shuffle": shuffle, "seed": 1}
    size = BATCH_SIZE * dist.get_world_size()
    whole = ParquetReader(folder, schema, batch_size=size, rank=0, world_size=1, **options)
    steps = [bool((batch.sparse.values() == 49).any()) for batch in whole.epoch()]
    reader = ParquetReader(folder, schema, batch_size=BATCH_SIZE, **options)
    with pytest.raises(UserError) as caught:
        trainer.train(reader, checkpoints=Checkpoints(checkpoints), checkpoint_every=2)
    return str(caught.value), steps.index(True) + 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loss_that_is_no_number_names_its_rows(
    pool: WorkerPool, tmp_path: Path, shuffle: bool
) -> None:
    """The step, though reports are rare; the files and rows of its batch, or their row groups;
    the last checkpoint from before it."""
    ids = np.random.default_rng(0).integers(0, 49, ROWS)
    ids[633] = 49
    rows = pa.table({"label": np.zeros(ROWS, np.int8), "t": ids})
    (tmp_path / "data").mkdir()
    pq.write_table(rows, tmp_path / "data" / "rows.parquet", row_group_size=20)
    for message, step in pool.run(poison, tmp_path / "data", tmp_path / "kept", shuffle):
        assert f"no finite number at step {step}:" in message
        if shuffle:
            assert "rows.parquet, row group 31" in message  # of rows 620 to 639
        else:
            ranges = re.findall(r"rows\.parquet, rows (\d+) to (\d+)", message)
            assert any(int(first) <= 633 <= int(last) for first, last in ranges)
            size = BATCH_SIZE * pool.world_size
            assert sum(int(last) - int(first) + 1 for first, last in ranges) <= size
        before = (step - 1) // 2 * 2
        name = f"step-{before:08d}" if before else "there is no checkpoint yet"
        assert name in message


def losses_without_learning(folder: Path) -> tuple[float, int]:
    """The mean loss that is told over an epoch at a learning rate of zero, and its rows."""
    torch.manual_seed(0)
    trainer, total, seen = make_trainer("row_wise", lr=0.0), 0.0, 0
    schema = BatchSchema.for_tables(trainer.model.table_specs)
    reader = ParquetReader(folder, schema, batch_size=BATCH_SIZE, shuffle=True, skip_damaged=True)
    reports: list[Progress] = []
    trainer.train(reader, report_every=1, report=reports.append)
    for report in reports:
        total += report.train_loss * (report.samples - seen)
        seen = report.samples
    return total / seen, seen


def test_rows_left_out_have_no_part_in_the_mean(
    pool: WorkerPool, folder: Path, tmp_path: Path
) -> None:
    """With row groups damaged and left out, on whichever rank, loss and rows are those of data that
    never had them."""
    rows = pq.read_table(folder / "rows.parquet")
    path = tmp_path / "damaged" / "rows.parquet"
    path.parent.mkdir()
    options = {"row_group_size": 20, "write_page_checksum": True, "use_dictionary": False}
    pq.write_table(rows, path, compression="none", **options)
    content, damaged = bytearray(path.read_bytes()), [0, 7, 8, 33]
    for group in damaged:
        column = pq.read_metadata(path).row_group(group).column(1)
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    left = [row for row in range(ROWS) if row // 20 not in damaged]
    (tmp_path / "whole").mkdir()
    pq.write_table(rows.take(left), tmp_path / "whole" / "rows.parquet", row_group_size=20)
    whole = pool.run(losses_without_learning, tmp_path / "whole")
    for found, expected in zip(pool.run(losses_without_learning, path.parent), whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
        assert found[1] == len(left)


def weights_after_training(folder: Path, sharding_type: str) -> bool:
    trainer = make_trainer(sharding_type, dtype="FP16", optimizer="rowwise_adagrad")
    schema = BatchSchema.for_tables(tables_from_module(Clicks()))
    trainer.train(ParquetReader(folder, schema, batch_size=BATCH_SIZE))
    state = trainer.model.state_dict()["embeddings.embedding_bags.t.weight"]
    return all(bool(shard.tensor.isfinite().all()) for shard in state.local_shards())


def refusal(sharding_type: str, dtype: str, optimizer: str) -> str:
    with pytest.raises(PlannerError) as caught:
        make_trainer(sharding_type, dtype=dtype, optimizer=optimizer)
    return str(caught.value)


def test_half_precision_tables(pool: WorkerPool, folder: Path) -> None:
    """fp16 tables train to finite values where they are sharded; what would be NaN or has no
    kernel is refused with its table's name."""
    for sharding_type in SHARDING_TYPES:
        if sharding_type != "data_parallel":
            assert all(pool.run(weights_after_training, folder, sharding_type))
    for message in pool.run(refusal, "data_parallel", "FP16", "rowwise_adagrad"):
        assert "table t" in message
        assert "use fp32 or another sharding type" in message
    for message in pool.run(refusal, "table_wise", "BF16", "sgd"):
        assert "no bf16 kernels for CPU" in message


SCHEDULE = ScheduleConfig(name="polynomial", warmup_steps=3, power=1.0)
RATES = [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]  # of five steps; the sixth's is zero


def weights_with_schedule(folder: Path, sharding_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank has of the table after six steps, and the same rows of plain PyTorch."""
    trainer = make_trainer(sharding_type, optimizer="sgd", schedule=SCHEDULE)
    first = whole_table(trainer)
    schema = BatchSchema.for_tables(trainer.model.table_specs)
    layer = torch.nn.Linear(4, 1)
    layer.load_state_dict({n: p.clone() for n, p in trainer.model.module.over.state_dict().items()})
    trainer.train(ParquetReader(folder, schema, batch_size=BATCH_SIZE), max_steps=6)

    table = first.clone().requires_grad_()
    size = BATCH_SIZE * dist.get_world_size()
    reader = ParquetReader(folder, schema, batch_size=size, rank=0, world_size=1)
    optimizer = torch.optim.SGD([table, *layer.parameters()], lr=0.1)
    for rate, batch in zip([*RATES, 0.0], reader.epoch(), strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 * rate
        logits = layer(table[batch.sparse.values()])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return whole_table(trainer), table.detach()


def whole_table(trainer: Trainer) -> torch.Tensor:
    """Summed over ranks, each of which has a part."""
    whole = torch.zeros(50, 4)
    state = trainer.model.state_dict()["embeddings.embedding_bags.t.weight"]
    if isinstance(state, torch.Tensor) and not hasattr(state, "local_shards"):
        return state.detach().clone()
    for shard in state.local_shards():
        row, column = shard.metadata.shard_offsets
        rows, columns = shard.tensor.shape
        whole[row : row + rows, column : column + columns] = shard.tensor.detach()
    dist.all_reduce(whole)
    return whole


@pytest.mark.parametrize("sharding_type", ["row_wise", "data_parallel"])
def test_schedules_drive_all_optimizers(pool: WorkerPool, folder: Path, sharding_type: str) -> None:
    """Tables inside backward, replicated ones and dense layers learn at the rates of each step:
    the weights are those of plain PyTorch with its rates set by hand."""
    for found, expected in pool.run(weights_with_schedule, folder, sharding_type):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def adam_moves(folder: Path, sharding_type: str) -> list[float]:
    """How far the tables' Adam goes in each of six steps at most."""
    trainer = make_trainer(sharding_type, optimizer="adam", schedule=SCHEDULE)
    schema, moves = BatchSchema.for_tables(trainer.model.table_specs), []
    reader = ParquetReader(folder, schema, batch_size=BATCH_SIZE)
    for batch, step in zip(reader.epoch(), range(1, 7), strict=False):
        before = whole_table(trainer)
        trainer.rates.set(step, 6)
        trainer.train_step(batch)
        moves.append(float((whole_table(trainer) - before).abs().max()))
    return moves


@pytest.mark.parametrize("sharding_type", ["row_wise", "data_parallel"])
def test_schedules_drive_adam(pool: WorkerPool, folder: Path, sharding_type: str) -> None:
    """Its first step is as long as the learning rate, which the first step's is a third of; its
    last step's rate is zero, and nothing moves."""
    for moves in pool.run(adam_moves, folder, sharding_type):
        assert moves[0] == pytest.approx(0.1 / 3, rel=1e-4)
        assert all(move > 0 for move in moves[:5])
        assert moves[5] == 0
