"""Runs that go on from a checkpoint, and checkpoints that cannot be written or loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from planner import ShardingRule, UserError, plan_by_rule
from shardemb.checkpoint.checkpoints import Checkpoints
from shardemb.checkpoint.listing import LIST
from shardemb.checkpoint.store import Store
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.optimizer_config import (
    DenseOptimizerConfig,
    FreezeConfig,
    GradientClippingConfig,
    TableOptimizerConfig,
)
from shardemb.precision_config import CommunicationConfig, PrecisionConfig
from shardemb.sharding.shard_model import current_topology, shard_model
from shardemb.sharding.tables import tables_from_module
from shardemb.trainer import Progress, Trainer
from tests.distributed.pool import WorkerPool

ROWS, GLOBAL_BATCH, EPOCHS = 330, 16, 2  # the last step of an epoch is not full
TABLES = {"t": 50, "u": 11}
MIXED = {
    "t": TableOptimizerConfig(name="adam", weight_decay=0.1, max_gradient=0.01),
    "u": TableOptimizerConfig(name="partial_rowwise_lamb", lr=0.05),
}


class Clicks(torch.nn.Module):
    """With dropout, so that random states matter."""

    def __init__(self, rows: dict[str, int], dropout: float) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(
                name=name, num_embeddings=size, embedding_dim=8, feature_names=[name]
            )
            for name, size in rows.items()
        ]
        self.embeddings = EmbeddingBagCollection(configs, device="meta")
        self.dropout = torch.nn.Dropout(dropout)
        self.over = torch.nn.Linear(8 * len(rows), 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        pooled = self.embeddings(batch.sparse)
        values = [pooled[name] for name in TABLES if name in pooled.keys()]  # noqa: SIM118
        return self.over(self.dropout(torch.cat(values, dim=1)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clicks")
    random = np.random.default_rng(0)
    ids = random.integers(0, 50, ROWS)
    rows = pa.table(
        {"label": (ids < 25).astype(np.int8), "t": ids, "u": random.integers(0, 11, ROWS)}
    )
    pq.write_table(rows, path / "rows.parquet", row_group_size=20)
    return path


def make_trainer(
    sharding_type: str, dropout: float = 0.0, rows: dict[str, int] | None = None,
    optimizer: str = "adagrad", dense: str = "adam", is_mixed: bool = False,
) -> Trainer:  # fmt: skip
    """`is_mixed`: all that changes how tables and dense parameters are trained, at once."""
    torch.manual_seed(3)
    model = Clicks(rows or TABLES, dropout)
    specs = tables_from_module(model, optimizer=optimizer)
    plan = plan_by_rule(specs, current_topology(), ShardingRule(sharding_type=sharding_type))
    tables = TableOptimizerConfig(name=optimizer, lr=0.1)
    dense_config = DenseOptimizerConfig(name=dense, lr=0.05)
    if not is_mixed:
        return Trainer(shard_model(model, plan, tables, deterministic=True), dense_config)
    specs = [spec.model_copy(update={"optimizer": MIXED[spec.name].name}) for spec in specs]
    sharded = shard_model(
        model,
        plan_by_rule(specs, current_topology(), ShardingRule(sharding_type=sharding_type)),
        table_optimizers=MIXED,
        frozen={"t": FreezeConfig(until_epoch=1), "u": FreezeConfig(from_step=4, until_step=9)},
        communication=CommunicationConfig(forward="fp16", backward="fp16"),
        deterministic=True,
    )
    return Trainer(
        sharded,
        dense_config,
        gradient_clipping=GradientClippingConfig(norm=0.1),
        precision=PrecisionConfig(dense="bf16"),
    )


def make_reader(data: Path, trainer: Trainer) -> ParquetReader:
    schema = BatchSchema.for_tables(trainer.model.table_specs)
    size = GLOBAL_BATCH // dist.get_world_size()
    return ParquetReader(data, schema, batch_size=size, shuffle=True)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in trainer.model.state_dict().items():
        is_sharded = hasattr(value, "local_shards")
        tensors = [shard.tensor for shard in value.local_shards()] if is_sharded else [value]
        for number, tensor in enumerate(tensors):
            found[f"{name}/{number}"] = tensor.detach().clone()
    return found


def train(
    data: Path,
    folder: Path,
    sharding_type: str,
    *,
    resume: bool = False,
    until: int | None = None,
    dropout: float = 0.0,
    asynchronous: bool = True,
    is_mixed: bool = False,
) -> tuple[list[Progress], dict[str, torch.Tensor], list[str]]:
    """Reports, the rank's weights at the end, and the checkpoints there are."""
    trainer = make_trainer(sharding_type, dropout, is_mixed=is_mixed)
    reader = make_reader(data, trainer)
    checkpoints = Checkpoints(folder, keep_last=3, asynchronous=asynchronous)
    if resume:
        loader = checkpoints.load(trainer).loader
        assert loader is not None
        reader.resume(loader)
    reports: list[Progress] = []
    trainer.train(
        reader, epochs=EPOCHS, max_steps=until, report_every=1, report=reports.append,
        checkpoints=checkpoints, checkpoint_every=4,
    )  # fmt: skip
    assert checkpoints.names is not None
    return reports, weights_of(trainer), checkpoints.names


