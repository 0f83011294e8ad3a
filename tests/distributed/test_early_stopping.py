"""Evaluation while training: when it stops, what is kept, and that a stopped run goes on alike."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

import shardemb.trainer
from planner import UserError
from shardemb.best_step import BestStep
from shardemb.checkpoint.checkpoints import BEST, Checkpoints
from shardemb.checkpoint.listing import LIST
from shardemb.data.batch import Batch
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.metrics.evaluation import Evaluation
from shardemb.trainer import Validation
from tests.distributed.pool import WorkerPool
from tests.distributed.test_checkpoints import make_trainer, weights_of

pytestmark = pytest.mark.shapes((1, 1), (2, 2))

ROWS, GLOBAL_BATCH, EVERY, PATIENCE = 600, 16, 3, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids below 25 are clicked: mostly in training, less so in the test split. What is learned
    helps at first; the more certain it gets, the less."""
    folder = tmp_path_factory.mktemp("data")
    for split, seed, share in (("train", 0, 0.9), ("test", 1, 0.75)):
        random = np.random.default_rng(seed)
        ids, others = random.integers(0, 50, ROWS), random.integers(0, 11, ROWS)
        labels = ((ids < 25) == (random.random(ROWS) < share)).astype(np.int8)
        (folder / split).mkdir()
        rows = pa.table({"label": labels, "t": ids, "u": others})
        pq.write_table(rows, folder / split / "rows.parquet", row_group_size=20)
    return folder


def train(data: Path, folder: Path, until: int | None, resume: bool) -> dict[str, Any]:
    """Train till it stops by itself or after step `until`; what it comes to."""
    trainer = make_trainer("row_wise", dropout=0.2)
    trainer.best = BestStep("logloss", "min", PATIENCE)
    schema = BatchSchema.for_tables(trainer.model.table_specs)
    size = GLOBAL_BATCH // dist.get_world_size()
    reader = ParquetReader(data / "train", schema, batch_size=size, shuffle=True)
    test = ParquetReader(data / "test", schema, batch_size=size)
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=True)
    if resume:
        loader = checkpoints.load(trainer).loader
        assert loader is not None
        reader.resume(loader)
    seen: dict[int, tuple[float, bool]] = {}
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def note(evaluation: Evaluation, step: int, is_best: bool) -> None:
        seen[step] = evaluation.metrics["logloss"], is_best
        weights[step] = weights_of(trainer)

    trainer.train(
        reader, max_steps=until, checkpoints=checkpoints, checkpoint_every=5,
        validation=Validation(test, EVERY, note),
    )  # fmt: skip
    last, step = weights_of(trainer), trainer.step
    best_step = trainer.best.step
    if checkpoints.best:
        checkpoints.load(trainer, BEST, weights_only=True)
    return {
        "step": step,
        "has_stopped": trainer.has_stopped,
        "best": (best_step, checkpoints.best),
        "seen": seen,
        "last": last,
        "at_best": weights.get(best_step or 0),
        "restored": weights_of(trainer),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_run_stops_and_has_its_best_step(pool: WorkerPool, data: Path, tmp_path: Path) -> None:
    """It stops after as many evaluations as its patience without a better one; the best is kept
    beside the last, whatever keep_last says, and what is restored are its weights."""
    for found in pool.run(train, data, tmp_path, None, False):
        values = {step: value for step, (value, _) in found["seen"].items()}
        assert list(values) == list(range(EVERY, found["step"] + 1, EVERY))
        best = min(values, key=lambda step: values[step])
        assert found["has_stopped"] and found["step"] == best + PATIENCE * EVERY < ROWS / 16
        assert best > EVERY  # it became better before it became worse
        assert found["best"] == (best, f"step-{best:08d}")
        assert same(found["restored"], found["at_best"])
        assert not same(found["restored"], found["last"])
    names = [f"step-{step:08d}" for step in (best, found["step"])]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST, *names]
    assert json.loads((tmp_path / LIST).read_text()) == {"checkpoints": names, "best": names[0]}


@pytest.mark.parametrize("before_end", [2, 7])
def test_a_resumed_run_stops_at_the_same_step(
    pool: WorkerPool, data: Path, tmp_path: Path, before_end: int
) -> None:
    """Stopped within the patience, or before the best: it stops and was best where the run that
    was never stopped did, with the same evaluations and the same bits."""
    whole = pool.run(train, data, tmp_path / "a", None, False)
    until = whole[0]["step"] - before_end
    pool.run(train, data, tmp_path / "b", until, False)
    for one, other in zip(whole, pool.run(train, data, tmp_path / "b", None, True), strict=True):
        assert (one["step"], one["best"]) == (other["step"], other["best"])
        assert other["has_stopped"]
        assert other["seen"] == {s: v for s, v in one["seen"].items() if s > until}
        assert same(one["last"], other["last"]) and same(one["restored"], other["restored"])


def test_a_run_that_has_stopped_stays_so(pool: WorkerPool, data: Path, tmp_path: Path) -> None:
    """Gone on with, it trains no step; its best is still there."""
    first = pool.run(train, data, tmp_path, None, False)
    again = pool.run(train, data, tmp_path, None, True)
    for one, other in zip(first, again, strict=True):
        assert (one["step"], one["best"]) == (other["step"], other["best"])
        assert other["seen"] == {}
        assert same(one["restored"], other["restored"])


def best_of(folder: Path) -> str:
    trainer, checkpoints = make_trainer("row_wise"), Checkpoints(folder)
    checkpoints.save(trainer, trains_on=False)
    with pytest.raises(UserError) as caught:
        checkpoints.load(trainer, BEST)
    return str(caught.value)


def test_no_checkpoint_is_the_best(pool: WorkerPool, tmp_path: Path) -> None:
    """Asked for where none is marked, it says what marks one."""
    for message in pool.run(best_of, tmp_path):
        assert "none of the checkpoints" in message and "checkpoint.keep_best" in message


def speed_by_clock(data: Path) -> list[float]:
    """What is told where a step takes a second and an evaluation a thousand, by another clock."""
    trainer, now = make_trainer("row_wise"), [0.0]
    train_step, evaluate = trainer.train_step, trainer.evaluate

    def slow_step(batch: Batch, following: Batch | None) -> torch.Tensor:
        now[0] += 1
        return train_step(batch, following)

    def slow_evaluation(batches: Iterable[Batch]) -> Evaluation:
        now[0] += 1000
        return evaluate(batches)

    trainer.train_step, trainer.evaluate = slow_step, slow_evaluation  # type: ignore[method-assign]
    schema = BatchSchema.for_tables(trainer.model.table_specs)
    size = GLOBAL_BATCH // dist.get_world_size()
    readers = [ParquetReader(data / name, schema, batch_size=size) for name in ("train", "test")]
    speeds: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardemb.trainer.time, "perf_counter", lambda: now[0])
        trainer.train(
            readers[0], max_steps=20, report_every=1, validation=Validation(readers[1], EVERY),
            report=lambda progress: speeds.append(progress.samples_per_second),
        )  # fmt: skip
    return speeds


def test_evaluation_is_no_time_of_training(pool: WorkerPool, data: Path) -> None:
    """Rows a second are those of the steps alone."""
    for speeds in pool.run(speed_by_clock, data):
        assert len(speeds) == 20
        assert speeds == pytest.approx([GLOBAL_BATCH] * 20)
