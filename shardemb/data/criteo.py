"""Criteo's tab-separated click log -> a data set, streamed in constant memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from planner.errors import RequestError
from shardemb.data.conversion import READING, Conversion, convert
from shardemb.data.convert_schema import VocabularySchema
from shardemb.data.dataset import DatasetInfo
from shardemb.data.splitting import TestRows
from shardemb.data.text_files import LineError, expand_sources

LABEL = "label"
DENSE = [f"I{i}" for i in range(1, 14)]
SPARSE = [f"C{i}" for i in range(1, 27)]
COLUMNS = [LABEL, *DENSE, *SPARSE]

Categoricals = Literal["hex", "int"]

# Lines are read in blocks so that memory stays constant and a mistake can be found by its line.
_BLOCK_BYTES = 8 << 20
_ARROW_BLOCK_BYTES = 2 << 20  # of four sizes tried, the fastest to parse with two threads
# Arrow reads " 7" and "0x7" as integers; Criteo's files have neither.
_SUSPECT = re.compile(rb"[ \r]|0[xX]")


@dataclass(frozen=True)
class CriteoFormat:
    """One tab-separated line a row, all columns in Criteo's order."""

    categoricals: Categoricals
    block_bytes: int

    has_header = False

    def check_header(self, header: bytes) -> None:
        """There is none."""

    def parse(self, lines: bytes, header: bytes) -> pa.Table:
        """LineError names the first line that is wrong."""
        try:
            return _parse(lines, self.categoricals)
        except pa.ArrowInvalid as error:
            mistake = _first_mistake(lines, self.categoricals)
            raise mistake or LineError(1, f" or one of those after it: {error}") from error


def criteo_conversion(
    sources: Iterable[str | Path],
    *,
    test_rows: int = 0,
    categoricals: Categoricals = "hex",
    vocabulary: VocabularySchema | None = None,
    row_group_rows: int | None = None,
) -> Conversion:
    """The last `test_rows` lines become the test split; missing values become nulls.

    With a `vocabulary`, every categorical becomes its rank by frequency.
    """
    if categoricals not in ("hex", "int"):
        raise RequestError(f"categoricals is {categoricals!r}: choose hex or int")
    return Conversion(
        format="criteo",
        lines=CriteoFormat(categoricals, _BLOCK_BYTES),
        sources=expand_sources(sources),
        label=LABEL,
        dense=tuple(DENSE),
        sparse=tuple(SPARSE),
        test=TestRows(test_rows),
        vocabularies=dict.fromkeys(SPARSE, vocabulary) if vocabulary else {},
        row_group_rows=row_group_rows,
    )


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
    """Convert one file. `on_progress` is given the number of rows read so far."""
    conversion = criteo_conversion(
        [source], test_rows=test_rows, categoricals=categoricals, row_group_rows=row_group_rows
    )

    def report(step: str, done: int) -> None:
        if on_progress is not None and step == READING:
            on_progress(done)

    return convert(conversion, out, overwrite=overwrite, on_progress=report)


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


def _first_mistake(lines: bytes, categoricals: Categoricals) -> LineError | None:
    """Where and what the first mistake is: a slow second look at lines that did not parse."""
    for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n"), start=1):
        values = line.decode("utf-8", "backslashreplace").split("\t")
        if len(values) != len(COLUMNS):
            found = f"has {len(values)} columns" if line else "is empty"
            return LineError(number, f" {found}: {len(COLUMNS)} are expected, separated by tabs")
        for name, value in zip(COLUMNS, values, strict=True):
            expected = _expected(name, value, categoricals)
            if expected:
                shown = repr(value if len(value) <= 60 else value[:57] + "...")
                return LineError(number, f", column {name}: found {shown}, expected {expected}")
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
