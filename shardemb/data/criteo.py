"""Criteo's tab-separated click log -> a data set, streamed in constant memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from planner.errors import RequestError, UserError
from shardemb.data.dataset import (
    DatasetInfo,
    SplitWriter,
    default_row_group_rows,
    new_dataset,
    write_info,
)

LABEL = "label"
DENSE = [f"I{i}" for i in range(1, 14)]
SPARSE = [f"C{i}" for i in range(1, 27)]
COLUMNS = [LABEL, *DENSE, *SPARSE]

Categoricals = Literal["hex", "int"]

# Lines are read in blocks so that memory stays constant and a mistake can be found by its line.
_BLOCK_BYTES = 8 << 20
_ARROW_BLOCK_BYTES = 2 << 20  # of four sizes tried, the fastest to parse with two threads
_GZIP_MAGIC = b"\x1f\x8b"
# Arrow reads " 7" and "0x7" as integers; Criteo's files have neither.
_SUSPECT = re.compile(rb"[ \r]|0[xX]")


def convert_criteo(
    source: Path,
    out: Path,
    *,
    test_rows: int = 0,
    categoricals: Categoricals = "hex",
    row_group_rows: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> DatasetInfo:
    """Convert `source` (plain or gzip); its last `test_rows` lines become the test split.

    Missing values become nulls. `on_progress` is given the number of rows done so far.
    """
    _check_request(source, test_rows, categoricals)
    train_rows = _train_rows(source, test_rows)

    def writer(split: str, rows: int | None) -> SplitWriter:
        size = default_row_group_rows(rows) if row_group_rows is None else row_group_rows
        return SplitWriter(folder, split, row_group_rows=size)

    with (
        new_dataset(out, overwrite=overwrite) as folder,
        writer("train", train_rows) as train,
        writer("test", test_rows) as test,
    ):
        for table in _read_tables(source, categoricals):
            room = table.num_rows if train_rows is None else train_rows - train.rows
            train.write(table.slice(0, room))
            test.write(table.slice(room))
            if on_progress is not None:
                on_progress(train.rows + test.rows)
        info = DatasetInfo(
            format="criteo",
            rows={"train": train.rows} | ({"test": test.rows} if test_rows else {}),
            label=LABEL,
            dense=DENSE,
            sparse=SPARSE,
        )
        write_info(folder, info)
    return info


def _check_request(source: Path, test_rows: int, categoricals: str) -> None:
    if not source.exists():
        raise RequestError(f"{source}: there is no such file")
    if not source.is_file():
        kind = "a folder" if source.is_dir() else "not a regular file"
        raise RequestError(f"{source} is {kind}: name one tab-separated file, plain or gzip")
    if test_rows < 0:
        raise RequestError(f"test_rows is {test_rows}: it must be 0 or more")
    if categoricals not in ("hex", "int"):
        raise RequestError(f"categoricals is {categoricals!r}: choose hex or int")


def _train_rows(source: Path, test_rows: int) -> int | None:
    """How many lines come before the test split; None without one, when no count is needed."""
    if test_rows == 0:
        return None
    rows = sum(block.count(b"\n") for _, block in _read_blocks(source))
    if test_rows >= rows:
        raise RequestError(
            f"{source} has {rows:,} rows, so {test_rows:,} for the test split leave none to train "
            f"on: set test_rows to at most {rows - 1:,}"
        )
    return rows - test_rows


def _read_tables(source: Path, categoricals: Categoricals) -> Iterator[pa.Table]:
    for first_line, block in _read_blocks(source):
        lines = block.replace(b"\r\n", b"\n") if b"\r" in block else block
        try:
            yield _parse(lines, categoricals)
        except pa.ArrowInvalid as error:
            mistake = _first_mistake(lines, first_line, categoricals)
            last_line = first_line + lines.count(b"\n") - 1
            where = mistake or f"in lines {first_line} to {last_line}: {error}"
            raise UserError(f"{source}, {where}") from error


def _read_blocks(source: Path) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines, each with the number of its first line."""
    line = 1
    try:
        with _open(source) as stream:
            rest = b""
            while data := stream.read(_BLOCK_BYTES):
                lines, newline, tail = data.rpartition(b"\n")
                if newline:
                    block = rest + lines + newline
                    yield line, block
                    line += block.count(b"\n")
                    rest = tail
                else:
                    rest += tail
                _check_line_length(source, line, rest)
            if rest:
                yield line, rest + b"\n"
    except OSError as error:
        raise UserError(
            f"{source} cannot be read beyond line {line:,}: {error}; a truncated or damaged file "
            "must be fetched again"
        ) from error
    if line == 1 and not rest:
        raise UserError(f"{source} is empty: there are no rows to convert")