# --- Going on


@pytest.mark.parametrize(
    ("stop", "asynchronous"), [(7, True), (21, False), (30, True)], ids=["7", "21-streaming", "30"]
)
@pytest.mark.parametrize("sharding_type", ["column_wise", "data_parallel", "row_wise"])
def test_a_stopped_run_equals_one_never_stopped(
    pool: WorkerPool, data: Path, tmp_path: Path, sharding_type: str, stop: int, asynchronous: bool
) -> None:
    """Losses, counts and weights are the same to the last bit, with dropout drawn in every step,
    whether it stopped within an epoch, at its end, or in the next; checkpoints are kept as asked
    for."""
    check_stopped(pool, data, tmp_path, sharding_type, stop, {"asynchronous": asynchronous})


@pytest.mark.parametrize("sharding_type", ["table_wise", "data_parallel", "row_wise"])
@pytest.mark.parametrize("started_pool", [(2, 2)], indirect=True)
def test_so_does_one_with_every_setting(
    pool: WorkerPool, data: Path, tmp_path: Path, sharding_type: str
) -> None:
    """The same with an optimizer for each table, one frozen for an epoch and one when the run
    stops, clipped gradients, a dense part in bf16 and embeddings sent in fp16."""
    check_stopped(pool, data, tmp_path, sharding_type, 7, {"is_mixed": True})


def check_stopped(
    pool: WorkerPool,
    data: Path,
    tmp_path: Path,
    sharding_type: str,
    stop: int,
    options: dict[str, Any],
) -> None:
    options = {"dropout": 0.3, **options}
    whole = pool.run(run_with, data, tmp_path / "a", sharding_type, options)
    pool.run(run_with, data, tmp_path / "b", sharding_type, {**options, "until": stop})
    rest = pool.run(run_with, data, tmp_path / "b", sharding_type, {**options, "resume": True})
    for (reports, weights, names), (late, same, same_names) in zip(whole, rest, strict=True):
        by_step = {report.step: report for report in reports}
        assert [report.step for report in late] == list(range(stop + 1, reports[-1].step + 1))
        for report in late:
            expected = by_step[report.step]
            assert (report.train_loss, report.samples) == (expected.train_loss, expected.samples)
        assert weights.keys() == same.keys()
        assert all(torch.equal(weights[name], same[name]) for name in weights)
        assert len(names) == 3
        assert names[-1] == same_names[-1] == f"step-{reports[-1].step:08d}"
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [LIST, *names]
    assert reports[-1].samples == EPOCHS * ROWS


def run_with(data: Path, folder: Path, sharding_type: str, options: dict[str, Any]) -> Any:
    return train(data, folder, sharding_type, **options)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    started = {world_size: WorkerPool(world_size, world_size) for world_size in (1, 2, 4)}
    yield started
    for each in started.values():
        each.close()


