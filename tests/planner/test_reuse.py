"""Reuse histograms predict unique rows and cache hits, of made and of real lookups."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from planner import TableSpec
from planner.reuse import (
    LOAD_FACTORS,
    MEAN_COUNTS,
    cache_load_factors,
    hit_rate,
    read_fraction,
    unique_fraction,
    unique_rows,
)
from planner.shards import Floats, TableColumns
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS

LOOKUPS = float(REUSE_BATCH_SIZE)


def table(rows: int, shares: dict[int, float] | None, pooling_factor: float = 1) -> TableSpec:
    """A table with these shares of the bins, or without a histogram."""
    histogram = None if shares is None else tuple(shares.get(i, 0.0) for i in range(REUSE_BINS))
    return TableSpec(
        name="t",
        num_embeddings=rows,
        embedding_dim=4,
        pooling_factor=pooling_factor,
        reuse_histogram=histogram,
    )


def columns(*tables: TableSpec) -> TableColumns:
    return TableColumns.of(tables)


def zipf(rows: int, exponent: float) -> Floats:
    """The probability of each row, the hottest first."""
    weights = np.arange(1, rows + 1) ** -exponent
    return weights / weights.sum()


def drawn(probabilities: Floats, lookups: int, seed: int) -> Floats:
    """How often each row is looked up, the hottest first."""
    return np.random.default_rng(seed).multinomial(lookups, probabilities).astype(np.float64)


def counted(counts: Floats, pooling_factor: float) -> TableSpec:
    """The table whose histogram is that of these counts."""
    bins = np.minimum(np.ceil(np.log2(np.maximum(counts, 1))), REUSE_BINS - 1).astype(int)
    shares = np.bincount(bins, counts, REUSE_BINS) / counts.sum()
    return table(len(counts), dict(enumerate(shares)), pooling_factor)


def test_mean_counts_are_in_their_bins() -> None:
    edges = 2.0 ** np.arange(REUSE_BINS)
    assert MEAN_COUNTS[:2].tolist() == [1, 2]
    assert MEAN_COUNTS[2] == pytest.approx(2 / (1 / 3 + 1 / 4))
    assert (edges[1:-1] < MEAN_COUNTS[2:]).all() and (MEAN_COUNTS[2:] < 2 * edges[1:-1]).all()


def test_unique_rows_by_hand() -> None:
    """Half of the lookups go to rows seen once, a half to rows seen twice: 3/4 are unique.

    In half a batch a row seen twice is seen with probability 3/4: half of the lookups that are
    left go to it, and each finds a new row 3 times out of 4.
    """
    tables = columns(table(10**6, {0: 0.5, 1: 0.5}))
    assert unique_fraction(tables, np.array([LOOKUPS])) == pytest.approx(0.75)
    assert unique_fraction(tables, np.array([LOOKUPS / 2])) == pytest.approx(0.5 + 0.5 * 0.75)


def test_unknown_histogram_is_uniform_draws() -> None:
    """n(1 - (1 - 1/n)^k), also for the smallest tables and for no lookups."""
    sizes = [1, 2, 10, 10**6]
    tables = columns(*(table(n, None) for n in sizes))
    for lookups in (0.0, 1.0, 7.0, 1e6):
        expected = [n * (1 - (1 - 1 / n) ** lookups) for n in sizes]
        assert unique_rows(tables, np.full(4, lookups)) == pytest.approx(expected)
    assert unique_fraction(tables, np.zeros(4)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.05, 1.2])
@pytest.mark.parametrize(("rows", "pooling_factor"), [(3000, 2), (10**5, 4), (10**6, 1)])
def test_unique_rows_of_zipf_draws(rows: int, pooling_factor: int, exponent: float) -> None:
    """Within 5% for the batch that was counted and a part of it, 35% for one 8 times as large."""
    probabilities = zipf(rows, exponent)
    lookups = REUSE_BATCH_SIZE * pooling_factor
    tables = columns(counted(drawn(probabilities, lookups, 1), pooling_factor))
    for size, tolerance in [(lookups // 8, 0.05), (lookups, 0.05), (8 * lookups, 0.35)]:
        unique = np.count_nonzero(drawn(probabilities, size, 2))
        assert unique_rows(tables, np.array([size])) == pytest.approx(unique, rel=tolerance)


@pytest.mark.parametrize("exponent", [0.8, 1.05, 1.2])
def test_hit_rate_of_zipf_draws(exponent: float) -> None:
    """A cache of the hottest rows: within 0.02 where they were seen often, never far too good."""
    probabilities = zipf(10**6, exponent)
    lookups = REUSE_BATCH_SIZE * 4
    tables = columns(counted(drawn(probabilities, lookups, 1), 4))
    for factor in (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0):
        hits = probabilities[: int(factor * 10**6)].sum()
        found = hit_rate(tables, np.array([factor]))[0]
        assert found < hits + 0.05
        if factor <= 1e-3:
            assert found == pytest.approx(hits, abs=0.02)
    assert found == pytest.approx(1)


def test_hit_rate_by_hand() -> None:
    """Rows looked up twice first, then all others alike; a table's own or that of `of`."""
    once = LOOKUPS / 2
    twice = LOOKUPS / 4
    rows = 10**6
    tables = columns(table(rows, {0: 0.5, 1: 0.5}), table(rows, None))
    factors = np.array([0, twice / 2, twice, twice + once]) / rows
    found = hit_rate(tables, factors, np.zeros(4, dtype=np.int64))
    tail = 0.5 * once / (rows - twice)
    assert found == pytest.approx([0, 0.25, 0.5, 0.5 + tail])
    assert hit_rate(tables, np.array([1.0, 0.3])) == pytest.approx([1, 0.3])


