"""Values of a feature to rows of its table: as they are, hashed, or through a vocabulary."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from planner import UserError
from shardemb.data.hashing import hash_ids, mix64, strings_to_ids
from shardemb.data.schema import BatchSchema, FeatureSchema
from shardemb.data.sources import first_line, open_parquet, read_bytes

Ints = NDArray[np.int64]


def rows_of_values(
    values: pa.Array, feature: FeatureSchema, row_of: Callable[[int], str]
) -> NDArray[Any]:
    """`num_hashes` rows for each of `values`, one after the other.

    `row_of` says where a value is, for the message of the UserError if it names no row. Nulls are
    the feature's null_row; without one there must be none.
    """
    if is_text(values.type):
        values = strings_to_ids(values)
    is_null = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    ids = (pc.fill_null(values, 0) if values.null_count else values).to_numpy()
    if feature.ids == "as_is":
        _check_range(ids, feature, row_of)
        rows = ids
    else:
        # The cast wraps: ids beyond int64 are as good as any others.
        codes = ids.astype(np.int64, copy=False)
        rows = _hashed(codes, feature) if feature.ids == "hash" else _ranked(codes, feature)
    if is_null is not None and feature.null_row is not None:
        rows = np.where(np.repeat(is_null, feature.num_hashes), feature.null_row, rows)
    return rows


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _check_range(ids: NDArray[Any], feature: FeatureSchema, row_of: Callable[[int], str]) -> None:
    if len(ids) == 0:
        return
    if ids.dtype == np.int64:
        if ids.view(np.uint64).max() < feature.num_embeddings:  # negative ids are huge there
            return
    elif ids.min() >= 0 and ids.max() < feature.num_embeddings:
        return
    wrong = int(np.argmax((ids < 0) | (ids >= feature.num_embeddings)))
    raise UserError(
        f"{row_of(wrong)}: feature {feature.name} has id {ids[wrong]}, "
        f"outside table {feature.table}, whose rows are 0 to {feature.num_embeddings - 1}. Raise "
        f"tables.{feature.table}.num_embeddings above the largest id, or hash the ids into the "
        f"table with data.features.{feature.name}.ids: hash"
    )


def _hashed(codes: Ints, feature: FeatureSchema) -> Ints:
    seeds = range(feature.hash_seed, feature.hash_seed + feature.num_hashes)
    rows = [hash_ids(codes, feature.num_embeddings, feature.null_row, seed) for seed in seeds]
    return rows[0] if len(rows) == 1 else np.stack(rows, axis=1).reshape(-1)


# --- Vocabularies


def check_vocabularies(schema: BatchSchema) -> None:
    """UserError where a vocabulary cannot be read, or its table has too few rows for it."""
    for feature in schema.features:
        if feature.vocabulary is None:
            continue
        vocabulary = load_vocabulary(feature.vocabulary)
        if len(vocabulary.nulls) not in (0, feature.oov_rows):
            raise UserError(
                f"data.features.{feature.name}.oov_rows: {feature.oov_rows}, but the vocabulary "
                f"{feature.vocabulary} has {len(vocabulary.nulls)} nulls, its rows for all other "
                "values; set oov_rows to their number, or remove them"
            )
        needed = vocabulary.size + feature.oov_rows
        if needed > feature.num_embeddings:
            raise UserError(
                f"data.features.{feature.name}.vocabulary: {feature.vocabulary} and "
                f"oov_rows: {feature.oov_rows} need {needed} rows, table {feature.table} has "
                f"{feature.num_embeddings}; raise tables.{feature.table}.num_embeddings"
            )


def _ranked(codes: Ints, feature: FeatureSchema) -> Ints:
    """The rank of known values; others are hashed to the vocabulary's rows for them."""
    assert feature.vocabulary is not None
    vocabulary = load_vocabulary(feature.vocabulary)
    rows = vocabulary.ranks(codes)
    unknown = np.flatnonzero(rows < 0)
    hashed = hash_ids(codes[unknown], feature.oov_rows, seed=feature.hash_seed)
    rows[unknown] = vocabulary.oov_rows(feature.oov_rows)[hashed]
    return rows


class Vocabulary:
    """Distinct values and their ranks in a hash table with linear probing, a third full at most.

    The ranks `nulls` are no value's: they are rows that all other values share. Vectorized: all
    values take their next probe together.
    """

    def __init__(self, codes: Ints, *, is_text: bool, nulls: Ints | None = None) -> None:
        self.size, self.is_text = len(codes), is_text
        self.nulls = np.empty(0, np.int64) if nulls is None else nulls
        own = np.delete(np.arange(self.size + len(self.nulls)), self.nulls)
        self._mask = np.uint64((1 << max(2, 3 * self.size).bit_length()) - 1)
        self._codes = np.zeros(int(self._mask) + 1, np.int64)
        self._ranks = np.full(int(self._mask) + 1, -1, np.int64)
        pending, slots = np.arange(self.size), self._first_slots(codes)
        while len(pending):
            free = np.flatnonzero(self._ranks[slots] < 0)
            taken, first = np.unique(slots[free], return_index=True)
            settled = free[first]
            self._codes[taken] = codes[pending[settled]]
            self._ranks[taken] = own[pending[settled]]
            pending, slots = np.delete(pending, settled), np.delete(slots, settled)
            slots = self._next(slots)

    def ranks(self, codes: Ints) -> Ints:
        """Of each code, or -1 where it is none of the vocabulary's."""
        found = np.full(len(codes), -1, np.int64)
        pending, slots = np.arange(len(codes)), self._first_slots(codes)
        while len(pending):
            ranks = self._ranks[slots]
            is_it = self._codes[slots] == codes[pending]
            found[pending[is_it]] = ranks[is_it]
            goes_on = ~is_it & (ranks >= 0)
            pending, slots = pending[goes_on], self._next(slots[goes_on])
        return found

    def oov_rows(self, count: int) -> Ints:
        """Rows of all other values, of which there are `count`."""
        return self.nulls if len(self.nulls) else np.arange(self.size, self.size + count)

    def _first_slots(self, codes: Ints) -> Ints:
        return (mix64(codes) & self._mask).view(np.int64)

    def _next(self, slots: Ints) -> Ints:
        return np.asarray((slots + 1) & np.int64(self._mask))


@cache
def load_vocabulary(path: str) -> Vocabulary:
    """From the column `value` of a Parquet file, or from a text file with a value a line."""
    values = _read_values(path)
    nulls = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
    values = values.drop_null()
    codes = strings_to_ids(values) if is_text(values.type) else values.cast(pa.int64())
    counts = pc.value_counts(codes)
    most = pc.index(counts.field("counts"), pc.max(counts.field("counts"))).as_py()
    if len(counts) < len(codes):
        place = pc.index(codes, counts.field("values")[most]).as_py()
        raise UserError(f"the vocabulary {path} has the value {values[place]} twice; remove one")
    return Vocabulary(codes.to_numpy(), is_text=is_text(values.type), nulls=nulls)


def _read_values(path: str) -> pa.Array:
    try:
        if path.endswith(".parquet"):
            with open_parquet(path) as file:
                values = file.read(["value"])["value"].combine_chunks()
        else:
            lines = io.StringIO(read_bytes(path).decode(), newline=None)
            values = pa.array([line.rstrip("\n") for line in lines], pa.string())
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read the vocabulary {path} ({first_line(error)}): it must be a Parquet file "
            "with a column `value`, or a text file with a value a line"
        ) from error
    if not (is_text(values.type) or pa.types.is_integer(values.type)):
        raise UserError(f"the vocabulary {path} has values of {values.type}: integers or text only")
    return values
