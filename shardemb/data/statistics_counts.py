"""What is counted of a batch, and how counts of parts of the data are put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from planner.tables import REUSE_BINS
from shardemb.data.hashing import strings_to_ids
from shardemb.data.ids import is_text, rows_of_values
from shardemb.data.statistics_ids import Floats, IdCounts, Ints, combine
from shardemb.data.statistics_input import Columns, SparseFeature

# Of all features together; up to 64 bytes each, with what is being put in place.
MOST_IDS = 1 << 24
MOST_IDS_OF_FEATURE = 1 << 21


def limit_of_ids(num_features: int) -> int:
    """Distinct ids of one feature that are counted exactly."""
    return min(MOST_IDS_OF_FEATURE, MOST_IDS // max(num_features, 1))


def reuse_lookups(counts: Ints) -> Ints:
    """[REUSE_BINS]: lookups by how often their row occurs, once, 2, 3-4, 5-8, ... times.

    `counts` has the occurrences of each row in a batch.
    """
    exponents = np.frexp((counts - 1).astype(np.float64))[1]  # of 2^i the smallest i >= log2(count)
    bins = np.minimum(exponents, REUSE_BINS - 1)
    return np.bincount(bins, counts, minlength=REUSE_BINS).astype(np.int64)


@dataclass(frozen=True)
class Lookups:
    """What some rows look up of one feature."""

    ids: Ints  # in any order
    lengths: Ints  # [rows]: how many ids each row has, and nulls that a row stands for
    nulls: int  # ids and lists
    null_ids: int  # nulls that a row stands for, without an id

    @classmethod
    def of_array(cls, array: pa.Array, feature: SparseFeature) -> Lookups:
        values, lengths, nulls = array, np.ones(len(array), np.int64), array.null_count
        if pa.types.is_nested(array.type):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            values = array.flatten()
            nulls += values.null_count
        null_ids = values.null_count
        if null_ids and feature.null_row is None:
            # A null names no row: it adds nothing to its bag.
            is_id = values.is_valid().to_numpy(zero_copy_only=False)
            row_of_id = np.repeat(np.arange(len(lengths)), lengths)[is_id]
            lengths = np.bincount(row_of_id, minlength=len(lengths))
        ids = _integers(values.drop_null())
        if feature.null_row is None:
            null_ids = 0
        elif feature.ids == "as_is":
            ids, null_ids = np.append(ids, np.full(null_ids, feature.null_row)), 0
        return cls(ids, lengths.astype(np.int64), nulls, null_ids)

    @classmethod
    def of_batch(cls, batch: Sequence[pa.RecordBatch], feature: SparseFeature) -> Lookups:
        pieces = [cls.of_array(piece.column(feature.column), feature) for piece in batch]
        return cls(
            ids=np.concatenate([piece.ids for piece in pieces]),
            lengths=np.concatenate([piece.lengths for piece in pieces]),
            nulls=sum(piece.nulls for piece in pieces),
            null_ids=sum(piece.null_ids for piece in pieces),
        )


def _integers(values: pa.Array) -> Ints:
    if is_text(values.type):
        values = strings_to_ids(values)
    # The cast wraps, as it does in training: ids beyond int64 are negative there too.
    return pc.cast(values, pa.int64(), safe=False).to_numpy(zero_copy_only=False)


@dataclass
class FeatureCounts:
    """Of one sparse feature, over any part of the rows.

    An id makes `num_hashes` lookups: that many count for it everywhere but in `out_of_range`.
    """

    feature: SparseFeature
    ids: IdCounts
    nulls: int = 0
    null_lookups: int = 0  # of the row that stands for nulls, where it has no id
    out_of_range: int = 0
    largest_id: int = -1
    lengths: Counter[int] = field(default_factory=Counter)  # how many rows make so many lookups
    reuse: Ints = field(default_factory=lambda: np.zeros(REUSE_BINS, np.int64))

    def add(self, lookups: Lookups) -> tuple[Ints, Ints]:
        """The rows of the table that are looked up, and how often each is."""
        hashes = self.feature.num_hashes
        self.nulls += lookups.nulls
        self.null_lookups += lookups.null_ids * hashes
        lengths, rows = np.unique(lookups.lengths * hashes, return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), rows.tolist(), strict=True)))
        ids, counts = np.unique(lookups.ids, return_counts=True)
        self.ids.add(ids, counts * hashes)
        if self.feature.ids == "as_is" and len(ids):
            is_outside = (ids < 0) | (ids >= (self.feature.num_embeddings or np.inf))
            self.out_of_range += int(counts[is_outside].sum())
            self.largest_id = max(self.largest_id, int(ids[-1]))
        return self._rows(ids, counts, lookups.null_ids * hashes)

    def _rows(self, ids: Ints, counts: Ints, null_lookups: int) -> tuple[Ints, Ints]:
        feature = self.feature
        if feature.ids == "as_is" or feature.schema is None:
            return ids, counts
        rows = rows_of_values(pa.array(ids), feature.schema, row_of=str)
        counts = np.repeat(counts, feature.num_hashes)
        if null_lookups:
            rows, counts = np.append(rows, feature.null_row or 0), np.append(counts, null_lookups)
        return combine(rows, counts)

    def merge(self, other: FeatureCounts) -> None:
        self.ids.merge(other.ids)
        self.nulls += other.nulls
        self.null_lookups += other.null_lookups
        self.out_of_range += other.out_of_range
        self.largest_id = max(self.largest_id, other.largest_id)
        self.lengths.update(other.lengths)
        self.reuse += other.reuse


@dataclass
class Moments:
    """Of one dense column, over any part of the rows; mean and squares of the finite numbers."""

    nulls: int = 0
    nans: int = 0
    infinite: int = 0
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared differences from the mean
    smallest: float = np.inf
    largest: float = -np.inf

    @classmethod
    def of_batch(cls, batch: Sequence[pa.RecordBatch], column: str) -> Moments:
        arrays = [piece.column(column) for piece in batch]
        values = np.concatenate([_floats(array.drop_null()) for array in arrays])
        finite = values[np.isfinite(values)]
        moments = cls(
            nulls=sum(array.null_count for array in arrays),
            nans=int(np.isnan(values).sum()),
            infinite=int(np.isinf(values).sum()),
            count=len(finite),
        )
        if len(finite):
            with np.errstate(over="ignore", invalid="ignore"):
                moments.mean = float(finite.mean())
                moments.squares = float(np.square(finite - moments.mean).sum())
            moments.smallest, moments.largest = float(finite.min()), float(finite.max())
        return moments

    def merge(self, other: Moments) -> None:
        """Chan, Golub and LeVeque's update of mean and squares (1979)."""
        self.nulls += other.nulls
        self.nans += other.nans
        self.infinite += other.infinite
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        if not other.count:
            return
        count = self.count + other.count
        apart = other.mean - self.mean
        self.mean += apart * (other.count / count)
        self.squares += other.squares + apart * apart * (self.count * other.count / count)
        self.count = count


