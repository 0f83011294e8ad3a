"""A run that fails amid its work: what it says, and what its run directory holds afterwards."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardemb.data.parquet import BLOCK_ROWS
from shardemb.data.synthetic import SyntheticFeature, synthesize
from tests.launch.tiny_run import (
    DENSE,
    ROWS,
    TIMEOUT_SECONDS,
    make_data,
    python,
    shardemb,
    tiny_config,
    write_config,
)

# Two ranks read ahead by so many rows; those behind them are met when training has begun.
MANY_ROWS, ROW_GROUP_ROWS = 2 * BLOCK_ROWS + 6400, 1024
FAILED = {"config.yaml", "plan.json", "metrics.jsonl", "tensorboard", "failure.json", "logs"}
OVERRIDES = ("data.shuffle=false", "train.batch_size=2048", "train.log_every=5")

# A model that leaves as it is told, at step 6 of one rank.
LEAVING = """
import os, signal

from shardemb.models.dlrm import DLRM

WAYS = {
    "os._exit": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
}

class Leaving(DLRM):
    def __init__(self, embeddings, num_dense, way, rank):
        super().__init__(embeddings, num_dense, dense_layers=[8], over_layers=[8])
        self.way, self.here, self.step = WAYS[way], int(os.environ["RANK"]) == rank, 0

    def forward(self, batch):
        self.step += 1
        if self.here and self.step == 6:
            self.way()
        return super().forward(batch)
"""


class Runs:
    """Runs of `folder`/run.yaml, with two workers and the output `folder`/run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "run"
        self.config = write_config(folder / "run.yaml", tiny_config(folder / "data", self.output))

    def train(self, *overrides: str, **environment: str) -> str:
        """What `shardemb train` says of the mistake, shown without a traceback of ours."""
        process = shardemb("train", self.config, *overrides, **environment)
        print(process.stderr)
        assert process.returncode == 1
        assert process.stdout == ""
        return " ".join(process.stderr.split())

    def spoil(self, split: str, change: Callable[[pa.Table], pa.Table]) -> None:
        """Change the rows of a split, in a file without statistics: no footer shows them."""
        (path,) = (self.folder / "data" / split).glob("*.parquet")
        rows = pq.read_metadata(path).row_group(0).num_rows
        table = change(pq.read_table(path))
        pq.write_table(table, path, row_group_size=rows, write_statistics=False)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.output.iterdir()}

    @property
    def failure(self) -> dict[str, Any]:
        return json.loads((self.output / "failure.json").read_text())

    @property
    def reported_steps(self) -> list[int]:
        lines = map(json.loads, (self.output / "metrics.jsonl").open())
        return [line["step"] for line in lines]


@pytest.fixture
def small(tmp_path: Path) -> Runs:
    """16 steps an epoch."""
    make_data(tmp_path / "data")
    return Runs(tmp_path)


@pytest.fixture
def large(tmp_path: Path) -> Runs:
    """Both splits have rows that are read after the first steps."""
    synthesize(
        tmp_path / "data",
        features=[SyntheticFeature(name, rows, 1.0) for name, rows in ROWS.items()],
        dense=DENSE,
        train_rows=MANY_ROWS,
        test_rows=MANY_ROWS,
        row_group_rows=ROW_GROUP_ROWS,
    )
    return Runs(tmp_path)


def labels_from(row: int) -> Callable[[pa.Table], pa.Table]:
    """NaN as label of `row` and those after it."""

    def change(table: pa.Table) -> pa.Table:
        labels = [float(x) for x in table["label"].to_pylist()[:row]]
        labels += [math.nan] * (len(table) - row)
        return set_column(table, "label", pa.array(labels, pa.float32()))

    return change


def bad_last_id(table: pa.Table) -> pa.Table:
    return set_column(table, "C1", pa.array([*table["C1"].to_pylist()[:-1], ROWS["C1"]]))


def set_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_bad_label_met_amid_training(large: Runs) -> None:
    """The metrics so far stay, with failure.json beside them; an earlier run stays as well. A run
    that fails before it has more than a first step to tell leaves all as it was."""
    large.spoil("train", labels_from(MANY_ROWS - 1))
    large.output.mkdir()
    (large.output / "config.yaml").write_text("an earlier run")

    message = f"part-00000.parquet, row {MANY_ROWS - 1}: the label (column label) is nan"
    assert message in large.train(*OVERRIDES)
    assert large.files == FAILED
    assert large.reported_steps == [1, *range(5, BLOCK_ROWS // 2048, 5)]
    assert large.failure.keys() == {"error", "step"}
    assert message in large.failure["error"]
    assert large.failure["step"] == large.reported_steps[-1]
    assert (large.folder / "run.1" / "config.yaml").read_text() == "an earlier run"

    before = contents(large.folder)
    assert message in large.train(*OVERRIDES, "train.log_every=100")
    assert contents(large.folder) == before


def test_bad_labels_all_over_the_test_split(small: Runs) -> None:
    """They are told before training starts, not after hours of it, and no directory is made."""
    small.spoil("test", labels_from(0))
    message = small.train()
    assert "data/test/part-00000.parquet, row " in message
    assert "the label (column label) is nan" in message
    assert "training on" not in message
    assert not small.output.exists()


@pytest.mark.parametrize("launcher", [True, False], ids=["shardemb", "alone"])
def test_a_bad_id_met_in_evaluation(large: Runs, launcher: bool) -> None:
    """The metrics of the whole training stay, whoever started the workers."""
    large.spoil("test", bad_last_id)
    arguments = [*OVERRIDES, "train.max_steps=6"]
    if launcher:
        message = large.train(*arguments)
    else:
        process = python("-m", "shardemb.train", large.config, *arguments)
        assert process.returncode == 1
        message = " ".join(process.stderr.split())
    cause = f"part-00000.parquet, row {MANY_ROWS - 1}: feature C1 has id {ROWS['C1']}"
    assert cause in message
    assert large.files == {*FAILED, "checkpoints"} - (set() if launcher else {"logs"})
    assert large.reported_steps == [1, 5, 6]
    assert cause in large.failure["error"]
    assert large.failure["step"] == 6


WAYS = {
    "os._exit": (1, "the worker of rank 1 ended with exit code 0 before the run was done"),
    "SIGKILL": (0, "the worker of rank 0 was killed by SIGKILL"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_leaves_amid_the_run(small: Runs, way: str) -> None:
    """The run fails and says which rank left, not how another noticed it; so does failure.json,
    also where it was rank 0, which writes all else."""
    rank, cause = WAYS[way]
    (small.folder / "leaving.py").write_text(LEAVING)
    message = small.train(
        "model.name=leaving:Leaving",
        f"model.args={{way: {way}, rank: {rank}}}",
        "train.log_every=2",
        PYTHONPATH=str(small.folder),
    )
    assert cause in message
    assert "closed by peer" not in message
    assert small.files == FAILED
    assert small.failure["error"].startswith(cause)
    assert message.endswith(f"its whole log: {small.output}/logs/rank_{rank}.log")
    assert small.failure["step"] == small.reported_steps[-1] == 4


def test_a_run_that_is_interrupted(small: Runs) -> None:
    """Ctrl-C and SIGTERM leave the metrics, and their name as the error."""
    command = [sys.executable, "-m", "launch.cli", "train", str(small.config), "train.epochs=10000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_steps(small)
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in shown
    assert small.files == FAILED
    assert small.failure == {"error": "ended by SIGTERM", "step": small.reported_steps[-1]}


def wait_for_steps(runs: Runs) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    metrics = runs.output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline, "no steps were reported"
        time.sleep(0.05)
