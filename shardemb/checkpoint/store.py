"""A folder of files, here or at any URL, each of which is written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from planner.files import partial_of
from shardemb.data.sources import filesystem_of, is_remote

Bytes = bytes | bytearray | memoryview


class Store:
    """`root` and the files below it, by names with slashes. Methods raise OSError."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/")
        self._remote = filesystem_of(self.root) if is_remote(self.root) else None

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def write(self, name: str, parts: Iterable[Bytes]) -> None:
        """What there is at `name` afterwards is all of `parts`; where that fails, what there was
        before or, at a URL, nothing."""
        if self._remote:
            self._write_remote(*self._remote, name, parts)
            return
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        try:
            with partial.open("wb", buffering=0) as file:
                for part in parts:
                    _write_all(file, part)
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @staticmethod
    def _write_remote(
        filesystem: pafs.FileSystem, root: str, name: str, parts: Iterable[Bytes]
    ) -> None:
        path = f"{root}/{name}"
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        try:
            with filesystem.open_output_stream(path) as stream:  # closed, the object appears
                for part in parts:
                    stream.write(part)
        except BaseException:
            filesystem.delete_file(path)
            raise

    def open(self, name: str) -> IO[bytes]:
        """To be read at any place; FileNotFoundError where there is none."""
        if self._remote:
            filesystem, inner = self._remote
            stream: Any = filesystem.open_input_file(f"{inner}/{name}")
            return stream
        return Path(self.path(name)).open("rb", buffering=0)

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def folders(self) -> list[str]:
        """Names of the folders in the root; none where there is no root."""
        if self._remote:
            filesystem, inner = self._remote
            selector = pafs.FileSelector(inner, allow_not_found=True)
            infos = filesystem.get_file_info(selector)
            return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)
        root = Path(self.root)
        return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []

    def delete_folder(self, name: str) -> None:
        """Nothing happens where there is none."""
        if self._remote:
            filesystem, inner = self._remote
            if filesystem.get_file_info(f"{inner}/{name}").type == pafs.FileType.Directory:
                filesystem.delete_dir(f"{inner}/{name}")
        else:
            shutil.rmtree(self.path(name), ignore_errors=True)


def _write_all(file: IO[bytes], part: Bytes) -> None:
    """Linux writes at most 2 GiB at once, and less where a disk is almost full."""
    rest = memoryview(part).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def _sync_folder(path: Path) -> None:
    """A new name survives a power cut once its folder is on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
