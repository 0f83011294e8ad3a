"""Files in folders, globs and other filesystems."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner import UserError
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema
from shardemb.data.sources import parquet_files
from shardemb.data.statistics import collect_statistics

NAMES = ["a.parquet", "b/c.parquet", "b/d/e.parquet", "b/notes.txt"]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = np.arange(10) + 10 * number
        pq.write_table(pa.table({"label": np.zeros(10), "number": numbers}), path)
    return tmp_path / "data"


@pytest.fixture
def remote(local: Path) -> str:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(local), "/bucket/data", recursive=True)
    yield "memory://bucket/data"
    filesystem.rm("/bucket", recursive=True)


def _numbers(data: str | Path) -> list[int]:
    schema = BatchSchema("label", dense=("number",))
    reader = ParquetReader(data, schema, batch_size=30, rank=0, world_size=1)
    (batch,) = reader.epoch()
    return sorted(batch.dense[:, 0].int().tolist())


def test_folders_here_and_elsewhere(local: Path, remote: str) -> None:
    """Arrow's filesystems, fsspec's, plain folders: the same files with the same rows."""
    for data in (local, str(local), f"file://{local}", remote):
        files = parquet_files(data)
        assert [file.removeprefix(str(data) + "/") for file in files] == NAMES[:3]
        assert _numbers(data) == list(range(30))


def test_globs(local: Path, remote: str) -> None:
    """A star is within a name, two are any folders."""
    for data in (local, f"file://{local}", remote):
        assert parquet_files(f"{data}/b/*.parquet") == [f"{data}/b/c.parquet"]
        every = [f"{data}/{name}" for name in NAMES[:3]]
        assert parquet_files(f"{data}/**/*.parquet") == every
        assert parquet_files(f"{data}/?.parquet") == every[:1]
        assert parquet_files(f"{data}/?") == every[1:]  # the files in folders that match


def test_what_is_not_there(local: Path, remote: str) -> None:
    """Each says what was looked for, and where."""
    for data in (local, remote):
        with pytest.raises(UserError, match=f"nothing matches {data}/x"):
            parquet_files(f"{data}/x*.parquet")
        with pytest.raises(UserError, match=f"there is no folder {data}/absent"):
            parquet_files(f"{data}/absent")
    with pytest.raises(UserError, match="nonsense://x: no filesystem for nonsense://"):
        parquet_files("nonsense://x")
    with pytest.raises(UserError, match="hdfs://nowhere/x"):
        parquet_files("hdfs://nowhere/x")
    schema = BatchSchema("label")
    with pytest.raises(UserError, match="cannot read memory://bucket/data/gone.parquet"):
        ParquetReader(
            ["memory://bucket/data/gone.parquet"], schema, batch_size=1, rank=0, world_size=1
        )


def test_a_file_that_vanishes_while_it_is_read(remote: str) -> None:
    """The message names the file and the row group."""
    schema = BatchSchema("label", dense=("number",))
    reader = ParquetReader(remote, schema, batch_size=10, rank=0, world_size=1)
    fsspec.filesystem("memory").rm("/bucket/data/b/c.parquet")
    with pytest.raises(UserError, match="b/c.parquet"):
        list(reader.epoch())


def test_statistics_of_a_url(local: Path, remote: str) -> None:
    """`data stats` reads them as the reader does: the same numbers as of the files here."""
    here, there = (collect_statistics([data], batch_size=10) for data in (local, remote))
    assert there.rows == 30 and there.features == here.features and there.dense == here.dense
    globbed = collect_statistics([f"{remote}/?"], batch_size=10)
    assert globbed.rows == 20
