"""Lines of text -> a table of declared columns, every value checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from planner.validation import shorten
from shardemb.data.convert_schema import ConvertSchema
from shardemb.data.text_files import LineError, too_long

_VALUE_TYPES = {
    "label": pa.float32(),
    "number": pa.float32(),
    "int": pa.int64(),
    "string": pa.string(),
}
_EXPECTED = {
    "label": "a number from 0 to 1",
    "number": "a finite number of 32 bits",
    "int": "an integer of 64 bits",
    "string": "text in UTF-8",
}


# A longer line is refused: Arrow takes lines up to the size of its blocks, which pay when small.
ARROW_BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class Column:
    """One column to keep. `weighs` is the column whose values these are the weights of."""

    name: str
    kind: Literal["label", "number", "int", "string"]
    is_list: bool = False
    weighs: str | None = None

    @property
    def type(self) -> pa.DataType:
        return pa.list_(_VALUE_TYPES[self.kind]) if self.is_list else _VALUE_TYPES[self.kind]

    @property
    def expected(self) -> str:
        expected = _EXPECTED[self.kind]
        if self.weighs:
            return f"{expected} for each value in column {self.weighs}"
        if self.is_list:
            return f"a list, each value {expected}"
        return expected if self.kind == "label" else f"{expected}, or nothing"

    def accepts(self, table: pa.Table) -> bool:
        """Whether its values in `table` are all allowed; their type is right already."""
        array = table[self.name].combine_chunks()
        values = array.flatten() if self.is_list else array
        if self.kind == "label":
            in_range = pc.and_(pc.greater_equal(values, 0.0), pc.less_equal(values, 1.0))
            return values.null_count == 0 and _all(in_range)
        if self.weighs and self.weighs in table.column_names:
            weights, weighed = (
                lengths_of_rows(table[self.name]),
                lengths_of_rows(table[self.weighs]),
            )
            if values.null_count or not np.array_equal(weights, weighed):
                return False
        return self.kind != "number" or _all(pc.is_finite(values))


def _all(condition: pa.Array) -> bool:
    return bool(pc.all(condition, min_count=0).as_py())


def lengths_of_rows(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """How many values each row has: a null is none."""
    if pa.types.is_list(column.type):
        return pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return pc.is_valid(column).cast(pa.int32()).to_numpy()


def map_values(array: pa.Array, function: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """`function` of the values, or of those in the lists."""
    if not pa.types.is_list(array.type):
        return function(array)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, function(array.flatten()), mask=array.is_null())


def declared_columns(schema: ConvertSchema) -> tuple[Column, ...]:
    """The columns that `schema` names, in the order of the data set."""
    columns = [Column(schema.label, "label")]
    columns += [Column(name, "number") for name in schema.dense]
    for name, feature in schema.sparse.items():
        columns.append(Column(name, feature.kind, feature.list))
        if feature.weights:
            columns.append(Column(feature.weights, "number", feature.list, weighs=name))
    return tuple(columns)


@dataclass(frozen=True)
class DeclaredFormat(ABC):
    """Reads `columns` out of lines; a format says how."""

    columns: tuple[Column, ...]
    block_bytes: int

    @property
    @abstractmethod
    def has_header(self) -> bool:
        """Whether the first line of a file holds names instead of values."""

    @abstractmethod
    def check_header(self, header: bytes) -> None:
        """LineError where a declared column is missing or there twice."""

    @abstractmethod
    def read(self, lines: bytes, header: bytes, columns: Sequence[Column]) -> pa.Table:
        """ValueError where the lines are broken, or a value has another type than its column."""

    @abstractmethod
    def values(self, line: bytes, header: bytes) -> Mapping[str, object]:
        """A line's values by column, to show; LineError says why a line has none."""

    def parse(self, lines: bytes, header: bytes) -> pa.Table:
        """One row for each line; LineError names the first one that is wrong."""
        try:
            return self._checked(lines, header, self.columns)
        except ValueError as error:  # what Arrow raises is one
            raise self._first_mistake(lines, header, error) from error

    def _checked(self, lines: bytes, header: bytes, columns: Sequence[Column]) -> pa.Table:
        table = self.read(lines, header, columns)
        if table.num_rows != lines.count(b"\n"):
            raise ValueError(
                "a line is no row: it is empty, or a value in quotes goes over its end"
            )
        for column in columns:
            if not column.accepts(table):
                raise ValueError(f"column {column.name}: a value is not {column.expected}")
        return table

    def _first_mistake(self, lines: bytes, header: bytes, error: ValueError) -> LineError:
        """Halves the lines until one is left: what parses slowly is what parses fast."""
        rows = lines.split(b"\n")[:-1]
        first, stop = 0, len(rows)
        while stop - first > 1:
            middle = (first + stop) // 2
            if self._is_good(b"\n".join(rows[first:middle]) + b"\n", header, self.columns):
                first = middle
            else:
                stop = middle
        problem = self._problem(rows[first] + b"\n", header)
        return LineError(first + 1, problem or f" or a line before it: {error}")

    def _is_good(self, lines: bytes, header: bytes, columns: Sequence[Column]) -> bool:
        try:
            self._checked(lines, header, columns)
        except ValueError:
            return False
        return True

    def _problem(self, line: bytes, header: bytes) -> str | None:
        if len(line) > ARROW_BLOCK_BYTES:
            return too_long(1, ARROW_BLOCK_BYTES).problem
        try:
            values = self.values(line, header)
        except LineError as error:
            return error.problem
        by_name = {column.name: column for column in self.columns}
        for column in self.columns:
            needed = [by_name[column.weighs]] if column.weighs else []
            if not self._is_good(line, header, [*needed, column]):
                found = shorten(values.get(column.name))
                return f", column {column.name}: found {found}, expected {column.expected}"
        return None