def _open(source: Path) -> pa.NativeFile:
    with open(source, "rb") as file:
        is_gzip = file.read(2) == _GZIP_MAGIC
    return pa.input_stream(str(source), compression="gzip" if is_gzip else None)


def _check_line_length(source: Path, line: int, rest: bytes) -> None:
    if len(rest) > _BLOCK_BYTES:
        raise UserError(
            f"{source}, line {line} is longer than {_BLOCK_BYTES >> 20} MiB: this is not a "
            "tab-separated file of Criteo's format"
        )


def _parse(lines: bytes, categoricals: Categoricals) -> pa.Table:
    if _SUSPECT.search(lines):
        raise pa.ArrowInvalid("a blank, a carriage return or 0x in the text")
    ids = pa.dictionary(pa.int32(), pa.string()) if categoricals == "hex" else pa.int64()
    types = {LABEL: pa.int8(), **dict.fromkeys(DENSE, pa.int32()), **dict.fromkeys(SPARSE, ids)}
    table = csv.read_csv(
        pa.BufferReader(lines),
        csv.ReadOptions(column_names=COLUMNS, block_size=_ARROW_BLOCK_BYTES),
        csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
        csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
    )
    label = table[LABEL]
    if label.null_count or not pc.all(pc.is_in(label, pa.array([0, 1], pa.int8()))).as_py():
        raise pa.ArrowInvalid("a label is neither 0 nor 1")
    if categoricals == "hex":
        for name in SPARSE:
            column = pa.chunked_array(map(_hex_ids, table[name].chunks), pa.int64())
            table = table.set_column(table.column_names.index(name), name, column)
    return table


def _hex_ids(chunk: pa.DictionaryArray) -> pa.Array:
    """The integers that hexadecimal strings denote, each distinct string parsed once."""
    prefixed = pc.binary_join_element_wise("0x", chunk.dictionary, "")
    return prefixed.cast(pa.uint32()).cast(pa.int64()).take(chunk.indices)


def _first_mistake(lines: bytes, first_line: int, categoricals: Categoricals) -> str | None:
    """Where and what the first mistake is: a slow second look at lines that did not parse."""
    for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=first_line):
        values = line.decode("utf-8", "backslashreplace").split("\t")
        if len(values) != len(COLUMNS):
            found = f"has {len(values)} columns" if line else "is empty"
            return f"line {number} {found}: {len(COLUMNS)} are expected, separated by tabs"
        for name, value in zip(COLUMNS, values, strict=True):
            expected = _expected(name, value, categoricals)
            if expected:
                shown = repr(value if len(value) <= 60 else value[:57] + "...")
                return f"line {number}, column {name}: found {shown}, expected {expected}"
    return None


def _expected(name: str, value: str, categoricals: Categoricals) -> str | None:
    """What the column takes, if it does not take this value."""
    if name == LABEL:
        return (
            None if value in ("0", "1") else "0 or 1 (is this a header or a file without labels?)"
        )
    if not value:
        return None
    if name in DENSE:
        return None if _is_integer(value, bits=32) else "an integer of 32 bits, or nothing"
    if categoricals == "int":
        hint = "(hexadecimal ids need categoricals hex)"
        return None if _is_integer(value, bits=64) else f"an integer of 64 bits, or nothing {hint}"
    if re.fullmatch(r"[0-9a-fA-F]{1,8}", value):
        return None
    return "1 to 8 hexadecimal digits, or nothing (decimal ids need categoricals int)"


def _is_integer(value: str, bits: int) -> bool:
    if not re.fullmatch(r"-?[0-9]{1,20}", value):
        return False
    return -(1 << (bits - 1)) <= int(value) < 1 << (bits - 1)