def test_other_ranks_and_plans_go_on_with_the_same_losses(
    pools: dict[int, WorkerPool], data: Path, tmp_path: Path
) -> None:
    """A run on two ranks, stopped within its first epoch and gone on with on one, two and four
    ranks and other sharding types, has the losses of the run never stopped, to 1e-4."""
    whole = pools[2].run(run_with, data, tmp_path / "a", "row_wise", {})
    pools[2].run(run_with, data, tmp_path / "b", "row_wise", {"until": 9})
    expected = {report.step: report.train_loss for report in whole[0][0]}
    for world_size, sharding_type in [
        *((1, "table_wise"), (1, "data_parallel"), (2, "column_wise"), (2, "grid_shard")),
        *((4, "row_wise"), (4, "data_parallel"), (4, "table_row_wise")),
    ]:
        folder = tmp_path / f"{world_size}-{sharding_type}"
        shutil.copytree(tmp_path / "b", folder)
        results = pools[world_size].run(run_with, data, folder, sharding_type, {"resume": True})
        found = {report.step: report.train_loss for report in results[0][0]}
        assert found.keys() == {step for step in expected if step > 9}
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=1e-4), (world_size, sharding_type)


# --- What cannot be loaded


def refusal(folder: Path, rows: dict[str, int], optimizer: str, name: str | None) -> str:
    trainer = make_trainer("table_wise", rows=rows, optimizer=optimizer, dense="adagrad")
    before = weights_of(trainer)
    with pytest.raises(UserError) as caught:
        Checkpoints(folder).load(trainer, name)
    assert all(torch.equal(before[key], value) for key, value in weights_of(trainer).items())
    return str(caught.value)


def test_a_checkpoint_of_another_model(pool: WorkerPool, data: Path, tmp_path: Path) -> None:
    """All differences are listed, and nothing is loaded."""
    pool.run(run_with, data, tmp_path, "table_wise", {"until": 2})
    others = {"t": 51, "v": 4, "w": 4}
    for message in pool.run(refusal, tmp_path, others, "sgd", None):
        assert "step-00000002 is not of this model" in message
        assert "table t: 50 rows of 8 in the checkpoint, 51 rows of 8 here" in message
        assert "table t: trained with adagrad, and with sgd here" in message
        assert "table u: in the checkpoint, not in the model" in message
        assert "dense parameters: trained with adam, and with adagrad here" in message
        assert "table v: not in the checkpoint" in message
        assert "over.weight: shape [1, 16] in the checkpoint, shape [1, 24] here" in message


def test_the_one_before_a_damaged_checkpoint_is_offered(
    pool: WorkerPool, data: Path, tmp_path: Path
) -> None:
    """Each file, when a byte of it changes, is named with the part of the model that it hits; the
    one before is offered, and loads."""
    pool.run(run_with, data, tmp_path, "row_wise", {"until": 10})
    newest = tmp_path / "step-00000010"
    for path in sorted(newest.iterdir()):
        data_bytes = path.read_bytes()
        path.write_bytes(data_bytes[:-30] + bytes([data_bytes[-30] ^ 1]) + data_bytes[-29:])
        messages = [
            message for message in pool.run(damage_of, tmp_path) if message
        ]  # a rank reads what it needs of it
        assert messages
        for message in messages:
            assert path.name in message and "is damaged" in message
            assert "checkpoint.resume=step-00000008" in message
        path.write_bytes(data_bytes)
    assert not any(pool.run(damage_of, tmp_path))


def damage_of(folder: Path) -> str | None:
    trainer = make_trainer("row_wise")
    checkpoints = Checkpoints(folder)
    try:
        checkpoints.load(trainer)
    except UserError as error:
        checkpoints.load(trainer, "step-00000008")
        return str(error)
    return None


# --- What cannot be written


