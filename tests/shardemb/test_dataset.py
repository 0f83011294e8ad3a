from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner.errors import RequestError, UserError
from shardemb.data import dataset
from shardemb.data.dataset import (
    BestReachable,
    DatasetInfo,
    new_dataset,
    read_info,
    write_info,
    write_split,
)
from tests.shardemb.splits import split_files

INFO = DatasetInfo(
    format="criteo", rows={"train": 3}, label="label", dense=["I1"], sparse=["C1", "C2"]
)


def _batches(sizes: list[int]) -> Iterator[pa.RecordBatch]:
    start = 0
    for size in sizes:
        yield pa.record_batch({"x": pa.array(range(start, start + size), pa.int64())})
        start += size


def _group_rows(path: Path) -> list[int]:
    metadata = pq.ParquetFile(path).metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


@pytest.mark.parametrize("sizes", [[25], [1] * 25, [3, 0, 7, 14, 1], [24, 1]])
def test_row_groups_and_parts_do_not_depend_on_the_batches(tmp_path: Path, sizes: list[int]):
    """Whatever comes in, groups hold 4 rows and parts 8, in order; only the last is shorter."""
    rows = write_split(tmp_path, "train", _batches(sizes), row_group_rows=4, rows_per_file=8)
    parts = split_files(tmp_path, "train")
    assert rows == 25
    assert [part.name for part in parts] == [f"part-0000{i}.parquet" for i in range(4)]
    assert [_group_rows(part) for part in parts] == [[4, 4], [4, 4], [4, 4], [1]]
    assert pa.concat_tables(map(pq.read_table, parts))["x"].to_pylist() == list(range(25))


def test_a_part_ends_with_a_whole_row_group(tmp_path: Path):
    """A file size that is no multiple of the group's is rounded up to one."""
    write_split(tmp_path, "train", _batches([10]), row_group_rows=4, rows_per_file=5)
    assert [_group_rows(part) for part in split_files(tmp_path, "train")] == [[4, 4], [2]]


def test_a_split_without_rows_has_no_folder(tmp_path: Path):
    """No batches, or only empty ones, leave no Parquet file without rows behind."""
    assert write_split(tmp_path, "test", _batches([0, 0])) == 0
    assert split_files(tmp_path, "test") == [] and not (tmp_path / "test").exists()


def test_row_groups_without_rows_are_refused(tmp_path: Path):
    """A size below 1 is a malformed request, not an endless loop."""
    with pytest.raises(RequestError, match="row groups of 0 rows"):
        write_split(tmp_path, "train", _batches([1]), row_group_rows=0)


def test_info_comes_back_as_written(tmp_path: Path):
    """dataset.json holds all of DatasetInfo, with and without a best score."""
    best = BestReachable(auc=0.8, logloss=0.4)
    for info in (INFO, INFO.model_copy(update={"best_reachable": best})):
        write_info(tmp_path, info)
        assert read_info(tmp_path) == info


def test_a_folder_without_info_is_no_error(tmp_path: Path):
    """A data set made by something else has no dataset.json."""
    assert read_info(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "criteo"}', "\xff", '{"rows": "x"}'])
def test_damaged_info_names_the_file(tmp_path: Path, text: str):
    """A cut or foreign dataset.json is the user's to mend: one message with its path."""
    path = tmp_path / "dataset.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        read_info(tmp_path)


def test_a_new_dataset_appears_whole(tmp_path: Path):
    """The folder is not there before the end, then there with all its content, alone."""
    out = tmp_path / "deep" / "data"
    with new_dataset(out) as folder:
        write_info(folder, INFO)
        assert not out.exists() and folder.parent == out.parent
    assert read_info(out) == INFO
    assert [path.name for path in out.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    """Any error passes through as it is, and takes the half-written folder with it."""
    with pytest.raises(error), new_dataset(tmp_path / "data") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_written_over(tmp_path: Path):
    """A non-empty folder or a file is refused; an empty folder is taken."""
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "thesis.txt").write_text("x")
    file.write_text("x")
    with pytest.raises(RequestError, match="exists and is not empty"), new_dataset(full):
        pass
    no_dataset = pytest.raises(RequestError, match=r"holds no dataset\.json")
    with no_dataset, new_dataset(full, overwrite=True):
        pass
    with pytest.raises(RequestError, match="is a file"), new_dataset(file, overwrite=True):
        pass
    with new_dataset(empty) as folder:
        write_info(folder, INFO)
    assert read_info(empty) == INFO and (full / "thesis.txt").read_text() == "x"


def test_overwrite_replaces_a_dataset_only_at_the_end(tmp_path: Path):
    """The old data set stays whole until the new one is complete, also when that fails."""
    out = tmp_path / "data"
    for rows, error in ((1, None), (2, RuntimeError("stop")), (3, None)):
        info = INFO.model_copy(update={"rows": {"train": rows}})
        try:
            with new_dataset(out, overwrite=True) as folder:
                write_info(folder, info)
                if error:
                    raise error
        except RuntimeError:
            assert read_info(out) == INFO.model_copy(update={"rows": {"train": 1}})
    assert read_info(out) == INFO.model_copy(update={"rows": {"train": 3}})
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_move_keeps_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If the finished folder cannot take its place, the old one gets it back."""
    out = tmp_path / "data"
    with new_dataset(out) as folder:
        write_info(folder, INFO)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    failed = pytest.raises(UserError, match="Input/output error")
    with failed, new_dataset(out, overwrite=True):
        pass
    assert read_info(out) == INFO
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.fixture
def small_file_limit() -> Iterator[int]:
    """The kernel refuses files above 16 KiB, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    yield 16384
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_names_the_folder_and_the_reason(tmp_path: Path, small_file_limit: int):
    """What the system refuses to write becomes one message, and leaves nothing behind."""
    out = tmp_path / "data"
    too_large = pytest.raises(UserError, match=rf"{out}: File too large; nothing was left")
    with too_large, new_dataset(out) as folder:
        write_split(folder, "train", _batches([small_file_limit] * 20))
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_a_clear_error(tmp_path: Path):
    """A path through a file cannot be made a folder."""
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "data"
    with pytest.raises(RequestError, match="file is a file"), new_dataset(out):
        pass


def test_parts_have_the_codec_named(tmp_path: Path):
    """The codec that is named is the codec that is written."""
    write_split(tmp_path, "train", _batches([10]))
    column = pq.ParquetFile(split_files(tmp_path, "train")[0]).metadata.row_group(0).column(0)
    assert column.compression.lower() == dataset.COMPRESSION
