"""Files here or elsewhere: folders, globs and URLs of any filesystem that Arrow or fsspec knows."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from planner import UserError

SUFFIX = ".parquet"


def is_remote(path: str) -> bool:
    return "://" in path


def has_folder(path: str) -> bool:
    """Whether there is such a folder, or one that matches a glob."""
    return any(_kind(match) == pafs.FileType.Directory for match in matches_of(path))


def parquet_files(data: str | Path) -> list[str]:
    """The Parquet files of a folder, or of what a glob matches, in order of name."""
    path = str(data)
    matches = matches_of(path)
    if not matches and _is_glob(path):
        raise UserError(f"nothing matches {path}")
    if not matches:
        raise UserError(
            f"there is no folder {path}: data.dir must hold train/ and test/ folders of "
            "Parquet files, as `shardemb data convert` writes them"
        )
    return files_below(path, matches)


def matches_of(path: str) -> list[str]:
    """The path itself where there is such a file or folder, otherwise what it matches as a glob."""
    is_pattern = is_remote(path) and _is_glob(path)  # a URL's `?` begins its query otherwise
    if not is_pattern and _kind(path) != pafs.FileType.NotFound:
        return [path]
    return sorted(_glob(path)) if _is_glob(path) else []


def files_below(path: str, matches: Sequence[str]) -> list[str]:
    """Those of `matches` that are files, and the Parquet files of those that are folders, sorted;
    UserError, which says that `path` holds none, where there are none."""
    files = {file for match in matches for file in _below(match)}
    if not files:
        raise UserError(f"{path} holds no {SUFFIX} file")
    return sorted(files)


def _kind(path: str) -> pafs.FileType:
    filesystem, inner = filesystem_of(path) if is_remote(path) else (pafs.LocalFileSystem(), path)
    try:
        return filesystem.get_file_info(inner).type
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot reach {path}: {first_line(error)}") from error


def _is_glob(path: str) -> bool:
    return any(character in path for character in "*?[")


def _glob(pattern: str) -> list[str]:
    """Files and folders; `*` matches within a name, `**` any folders."""
    if not is_remote(pattern):
        return glob.glob(pattern, recursive=True)
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if _is_glob(part))
    found = _listing("/".join(parts[:fixed]))
    return [path for path, _ in found if _matches(path.split("/"), parts)]


def _below(path: str) -> Iterator[str]:
    """The Parquet files in a folder, or the file itself."""
    if _kind(path) != pafs.FileType.Directory:
        yield path
    elif not is_remote(path):
        yield from map(str, Path(path).rglob(f"*{SUFFIX}"))
    else:
        for inner, kind in _listing(path):
            if kind == pafs.FileType.File and inner.endswith(SUFFIX):
                yield inner


def open_parquet(path: str, **options: Any) -> pq.ParquetFile:
    """`path` opened to be read, a URL with its ranges read ahead in few requests."""
    if not is_remote(path):
        return pq.ParquetFile(path, **options)
    filesystem, inner = filesystem_of(path)
    return pq.ParquetFile(filesystem.open_input_file(inner), **{"pre_buffer": True, **options})


def open_file(path: str) -> IO[bytes]:
    """To be read at any place; raises OSError."""
    if not is_remote(path):
        return Path(path).open("rb")
    filesystem, inner = filesystem_of(path)
    stream: IO[bytes] = filesystem.open_input_file(inner)
    return stream


def open_text(path: str) -> IO[str]:
    """Lines of UTF-8, from a compressed file too; raises OSError."""
    filesystem, inner = filesystem_of(path) if is_remote(path) else (pafs.LocalFileSystem(), path)
    stream = filesystem.open_input_stream(inner, compression="detect")
    return io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n")


def read_bytes(path: str) -> bytes:
    """Raises OSError; FileNotFoundError where there is no such file."""
    if not is_remote(path):
        return Path(path).read_bytes()
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_stream(inner) as stream:
        return bytes(stream.read())


def first_line(error: BaseException) -> str:
    """Of what a library says: the others are about itself."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def filesystem_of(url: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's own for file, s3, gs and hdfs; fsspec's for all others."""
    scheme = url.partition("://")[0]
    try:
        return pafs.FileSystem.from_uri(url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    except OSError as error:  # hdfs without Java's libraries, s3 without a network
        raise UserError(f"cannot reach {url}: {first_line(error)}") from error
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: no filesystem for {scheme}:// is installed ({error})") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def _listing(url: str) -> list[tuple[str, pafs.FileType]]:
    """All that is below a URL, as URLs."""
    filesystem, inner = filesystem_of(url)
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except OSError as error:
        raise UserError(f"cannot reach {url}: {first_line(error)}") from error
    base, inner = url.rstrip("/"), inner.strip("/")
    names = [(info.path.strip("/").removeprefix(inner).strip("/"), info.type) for info in infos]
    return [(f"{base}/{name}", kind) for name, kind in names]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