def test_reads_behind_an_empty_cache() -> None:
    """Without a cache every lookup reads; with one for all rows, unique rows are read once."""
    tables = columns(table(10**6, {0: 0.5, 1: 0.5}), table(1000, None))
    lookups = np.array([LOOKUPS, 5000.0])
    both = np.arange(2)
    assert read_fraction(tables, lookups, np.zeros(2), both).tolist() == [1, 1]
    assert read_fraction(tables, lookups, np.ones(2), both) == pytest.approx(
        unique_fraction(tables, lookups)
    )
    half = read_fraction(tables, lookups, np.array([LOOKUPS / 8 / 10**6, 0.5]), both)
    repeats = 1 - unique_fraction(tables, lookups)
    assert half == pytest.approx(1 - repeats / 2)


def test_more_cache_never_hits_less() -> None:
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(REUSE_BINS), 20)
    sizes = random.integers(1, 10**7, 20)  # some have fewer rows than their histogram says
    tables = columns(
        *(table(int(n), dict(enumerate(s))) for n, s in zip(sizes, shares, strict=True))
    )
    of = np.repeat(np.arange(20), 50)
    factors = np.tile(np.linspace(0, 1, 50), 20)
    hits = hit_rate(tables, factors, of).reshape(20, 50)
    reads = read_fraction(tables, np.full(20, 1e5), factors, of).reshape(20, 50)
    assert (np.diff(hits) >= -1e-12).all() and hits.min() == 0
    assert hits[:, -1] == pytest.approx(1)
    assert (np.diff(reads) <= 1e-12).all()
    unique = unique_rows(tables, np.full(20, 1e9))
    assert (unique <= sizes * (1 + 1e-9)).all()


def test_cache_load_factors_by_hand() -> None:
    """Knees where they are known and small enough, two digits, rounded up.

    Bin 3 has 60% of the lookups: 0.6 * 1,310,720 / 6.304 = 124,750 rows, 5/6 of which serve 50%.
    80% take half of the other 875,250 rows as well: too many.
    """
    tables = columns(table(10**6, {3: 0.6, 0: 0.4}, 20), table(10**6, None), table(2, {15: 1}))
    factors = [row[~np.isnan(row)].tolist() for row in cache_load_factors(tables)]
    assert factors == [[0.11], list(LOAD_FACTORS), [0.5]]
    assert cache_load_factors(columns()).shape == (0, 1)


def test_cache_load_factors_are_different_and_small() -> None:
    """At most four, ascending, from the smallest worth having; the rest is NaN."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(REUSE_BINS, 0.3), 100)
    tables = [table(10 ** int(random.integers(8)), dict(enumerate(s))) for s in shares]
    found = cache_load_factors(columns(*tables))
    assert 1 < found.shape[1] <= 4
    for row in found:
        known = row[~np.isnan(row)]
        assert len(known) and np.isnan(row[len(known) :]).all() and (np.diff(known) > 0).all()
        assert known[0] >= 0.001 and known[-1] <= 0.5


def test_cache_load_factors_reach_their_hit_rates() -> None:
    tables = columns(counted(drawn(zipf(10**5, 0.9), 4 * REUSE_BATCH_SIZE, 0), 4))
    found = cache_load_factors(tables)[0]
    hits = hit_rate(tables, found, np.zeros(len(found), dtype=np.int64))
    assert hits == pytest.approx([0.5, 0.8], abs=0.01)
    assert (hits >= [0.5, 0.8]).all()


@pytest.mark.parametrize("year", [2021, 2022])
def test_unique_fraction_of_meta_datasets(shared_data: Path, year: int) -> None:
    """Within 2% of what Meta's dlrm_datasets report for each of their batches."""
    path = shared_data / "planner" / f"meta_dlrm_datasets_locality_stats_{year}.txt"
    batches = [text for text in path.read_text().split("\n\n") if "# of indices" in text]
    assert len(batches) > 10
    for text in batches:
        lookups, unique = (int(n) for n in re.findall(r"Avg # of .*: (\d+)", text))
        shares = re.findall(r"^\(\d.*: ([\d.]+)$", text.split("Ratio of index")[1], re.MULTILINE)
        histogram = dict(enumerate(map(float, shares)))
        tables = columns(table(2**40, histogram, lookups / REUSE_BATCH_SIZE))
        assert unique_rows(tables, np.array([lookups])) == pytest.approx(unique, rel=0.02)
