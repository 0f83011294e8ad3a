"""Measurements: what is drawn, how it is timed, and that a broken run goes on where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from planner import RequestError, UserError
from planner.cost.measurements import COLLECTIVES
from planner.reuse import unique_rows
from planner.shards import TableColumns
from planner.tables import REUSE_BATCH_SIZE, TableSpec
from shardemb.profiler import store as stores
from shardemb.profiler.environment import this_environment
from shardemb.profiler.ids import draw_ids
from shardemb.profiler.kernels import time_kernel
from shardemb.profiler.samples import read_measurements
from shardemb.profiler.store import PATTERN, SCHEMA, Store, read_part
from shardemb.profiler.timing import NOISY, summarize
from shardemb.profiler.workloads import (
    LIMITS,
    DenseMatmul,
    HostCopy,
    KernelSet,
    draw_collective,
    draw_device_work,
)

CPU = torch.device("cpu")
TIMEOUT_SECONDS = 60


def _sets(count: int) -> list[KernelSet]:
    drawn = [draw_device_work(5, number, "cpu") for number in range(count)]
    assert all(isinstance(work, KernelSet) for work in drawn)
    return drawn  # type: ignore[return-value]


def _table(**changes: Any) -> TableSpec:
    fields = {"name": "t", "num_embeddings": 10**6, "embedding_dim": 16, "pooling_factor": 2.0}
    return TableSpec(**fields | changes)


# --- What is drawn


def test_work_depends_on_seed_and_number_alone() -> None:
    """So that a run which was broken off goes on with what comes next."""
    forward = [draw_device_work(5, number, "cpu") for number in range(30)]
    backward = [draw_device_work(5, number, "cpu") for number in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward != [draw_device_work(6, number, "cpu") for number in range(30)]


def test_sets_are_drawn_wide_and_within_the_limits() -> None:
    """Orders of magnitude apart in every respect; four sets of different tables make a task."""
    sets = _sets(400)
    tables = [table for work in sets for table in work.tables]
    for values in (
        [t.num_embeddings for t in tables],
        [t.embedding_dim for t in tables],
        [work.batch_size for work in sets],
        [t.pooling_factor for t in tables],
    ):
        assert max(values) > 20 * min(values)
    assert {t.embedding_dim % 4 for t in tables} == {0}
    assert {t.optimizer for t in tables} == {"sgd", "adagrad", "rowwise_adagrad"}
    assert {t.dtype for t in tables} == {"fp32", "fp16"}
    assert max(len(work.tables) for work in sets) > 10
    for work in sets:
        lookups = [t.pooling_factor * work.batch_size for t in work.tables]
        assert sum(lookups) <= LIMITS["cpu"].lookups * 1.01
    assert [work.task for work in sets[:9]] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    names = [table.name for work in sets[:4] for table in work.tables]
    assert len(names) == len(set(names))


def test_a_gpu_has_copies_and_products_to_measure_too() -> None:
    """A CPU has not: there it would be the same memory."""
    drawn = {type(draw_device_work(5, number, "cuda")) for number in range(100)}
    assert drawn == {KernelSet, HostCopy, DenseMatmul}


def test_collectives_are_of_all_kinds_balanced_and_not() -> None:
    """Only all-to-alls can be unbalanced: batches of all ranks have one size."""
    calls = [draw_collective(5, number, 3) for number in range(200)]
    assert {call.kind for call in calls} == set(COLLECTIVES)
    uneven = [call for call in calls if len(set(call.sent_bytes)) > 1]
    assert {call.kind for call in uneven} == {"all_to_all"}
    assert any(call.kind == "all_to_all" and call not in uneven for call in calls)


@pytest.mark.parametrize("hot_bin", [2, 5, 8])
def test_ids_have_the_reuse_asked_for(hot_bin: int) -> None:
    """Half of a batch's lookups go to rows looked up 2^(bin-1) to 2^bin times, or nearly so; and
    there are as many different rows as the planner expects."""
    shares = tuple(0.5 * (i in (0, hot_bin)) for i in range(17))
    table = _table(num_embeddings=5 * 10**7, reuse_histogram=shares)
    ids, lengths = draw_ids(table, REUSE_BATCH_SIZE, np.random.default_rng(0))
    assert lengths.sum() == len(ids) == 2 * REUSE_BATCH_SIZE
    counts = np.unique(ids, return_counts=True)[1]
    near = (counts > 2 ** (hot_bin - 2)) & (counts <= 2 ** (hot_bin + 1))
    assert counts[near].sum() / len(ids) == pytest.approx(0.5, abs=0.06)
    expected = unique_rows(TableColumns.of([table]), np.array([float(len(ids))]))[0]
    assert len(counts) == pytest.approx(expected, rel=0.06)


def test_ids_without_a_histogram_are_uniform() -> None:
    """And a pooling factor between two integers is the mean of lengths."""
    table = _table(num_embeddings=10, pooling_factor=1.25)
    ids, lengths = draw_ids(table, 40_000, np.random.default_rng(0))
    assert set(lengths) == {1, 2} and lengths.mean() == pytest.approx(1.25, abs=0.01)
    assert np.bincount(ids, minlength=10) / len(ids) == pytest.approx(0.1, abs=0.01)


# --- How it is timed


def test_summaries_are_robust() -> None:
    """One repetition of ten that was disturbed is an outlier, and moves nothing."""
    calm = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.02, 0.98]
    timing = summarize([*calm, 50.0])
    assert timing.median_ms == pytest.approx(1.0) and timing.outliers == 1
    assert timing.error < NOISY < summarize([1, 2, 3, 4, 5]).error
    assert summarize([1, 2, 3, 4, 5] * 20).error < NOISY  # many make up for a wide spread


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_kernels_run_and_take_longer_with_more_work(optimizer: str, dtype: str) -> None:
    """A hundred times the lookups take longer, forward and backward."""
    table = _table(optimizer=optimizer, dtype=dtype, num_embeddings=10_000)
    generator = np.random.default_rng(0)
    small, large = (time_kernel(KernelSet(0, (table,), n), CPU, generator) for n in (50, 20_000))
    assert 0 < small.forward.median_ms < large.forward.median_ms
    assert 0 < small.backward.median_ms < large.backward.median_ms


# --- What is kept


def _worker(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = ["-m", "shardemb.profiler.worker", "device", str(folder), str(seconds), "3", "1"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen([sys.executable, *command], env=environment | {"OMP_NUM_THREADS": "1"})


def _numbers(folder: Path) -> list[int]:
    parts = [read_part(path) for path in sorted(folder.glob(PATTERN))]
    return [number for part in parts for number in part["number"].to_pylist()]


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """After SIGKILL at any time every number is there once, and all files can be read."""
    killed = _worker(tmp_path, TIMEOUT_SECONDS)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not list(tmp_path.glob(PATTERN)) and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = _numbers(tmp_path)
    assert before
    assert _worker(tmp_path, 2).wait(TIMEOUT_SECONDS) == 0
    after = _numbers(tmp_path)
    assert len(after) > len(before) and after == list(range(len(after)))
    works = [draw_device_work(3, number, "cpu") for number in after]
    samples = read_measurements(tmp_path).kernels
    drawn = {(work.task, work.batch_size, len(work.tables)) for work in works}  # type: ignore[union-attr]
    assert {(s.task, s.batch_size, len(s.tables)) for s in samples} <= drawn


def _store(folder: Path, **changes: Any) -> Store:
    environment = this_environment(CPU).model_copy(update=changes)
    return Store(folder, "device", environment)


QUALITY = {"repetitions": 9, "spread": 0.0, "outliers": 0, "is_noisy": False}
ROW = {
    **{"kind": "kernel", "task": 0, "batch_size": 8, "dtype": "fp32", "optimizer": "sgd"},
    **{"tables": [], "forward_ms": 1.0, "backward_ms": 2.0},
    **QUALITY,
}


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is broken off leaves what was there, and the rows are measured again."""
    store = _store(tmp_path)
    store.append(ROW)
    store.flush()
    store.append(ROW)
    monkeypatch.setattr(stores.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.flush()
    assert _numbers(tmp_path) == [0] and _store(tmp_path).next_number == 1


def test_columns_say_what_they_mean(tmp_path: Path) -> None:
    """In the file itself; and what it was measured on."""
    store = _store(tmp_path)
    store.append(ROW)
    store.flush()
    (path,) = tmp_path.glob(PATTERN)
    schema = pq.read_schema(path)
    assert schema.names == SCHEMA.names
    assert all(field.metadata and field.metadata[b"meaning"] for field in schema)
    assert torch.__version__ in schema.metadata[b"environment"].decode()


def test_noisy_rows_are_left_out(tmp_path: Path) -> None:
    """They stay in the file, marked."""
    store = _store(tmp_path)
    store.append(ROW)
    store.append(ROW | {"is_noisy": True})
    store.flush()
    assert len(read_measurements(tmp_path).kernels) == 1 and _numbers(tmp_path) == [0, 1]


def test_measurements_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    """Nor damaged ones, nor none: the message names files and machines."""
    with pytest.raises(RequestError, match="no measurements"):
        read_measurements(tmp_path)
    for folder, name in (("a", "left"), ("b", "right")):
        (tmp_path / folder).mkdir()
        store = _store(tmp_path / folder, device_name=name)
        store.append(ROW)
        store.flush()
    (moved,) = (tmp_path / "b").glob(PATTERN)
    moved.rename(tmp_path / "a" / "measurements-device-0000009.parquet")
    with pytest.raises(UserError, match=r"left(.|\n)*right"):
        read_measurements(tmp_path / "a")
    (tmp_path / "a" / "measurements-device-0000009.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match="0000009.parquet"):
        read_measurements(tmp_path / "a")
