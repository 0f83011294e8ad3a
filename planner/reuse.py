"""What reuse histograms say: unique rows of a batch, and lookups that a cache serves.

A table's rows fall into classes. Bin i >= 1 of its histogram is a class of hot rows: looked up so
often in the batch that was counted, they are looked up about as often in any other. Class 0 is all
other rows of the table. That one of them was looked up once says little: as Good and Turing found,
what was seen once has about the share of lookups that is left for what was not seen at all. So
bin 0's share is spread evenly over class 0, most of which that batch did not touch: too few hits,
if anything, since real tails have hotter and colder rows too.

Within a class all rows are equally hot. A table without a histogram has class 0 alone: uniform
draws, the least reuse there can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.shards import Floats, Ints, TableColumns
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS

DEFAULT_LOAD_FACTOR = 0.2  # TorchRec's
# For tables whose reuse is not known: larger caches for where there is room.
LOAD_FACTORS = (DEFAULT_LOAD_FACTOR, 0.5, 0.8)
HIT_RATES = (0.5, 0.8, 0.95, 0.99)  # caches that serve these shares of the lookups are considered
SMALLEST_LOAD_FACTOR, LARGEST_LOAD_FACTOR = 0.001, 0.5

_HOTTEST_FIRST = (*range(REUSE_BINS - 1, 0, -1), 0)
_TINY = 1e-30  # a divisor instead of 0 where the quotient does not matter


def _mean_counts() -> Floats:
    """Lookups of a row of each bin.

    The harmonic mean of the bin's counts: right where its lookups are spread evenly over them.
    That gives the unique rows that Meta's dlrm_datasets report within 1%. The last bin is taken
    to end at twice its start, which matters little: its rows are few.
    """
    bins = [range(2 ** (i - 1) + 1, 2**i + 1) for i in range(1, REUSE_BINS)]
    return np.array([1.0, *(len(bin_) / np.sum(1 / np.array(bin_)) for bin_ in bins)])


MEAN_COUNTS = _mean_counts()


@dataclass(frozen=True)
class _Classes:
    """The classes of each table: [REUSE_BINS, tables], or [tables]."""

    rows: Floats
    shares: Floats  # of the lookups
    seen_once: Floats  # [tables]: rows of class 0 that the counted batch looked up
    counted: Floats  # [tables]: lookups of the counted batch; 0 without a histogram


def _classes(tables: TableColumns) -> _Classes:
    lookups = REUSE_BATCH_SIZE * tables.pooling_factor * tables.num_features
    histogram = tables.reuse_histogram.reshape(-1, REUSE_BINS)
    is_known = ~np.isnan(histogram[:, 0]) & (lookups > 0)
    uniform = np.eye(1, REUSE_BINS)
    shares = np.where(is_known[:, None], histogram, uniform).T
    shares = np.ascontiguousarray(shares / shares.sum(axis=0))  # a histogram's sum may be rounded
    counted = np.where(is_known, lookups, 0.0)
    rows = shares * counted / MEAN_COUNTS[:, None]
    # A rounded pooling factor or a mean count that is off may make more rows than there are.
    rows *= np.minimum(1, tables.num_embeddings / np.maximum(rows.sum(axis=0), _TINY))
    seen_once = rows[0].copy()
    rows[0] = np.maximum(tables.num_embeddings - rows[1:].sum(axis=0), seen_once)
    return _Classes(rows, shares, seen_once, counted)


def _seen(classes: _Classes, lookups: Floats) -> Floats:
    """[REUSE_BINS, tables]: rows of each class that a batch of `lookups` [tables] touches.

    Part of the counted batch: a row that it looked up c times is in a part f of it with
    probability 1 - (1 - f)^c. A larger batch: the hot rows, and for class 0 uniform draws beyond
    what the counted batch had.
    """
    part = np.minimum(1, lookups / np.maximum(classes.counted, _TINY))
    seen = classes.rows * (1 - (1 - part) ** MEAN_COUNTS[:, None])
    draws = classes.shares[0] * np.maximum(lookups - classes.counted, 0)
    drawn = 1 - (1 - 1 / np.maximum(classes.rows[0], 1)) ** draws
    seen[0] = part * classes.seen_once + (classes.rows[0] - classes.seen_once) * drawn
    return seen


def unique_rows(tables: TableColumns, lookups: Floats) -> Floats:
    """[tables]: different rows among `lookups` [tables], at most all of the table's.

    Without a histogram n(1 - (1 - 1/n)^k), the mean of k uniform draws and an upper bound for
    any others.
    """
    return np.asarray(_seen(_classes(tables), lookups).sum(axis=0))


def unique_fraction(tables: TableColumns, lookups: Floats) -> Floats:
    """[tables]: different rows for each of `lookups` [tables]; 1 where there are no lookups."""
    unique = unique_rows(tables, lookups)
    return np.divide(unique, lookups, out=np.ones(len(unique)), where=lookups > 0)


def hit_rate(tables: TableColumns, load_factor: Floats, of: Ints | None = None) -> Floats:
    """Share of lookups served by a cache that holds `load_factor` of a table's rows, the hottest.

    It persists from batch to batch. A cache beyond the hot rows holds some of class 0, which
    serve their part of bin 0's share; a cache of all rows serves everything. `of` is the index of
    the table of each load factor; by default there is one for each table.
    """
    classes = _classes(tables)
    of = np.arange(len(load_factor)) if of is None else of
    cached = load_factor * tables.num_embeddings[of]
    return _in_hottest(cached, classes.rows, classes.shares, of)


def read_fraction(tables: TableColumns, lookups: Floats, load_factor: Floats, of: Ints) -> Floats:
    """Share of a batch's lookups that read memory behind a cache which starts empty.

    The first lookup of every row, and all of rows beyond the `load_factor` hottest; `lookups`
    [tables] is the whole batch, `of` the index of the table of each load factor.
    """
    classes = _classes(tables)
    repeats = classes.shares * lookups - _seen(classes, lookups)
    cached = load_factor * tables.num_embeddings[of]
    served = _in_hottest(cached, classes.rows, repeats / np.maximum(lookups, _TINY), of)
    return np.clip(1 - served, 0, 1)


def cache_load_factors(tables: TableColumns) -> Floats:
    """[tables, choices]: cache sizes worth considering, as shares of the rows; NaN for none.

    Ascending: the knees of the miss curve, where HIT_RATES are reached, or LOAD_FACTORS
    where the histogram is unknown or no such cache is small enough.
    """
    classes = _classes(tables)
    every = np.arange(len(tables.num_embeddings))
    knees = [
        _in_hottest(np.full(len(every), rate), classes.shares, classes.rows, every)
        for rate in HIT_RATES
    ]
    factors = np.stack(knees, axis=1) / tables.num_embeddings[:, None]
    factors = _round_up(np.maximum(factors, SMALLEST_LOAD_FACTOR))
    is_wanted = (factors <= LARGEST_LOAD_FACTOR) & (classes.counted > 0)[:, None]
    is_wanted[:, 1:] &= factors[:, 1:] > factors[:, :-1]
    factors[~is_wanted] = np.nan
    factors[~is_wanted.any(axis=1), : len(LOAD_FACTORS)] = LOAD_FACTORS
    factors.sort(axis=1)  # NaN goes last
    most = (~np.isnan(factors)).sum(axis=1).max(initial=1)
    return np.asarray(factors[:, :most])


def _round_up(factors: Floats) -> Floats:
    """To two digits: caches that differ by less are not worth two choices."""
    unit = 10 ** (np.floor(np.log10(factors)) - 1)
    return np.asarray(np.round(np.ceil(factors / unit - 1e-9) * unit, 6))


def _in_hottest(amount: Floats, sizes: Floats, values: Floats, of: Ints) -> Floats:
    """The values in the hottest classes of table `of` whose sizes make up `amount`.

    `sizes` and `values` are [REUSE_BINS, tables]. Part of a class has that part of its value.
    """
    left, total = amount.astype(np.float64), np.zeros(len(amount))
    for size, value in zip(sizes[_HOTTEST_FIRST, :], values[_HOTTEST_FIRST, :], strict=True):
        if size.any():
            own = size[of]
            held = np.minimum(left, own)
            total += held * (value / np.maximum(size, _TINY))[of]
            left -= held
    return total
