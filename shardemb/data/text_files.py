"""Text files as blocks of whole lines, which can be read in any order and by any process."""

from __future__ import annotations

import codecs
import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from planner.errors import RequestError, UserError

# The first bytes of a file say how it is compressed; its name may lie.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
}


class LineError(Exception):
    """A line that is not what it should be; lines count from 1, from where the block starts."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line, self.problem = line, problem


@dataclass(frozen=True)
class Source:
    """One file of lines. `header` is its first line where that holds no row, else empty."""

    path: Path
    compression: str | None
    size: int
    modified_ns: int
    header: bytes

    @property
    def first_line(self) -> int:
        """The number of the first line that holds a row."""
        return 2 if self.header else 1

    def check_unchanged(self) -> None:
        """UserError where the file is no longer what it was when it was opened."""
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
            raise UserError(f"{self.path} was written to while it was read: convert it again")


@dataclass(frozen=True)
class Block:
    """The lines whose first byte is at `begin` or later, before `end`; or `text`, where a
    compressed file cannot be entered in its middle."""

    source: int
    number: int
    path: Path
    begin: int = 0
    end: int = 0
    text: bytes | None = None

    def read(self) -> bytes:
        """Its lines, each ended by a newline alone; LineError where one is longer than a block."""
        lines = self._read_range() if self.text is None else self.text
        if self.number == 0:
            lines = lines.removeprefix(codecs.BOM_UTF8)
        if lines and not lines.endswith(b"\n"):
            lines += b"\n"
        return lines.replace(b"\r\n", b"\n") if b"\r" in lines else lines

    def _read_range(self) -> bytes:
        limit = self.end - self.begin
        with self.path.open("rb") as file:
            if self.number:  # the line that began before this block is not its own
                file.seek(self.begin - 1)
                file.readline(limit + 1)
            else:
                file.seek(self.begin)
            lines = file.read(max(0, self.end - file.tell()))
            if lines and not lines.endswith(b"\n"):
                lines += file.readline(limit + 1)
        last = lines.rfind(b"\n", 0, -1) + 1
        if len(lines) - last > limit + 1:
            raise too_long(lines.count(b"\n", 0, last) + 1, limit)
        return lines


def too_long(line: int, limit: int) -> LineError:
    return LineError(
        line, f" is longer than {limit >> 20} MiB: this is no file of rows as declared"
    )


def expand_sources(names: Iterable[str | Path]) -> tuple[Path, ...]:
    """The files that paths and globs name, each once."""
    paths = [path for name in names for path in _expand(str(name))]
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise RequestError(f"{min(twice)} is named twice: its rows would be taken twice")
    return tuple(paths)


def _expand(name: str) -> list[Path]:
    if Path(name).exists():
        paths = [Path(name)]
    else:
        paths = [Path(path) for path in sorted(glob.glob(name, recursive=True))]
    if not paths:
        raise RequestError(f"{name}: there is no such file")
    for path in paths:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise RequestError(f"{path} is {kind}: name files, or a glob of them in quotes")
    return paths


def open_source(path: Path, *, has_header: bool, block_bytes: int) -> Source:
    """Look at `path`: how it is compressed, and its first line."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        compression = next((c for m, c in _MAGIC.items() if magic.startswith(m)), None)
        with pa.input_stream(str(path), compression=compression) as stream:
            start = stream.read(block_bytes if has_header else 1)
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, 1, error) from error
    if not start:
        raise UserError(f"{path} is empty: there are no rows to convert")
    header = start[: start.find(b"\n") + 1 or len(start)] if has_header else b""
    if len(header) == block_bytes:
        raise UserError(f"{path}, line 1{too_long(1, block_bytes).problem}")
    return Source(path, compression, status.st_size, status.st_mtime_ns, header)


def read_blocks(source: Source, index: int, block_bytes: int) -> Iterator[Block]:
    """All rows of `source`, the `index`-th, in order."""
    if source.compression is None:
        for number, begin in enumerate(range(len(source.header), source.size, block_bytes)):
            yield Block(index, number, source.path, begin, begin + block_bytes)
        return
    for number, text in enumerate(_decompress(source, block_bytes)):
        yield Block(index, number, source.path, text=text)


def _decompress(source: Source, block_bytes: int) -> Iterator[bytes]:
    line = source.first_line
    try:
        with pa.input_stream(str(source.path), compression=source.compression) as stream:
            stream.read(len(source.header))
            rest = b""
            while data := stream.read(block_bytes):
                lines, newline, tail = data.rpartition(b"\n")
                if newline:
                    yield rest + lines + newline
                    line += lines.count(b"\n") + 1
                rest = tail if newline else rest + tail
                if len(rest) > block_bytes:
                    raise UserError(f"{source.path}, line {line}{too_long(1, block_bytes).problem}")
            if rest:
                yield rest
    except OSError as error:
        raise _unreadable(source.path, line, error) from error


def _unreadable(path: Path, line: int, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read beyond line {line:,}: {error}; a truncated or damaged file must "
        "be fetched again"
    )