def fill_the_disk(data: Path, folder: Path, broken: str) -> tuple[str, list[str] | None]:
    """Train with a disk that is full when a rank has written one checkpoint's `broken` files."""
    # Rank 0 alone writes JSON: two files for each checkpoint.
    writer, fitting = (0, 2) if broken == "json" else (dist.get_world_size() - 1, 1)
    written, write = [], Store.write

    def failing(self: Store, name: str, parts: Any) -> None:
        if broken in name and dist.get_rank() == writer:
            written.append(name)
            if len(written) > fitting:
                raise OSError(28, "No space left on device")
        write(self, name, parts)

    Store.write = failing  # type: ignore[method-assign]
    try:
        trainer = make_trainer("row_wise")
        reader, checkpoints = make_reader(data, trainer), Checkpoints(folder)
        with pytest.raises(UserError) as caught:
            trainer.train(reader, epochs=2, checkpoints=checkpoints, checkpoint_every=3)
        return str(caught.value), checkpoints.names
    finally:
        Store.write = write  # type: ignore[method-assign]


@pytest.mark.parametrize("broken", ["safetensors", "json"])
def test_a_full_disk(pool: WorkerPool, data: Path, tmp_path: Path, broken: str) -> None:
    """Whichever rank and file meets it, all ranks say so and name the last good checkpoint, which
    is still the newest; nothing is left of the one that failed."""
    for message, names in pool.run(fill_the_disk, data, tmp_path, broken):
        assert "cannot write a checkpoint" in message
        assert "No space left on device" in message
        assert f"the last good one is {tmp_path}/step-00000003" in message
        assert names == ["step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST, "step-00000003"]
    assert json.loads((tmp_path / LIST).read_text()) == {"checkpoints": ["step-00000003"]}
    assert not any(pool.run(loads, tmp_path))


def loads(folder: Path) -> None:
    trainer = make_trainer("column_wise")
    assert Checkpoints(folder).load(trainer).step == trainer.step == 3


def earlier_refused(data: Path, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        train(data, folder, "row_wise", until=3)
    return str(caught.value)


def test_a_new_run_leaves_the_checkpoints_of_another(
    pool: WorkerPool, data: Path, tmp_path: Path
) -> None:
    pool.run(run_with, data, tmp_path, "row_wise", {"until": 2})
    for message in pool.run(earlier_refused, data, tmp_path):
        assert "holds checkpoints of an earlier run, the last is step-00000002" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST, "step-00000002"]


def threads_after(folder: Path) -> list[int]:
    counts = []
    for _ in range(6):
        Checkpoints(folder).find()
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def test_checkpoints_take_threads_once(pool: WorkerPool, tmp_path: Path) -> None:
    for counts in pool.run(threads_after, tmp_path):
        assert counts[-1] == counts[0]


def copies_taken(data: Path, folder: Path) -> tuple[int, int]:
    """Tensors of the copy after a run with one checkpoint, at its end, and with one before."""
    trainer, counts = make_trainer("row_wise"), []
    for every in (None, 2):
        checkpoints = Checkpoints(folder / str(every))
        trainer.train(
            make_reader(data, trainer), max_steps=trainer.step + 3, checkpoints=checkpoints,
            checkpoint_every=every,
        )  # fmt: skip
        assert checkpoints._stage is not None
        counts.append(len(checkpoints._stage._buffers))
    return counts[0], counts[1]


def test_the_last_checkpoint_takes_no_copy(pool: WorkerPool, data: Path, tmp_path: Path) -> None:
    """After it nothing trains, so that a copy would be memory for nothing."""
    for at_the_end, before in pool.run(copies_taken, data, tmp_path):
        assert at_the_end == 0
        assert before > 0


def trains_on_from_weights(data: Path, folder: Path) -> tuple[int, bool]:
    """The step after loading weights alone and training one step, and whether it moved them."""
    trainer = make_trainer("row_wise", dense="adagrad")
    Checkpoints(folder).load(trainer, weights_only=True)
    before = weights_of(trainer)
    trainer.train(make_reader(data, trainer), max_steps=1)
    after = weights_of(trainer)
    return trainer.step, not torch.equal(before["over.weight/0"], after["over.weight/0"])


def test_weights_alone_leave_the_optimizers_as_they_are(
    pool: WorkerPool, data: Path, tmp_path: Path
) -> None:
    """So that training begins anew from them, with any optimizer, at step one."""
    pool.run(run_with, data, tmp_path, "table_wise", {"until": 2})
    assert set(pool.run(trains_on_from_weights, data, tmp_path)) == {(1, True)}
