"""A data set on disk: `train/` and `test/` of Parquet parts, and `dataset.json` about them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from planner.errors import RequestError, UserError
from shardemb.data.sources import read_bytes

INFO_FILE = "dataset.json"
ROW_GROUP_ROWS = 8192
ROWS_PER_FILE = 1_048_576
# Ranks read whole row groups: small splits get smaller ones, so that this many ranks can share.
ROW_GROUPS_AT_LEAST = 16
# Of Parquet's codecs the fastest to read on Criteo's columns, at four fifths of their plain size.
COMPRESSION = "lz4"


class BestReachable(BaseModel):
    """What a model that knew every true click probability would score on the test split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    auc: float
    logloss: float


class VocabularyInfo(BaseModel):
    """`size` values have ids of their own; all others share the `oov_rows` ids after these or, in a
    vocabulary that was extended, after the values that it had at first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    oov_rows: int


class DatasetInfo(BaseModel):
    """What `dataset.json` says about the folder it lies in.

    `num_embeddings` has the features whose ids are rows of a table, and how many it needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["criteo", "csv", "jsonl", "movielens", "synthetic", "tsv"]
    rows: dict[str, int]
    label: str
    dense: list[str]
    sparse: list[str]
    num_embeddings: dict[str, int] = {}
    vocabularies: dict[str, VocabularyInfo] = {}
    best_reachable: BestReachable | None = None


def write_info(folder: Path, info: DatasetInfo) -> None:
    (folder / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n")


def read_info(folder: str | Path) -> DatasetInfo | None:
    """The folder's `dataset.json`, or None where there is none; a UserError if it is damaged."""
    path = f"{folder}/{INFO_FILE}"
    try:
        return DatasetInfo.model_validate_json(read_bytes(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors()
        )
        raise UserError(
            f"{path} is damaged ({wrong}): convert the data again, or remove the file to use the "
            "Parquet files without it"
        ) from error


def default_row_group_rows(rows: int | None) -> int:
    """Rows in a row group of a split of `rows` rows (None: not known beforehand)."""
    if rows is None:
        return ROW_GROUP_ROWS
    return max(1, min(ROW_GROUP_ROWS, -(-rows // ROW_GROUPS_AT_LEAST)))


def rows_of_part(row_group_rows: int, rows_per_file: int = ROWS_PER_FILE) -> int:
    """Rows of every part of a split but its last: whole row groups, at least `rows_per_file`."""
    if row_group_rows < 1 or rows_per_file < 1:
        raise RequestError(
            f"row groups of {row_group_rows} rows in files of {rows_per_file} rows: both must "
            f"be at least 1 (the default is {ROW_GROUP_ROWS} in {ROWS_PER_FILE})"
        )
    return row_group_rows * -(-rows_per_file // row_group_rows)


def part_file(folder: Path, split: str, number: int) -> Path:
    return folder / split / f"part-{number:05d}.parquet"


class SplitWriter:
    """Writes the rows of one split: equal row groups, a new part every `rows_per_file` rows.

    Parts are numbered from `first_part` on. Row groups do not depend on the size of what comes in:
    only a split's last one can be shorter. A part ends with a whole row group. A split without
    rows has no folder.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        row_group_rows: int = ROW_GROUP_ROWS,
        rows_per_file: int = ROWS_PER_FILE,
        first_part: int = 0,
    ) -> None:
        self.rows = 0
        self._folder, self._split = folder, split
        self._row_group_rows = row_group_rows
        self._rows_per_part = rows_of_part(row_group_rows, rows_per_file)
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._next_part = first_part
        self._part_rows = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._write_groups(self._pending_rows)
            self._close_part()
        else:
            with contextlib.suppress(OSError):  # the first error is the one to report
                self._close_part()

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self.rows += table.num_rows
        whole_groups = self._pending_rows // self._row_group_rows
        if whole_groups:
            self._write_groups(whole_groups * self._row_group_rows)

    def _write_groups(self, rows: int) -> None:
        table = pa.concat_tables(self._pending) if self._pending else None
        start = 0
        while table is not None and start < rows:
            if self._part_rows == self._rows_per_part:
                self._close_part()
            count = min(rows - start, self._rows_per_part - self._part_rows)
            self._part(table.schema).write_table(table.slice(start, count), self._row_group_rows)
            self._part_rows += count
            start += count
        self._pending = [] if table is None else [table.slice(rows)]
        self._pending_rows -= rows

    def _part(self, schema: pa.Schema) -> pq.ParquetWriter:
        if self._writer is None:
            path = part_file(self._folder, self._split, self._next_part)
            path.parent.mkdir(exist_ok=True)
            self._writer = pq.ParquetWriter(
                path, schema, compression=COMPRESSION, write_page_checksum=True
            )
            self._next_part += 1
        return self._writer

    def _close_part(self) -> None:
        writer, self._writer = self._writer, None
        self._part_rows = 0
        if writer is not None:
            writer.close()


def write_split(
    folder: Path,
    split: str,
    batches: Iterable[pa.Table | pa.RecordBatch],
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
    rows_per_file: int = ROWS_PER_FILE,
) -> int:
    """Write all the batches as one split; the number of rows."""
    sizes = {"row_group_rows": row_group_rows, "rows_per_file": rows_per_file}
    with SplitWriter(folder, split, **sizes) as writer:
        for batch in batches:
            writer.write(batch)
    return writer.rows


@contextlib.contextmanager
def new_dataset(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` at the end, and vanishes on any error.

    `overwrite` replaces a data set (a folder with a `dataset.json`), never anything else.
    """
    out = out.resolve()
    check_replaceable(out, overwrite)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.new")
    with told_as_unwritable(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            move_into_place(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def told_as_unwritable(out: Path) -> Iterator[None]:
    """What the system refuses becomes a UserError about the data set `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the data set {out}: {_reason(error)}; nothing was left there"
        ) from error


def check_replaceable(out: Path, overwrite: bool) -> None:
    """RequestError where a data set may not be written to `out`."""
    try:
        nearest = next(path for path in (out, *out.parents) if path.exists())
        if not nearest.is_dir():
            raise RequestError(f"{nearest} is a file: name a folder to write the data set to")
        if nearest != out:
            return
        if not any(out.iterdir()):
            return
        is_dataset = (out / INFO_FILE).is_file()
    except OSError as error:
        raise UserError(f"cannot read {out}: {_reason(error)}") from error
    if overwrite and not is_dataset:
        raise RequestError(
            f"{out} is not empty and holds no {INFO_FILE}, so it is no data set to overwrite: "
            "name another folder, or remove this one yourself"
        )
    if not overwrite:
        choice = "replace it with --overwrite, or " if is_dataset else ""
        raise RequestError(f"{out} exists and is not empty: {choice}name another folder")


def move_into_place(temporary: Path, out: Path) -> None:
    """Rename `temporary` to `out`; what was there stays until it is, and comes back if it fails."""
    replaced = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    if out.exists() and any(out.iterdir()):
        out.rename(replaced)
        try:
            temporary.rename(out)
        except BaseException:
            replaced.rename(out)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        temporary.rename(out)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
