"""Runs whose tables begin with pretrained vectors, seen from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.launch.tiny_run import ROWS, make_data, shardemb, tiny_config, write_config

FROZEN = ("C2", "C3", "C4")  # row_wise, column_wise and data_parallel


class Started:
    """A run of eight steps, three of whose tables are the rows of a file and are not trained."""

    def __init__(self, folder: Path) -> None:
        config = tiny_config(make_data(folder / "data"), folder / "run")
        config["train"]["max_steps"] = 8
        generator = np.random.default_rng(0)
        self.vectors: dict[str, Any] = {}
        for name in FROZEN:
            self.vectors[name] = generator.normal(size=(ROWS[name] - 10, 8)).astype(np.float32)
            np.save(folder / f"{name}.npy", self.vectors[name])
            pretrained = {"path": str(folder / f"{name}.npy")}
            config["tables"][name] |= {"pretrained": pretrained, "frozen": True}
        self.folder, self.directory = folder, folder / "run"
        self.path = write_config(folder / "run.yaml", config)
        self.process = shardemb("train", self.path, "--json")
        assert self.process.returncode == 0, self.process.stderr

    def tables(self) -> dict[str, Any]:
        """Those with a file, as the newest checkpoint has them."""
        shardemb("checkpoint", "export", self.directory, self.folder / "out")
        read = {n: pq.read_table(self.folder / "out" / f"{n}.parquet") for n in self.vectors}
        return {n: np.array(t["embedding"].to_pylist(), np.float32) for n, t in read.items()}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    return Started(tmp_path_factory.mktemp("started"))


def test_a_frozen_table_is_its_file(started: Started) -> None:
    """At the end of the run too; the other rows are there, and what was filled is told."""
    for name, rows in started.tables().items():
        vectors = started.vectors[name]
        assert np.array_equal(rows[: len(vectors)], vectors)
        assert np.abs(rows[len(vectors) :]).min() > 0
        told = f"table {name}: {len(vectors)} of {ROWS[name]} rows begin as in {started.folder}"
        assert told in started.process.stderr.replace("\n", " ")


def test_a_run_that_goes_on_has_its_checkpoint(started: Started) -> None:
    """Not the file, whatever that says by now."""
    for name, vectors in started.vectors.items():
        np.save(started.folder / f"{name}.npy", vectors + 1)
    process = shardemb("train", started.path, "checkpoint.resume=latest", "train.max_steps=10")
    assert process.returncode == 0, process.stderr
    assert "begin as in" not in process.stderr
    for name, rows in started.tables().items():
        vectors = started.vectors[name]
        assert np.array_equal(rows[: len(vectors)], vectors)


def test_mistakes_are_told_before_workers_start(started: Started, tmp_path: Path) -> None:
    """With the table, and no run directory is left."""
    for value, message in [
        ("{path: none.npy}", "tables.C1.pretrained: there is no file none.npy"),
        (f"{{path: {started.folder}/C2.npy}}", "C2.npy has 70 rows, the table 40"),
        ("{path: v.txt, keys: vocabulary}", "feature C1 has none, its ids are as_is"),
        ("{file: v.npy}", "tables.C1.pretrained.file: unknown key"),
    ]:
        overrides = [f"tables.C1.pretrained={value}", f"output={tmp_path / 'run'}"]
        process = shardemb("train", started.path, *overrides)
        assert process.returncode in (1, 2)
        assert message in " ".join(process.stderr.replace("│", " ").split())
        assert "starting 2 workers" not in process.stderr
        assert not (tmp_path / "run").exists()
