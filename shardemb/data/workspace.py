"""A folder beside a data set in the making, which outlives a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from planner.errors import UserError
from planner.files import replace_file
from shardemb.data.dataset import check_replaceable, move_into_place, told_as_unwritable


@dataclass(frozen=True)
class Workspace:
    """`staged` is for what only the work needs; `dataset` becomes the data set."""

    folder: Path
    resumed: bool

    @property
    def staged(self) -> Path:
        return self.folder / "staged"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"


@contextmanager
def resumable_dataset(out: Path, request: str, *, overwrite: bool = False) -> Iterator[Workspace]:
    """As `new_dataset`, but a killed process leaves its work to the next one with this `request`.

    Work for another request is thrown away, as is that of one which ended with an error.
    """
    out = out.resolve()
    check_replaceable(out, overwrite)
    folder = out.with_name(f".{out.name}.converting")
    with told_as_unwritable(out):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, out):
            try:
                workspace = Workspace(folder, _holds_work_for(folder, request))
                if not workspace.resumed:
                    _start_anew(workspace, request)
                yield workspace
                move_into_place(workspace.dataset, out)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path, out: Path) -> Iterator[None]:
    directory = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"another conversion is writing {out}: wait for it, or name another folder"
        ) from error
    finally:
        os.close(directory)


def _holds_work_for(folder: Path, request: str) -> bool:
    path = folder / "request.txt"
    return path.is_file() and path.read_bytes() == request.encode()


def _start_anew(workspace: Workspace, request: str) -> None:
    for path in workspace.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    workspace.staged.mkdir()
    workspace.dataset.mkdir()
    replace_file(workspace.folder / "request.txt", request)


def finished_rows(path: Path) -> int | None:
    """The rows of a Parquet file; None where it is not there, or was not written to its end.

    A Parquet file ends with its footer, so that no list of finished files need be kept.
    """
    try:
        return int(pq.read_metadata(path).num_rows)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
