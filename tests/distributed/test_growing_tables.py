"""Checkpoints whose tables have fewer rows than the model's: rows are added, none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from planner import UserError
from planner.geometry import SHARDING_TYPES
from shardemb.best_step import BestStep
from shardemb.checkpoint.checkpoints import Checkpoints
from shardemb.checkpoint.contents import find, table_chunks
from shardemb.checkpoint.piece import WEIGHT
from shardemb.checkpoint.state import table_pieces
from shardemb.trainer import Trainer
from tests.distributed.pool import WorkerPool
from tests.distributed.test_checkpoints import TABLES, make_reader, make_trainer

GROWN = {"t": 120, "u": 11}  # cut by rows on two ranks, the second has none of t's 50
STEPS = 3
OPTIMIZERS = {"adagrad": ["sum"], "rowwise_adagrad": ["sum"], "adam": ["exp_avg", "exp_avg_sq"]}
# Column shards of rowwise_adagrad have sums of their own, which tests of resharding are about.
PAIRS = [
    ("data_parallel", "row_wise", 2, 1, "adam"),
    ("table_row_wise", "data_parallel", 1, 2, "rowwise_adagrad"),
    *((kind, kind, 2, 2, "adam") for kind in SHARDING_TYPES),
    *(("table_wise", kind, 1, 2, "adagrad") for kind in SHARDING_TYPES),
    *(("column_wise", kind, 2, 1, "adagrad") for kind in SHARDING_TYPES),
]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, WorkerPool]]:
    started = {world_size: WorkerPool(world_size, world_size) for world_size in (1, 2)}
    yield started
    for each in started.values():
        each.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, random = tmp_path_factory.mktemp("clicks"), np.random.default_rng(0)
    columns = {name: random.integers(0, rows, 200) for name, rows in TABLES.items()}
    rows = pa.table({"label": random.integers(0, 2, 200), **columns})
    pq.write_table(rows, path / "rows.parquet", row_group_size=20)
    return path


def train_and_save(data: Path, folder: Path, kind: str, optimizer: str) -> None:
    trainer = make_trainer(kind, optimizer=optimizer)
    reader = make_reader(data, trainer)
    trainer.train(reader, max_steps=STEPS, checkpoints=Checkpoints(folder))


def pieces_of(trainer: Trainer) -> list[tuple[str, str, int, int, torch.Tensor]]:
    return [
        (piece.table, piece.state, piece.row, piece.column, piece.tensor.detach().clone())
        for piece in table_pieces(trainer.model, trainer.optimizer)
    ]


def grow_and_train(data: Path, folder: Path, kind: str, optimizer: str) -> Any:
    """Tables of a fresh model, after it is loaded, and after one more step, saved anew."""
    trainer = make_trainer(kind, rows=GROWN, optimizer=optimizer)
    before = pieces_of(trainer)
    reader, checkpoints = make_reader(data, trainer), Checkpoints(folder)
    loader = checkpoints.load(trainer, grow_tables=True).loader
    assert loader is not None
    reader.resume(loader)
    after = pieces_of(trainer)
    trainer.train(reader, max_steps=STEPS + 1, checkpoints=checkpoints)
    return before, after


def assembled(ranks: list[Any], rows: dict[str, int]) -> dict[tuple[str, str], torch.Tensor]:
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for pieces in ranks:
        for table, state, row, column, tensor in pieces:
            shape = [rows[table], 8] if tensor.dim() == 2 else [rows[table]]
            target = whole.setdefault((table, state), torch.full(shape, torch.nan))
            own = target[row : row + len(tensor)]
            if tensor.dim() == 2:
                own = own[:, column : column + tensor.shape[1]]
            own.copy_(tensor)
    return whole


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: "-".join(map(str, case)))
def test_old_rows_stay_and_new_ones_begin_anew(
    pools: dict[int, WorkerPool],
    data: Path,
    tmp_path: Path,
    case: tuple[str, str, int, int, str],
) -> None:
    """On any ranks and under any plan: weights and optimizer state of old rows are the saved ones
    to the bit, new rows have the first values of a new run and no state. What is saved then has
    all rows, and loads as it is."""
    source, target, old, new, optimizer = case
    pools[old].run(train_and_save, data, tmp_path, source, optimizer)
    found = find(str(tmp_path))
    results = pools[new].run(grow_and_train, data, tmp_path, target, optimizer)
    first = assembled([before for before, _ in results], GROWN)
    grown = assembled([after for _, after in results], GROWN)
    assert {state for table, state in grown} == {WEIGHT, *OPTIMIZERS[optimizer]}
    for (table, state), values in grown.items():
        saved, rows = torch.cat(list(table_chunks(found, table, state))), TABLES[table]
        assert len(saved) == rows < len(values) or table == "u"
        assert saved.abs().sum() > 0
        assert torch.equal(values[:rows], saved)
        expected = first[table, state][rows:] if state == WEIGHT else torch.zeros(1)
        assert torch.equal(values[rows:], expected.expand_as(values[rows:]))
    described = {n: t.num_embeddings for n, t in find(str(tmp_path)).manifest.tables.items()}
    assert described == GROWN
    pools[old].run(loads, tmp_path, source, optimizer)


def loads(folder: Path, kind: str, optimizer: str) -> None:
    assert Checkpoints(folder).load(make_trainer(kind, rows=GROWN, optimizer=optimizer))


def test_a_grown_model_trains_as_the_small_one(
    pools: dict[int, WorkerPool],
    data: Path,
    tmp_path: Path,
) -> None:
    """New rows that are not looked up change nothing: the next step leaves the same old rows."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        pools[2].run(train_and_save, data, folder, "row_wise", "adam")
    pools[2].run(grow_and_train, data, tmp_path / "a", "column_wise", "adam")
    pools[2].run(one_more_step, data, tmp_path / "b", "column_wise", "adam")
    for table, rows in TABLES.items():
        for state in (WEIGHT, *OPTIMIZERS["adam"]):
            grown, small = (
                torch.cat(list(table_chunks(find(str(tmp_path / name)), table, state)))[:rows]
                for name in "ab"
            )
            assert torch.equal(grown, small)