def _floats(array: pa.Array) -> Floats:
    numbers: NDArray[np.float64] = pc.cast(array, pa.float64(), safe=False).to_numpy(
        zero_copy_only=False
    )
    return numbers


class Counts:
    """Everything that is counted, over any part of the rows that ends with a batch.

    Histograms of reuse are of batches of `batch_size` rows: a shorter last one has less reuse
    and is not in them.
    """

    def __init__(self, columns: Columns, batch_size: int) -> None:
        limit = limit_of_ids(len(columns.sparse))
        self.columns = columns
        self.batch_size = batch_size
        self.rows = 0
        self.batches = 0  # of batch_size rows
        self.features = [FeatureCounts(feature, IdCounts(limit)) for feature in columns.sparse]
        self.dense = {name: Moments() for name in columns.dense}
        self.table_reuse = {name: np.zeros(REUSE_BINS, np.int64) for name in columns.tables}

    def add(self, batch: Sequence[pa.RecordBatch]) -> None:
        """Count the next `batch_size` rows, or what is left of them."""
        rows = sum(piece.num_rows for piece in batch)
        self.rows += rows
        touched = {
            counts.feature.name: counts.add(Lookups.of_batch(batch, counts.feature))
            for counts in self.features
        }
        for name, moments in self.dense.items():
            moments.merge(Moments.of_batch(batch, name))
        if rows == self.batch_size:
            self._add_reuse(touched)

    def _add_reuse(self, touched: dict[str, tuple[Ints, Ints]]) -> None:
        self.batches += 1
        for counts in self.features:
            counts.reuse += reuse_lookups(touched[counts.feature.name][1])
        for table, features in self.columns.tables.items():
            rows, times = zip(*(touched[name] for name in features), strict=True)
            self.table_reuse[table] += reuse_lookups(
                combine(np.concatenate(rows), np.concatenate(times))[1]
            )

    def merge(self, other: Counts) -> None:
        """Add those of the rows that follow."""
        self.rows += other.rows
        self.batches += other.batches
        for mine, theirs in zip(self.features, other.features, strict=True):
            mine.merge(theirs)
        for name, moments in other.dense.items():
            self.dense[name].merge(moments)
        for name, reuse in other.table_reuse.items():
            self.table_reuse[name] += reuse