def one_more_step(data: Path, folder: Path, kind: str, optimizer: str) -> None:
    trainer, checkpoints = make_trainer(kind, optimizer=optimizer), Checkpoints(folder)
    reader = make_reader(data, trainer)
    loader = checkpoints.load(trainer).loader
    assert loader is not None
    reader.resume(loader)
    trainer.train(reader, max_steps=STEPS + 1, checkpoints=checkpoints)


def best_after_loading(folder: Path) -> list[tuple[int | None, str | None]]:
    """The best step and checkpoint that a model of the same size knows of, and a larger one."""
    trainer = make_trainer("row_wise")
    trainer.best = BestStep("auc", "max")
    trainer.step = 7
    trainer.best.add(7, 0.9)
    Checkpoints(folder, keep_best=True).save(trainer, trains_on=False)
    known: list[tuple[int | None, str | None]] = []
    for rows in (TABLES, GROWN):
        trainer, checkpoints = make_trainer("row_wise", rows=rows), Checkpoints(folder)
        trainer.best = BestStep("auc", "max")
        checkpoints.load(trainer, grow_tables=True)
        known.append((trainer.best.step, checkpoints.best))
    return known


def test_a_grown_model_has_no_best_step_yet(pools: dict[int, WorkerPool], tmp_path: Path) -> None:
    """What a smaller model scored says nothing of it, and its weights could not be restored."""
    for known in pools[2].run(best_after_loading, tmp_path):
        assert known == [(7, "step-00000007"), (None, None)]


def refusals(folder: Path) -> list[str]:
    messages = []
    for rows, grow_tables in [({"t": 60, "u": 5}, False), ({"t": 49, "u": 12}, True)]:
        trainer = make_trainer("row_wise", rows=rows)
        before = pieces_of(trainer)
        with pytest.raises(UserError) as caught:
            Checkpoints(folder).load(trainer, grow_tables=grow_tables)
        for (*_, was), (*_, now) in zip(before, pieces_of(trainer), strict=True):
            assert torch.equal(was, now)
        messages.append(str(caught.value))
    return messages


def test_what_is_refused(
    pools: dict[int, WorkerPool],
    data: Path,
    tmp_path: Path,
) -> None:
    """More rows unless they are asked for, and fewer in any case; nothing is loaded then."""
    pools[2].run(train_and_save, data, tmp_path, "row_wise", "adagrad")
    for unasked, asked in pools[2].run(refusals, tmp_path):
        assert (
            "table t: 50 rows of 8 in the checkpoint, 60 rows of 8 here; to add rows say "
            "checkpoint.grow_tables: true" in unasked
        )
        for message, here, table in [(unasked, "5 rows of 8", "u"), (asked, "49 rows of 8", "t")]:
            assert f"{here} here; no row is dropped: raise tables.{table}.num_embeddings" in message
        assert "table u" not in asked
