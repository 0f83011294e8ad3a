"""Drawn ids repeat as the histogram says, counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from planner import RequestError
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS
from shardemb.data.reuse_skew import read_histograms, reuse_ranks

SHARES = (0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05) + (0.0,) * 7


def _histogram(ids: np.ndarray) -> np.ndarray:
    """Shares of the lookups, by how often their row is looked up."""
    counts = np.bincount(ids)
    counts = counts[counts > 0]
    bins = np.ceil(np.log2(counts)).astype(int)
    return np.bincount(bins, counts, minlength=REUSE_BINS) / counts.sum()


@pytest.mark.parametrize("pooling_factor", [1, 3])
def test_a_batch_has_the_histogram(pooling_factor: int) -> None:
    """But for chance, which moves rows to bins beside theirs: cumulative shares are near."""
    uniform = np.random.default_rng(0).random(REUSE_BATCH_SIZE * pooling_factor)
    ranks = reuse_ranks(uniform, 10**7, pooling_factor, SHARES)
    assert ranks.min() >= 0 and ranks.max() < 10**7
    found = np.cumsum(_histogram(ranks))
    assert np.abs(found - np.cumsum(SHARES)).max() < 0.06
    hot = np.bincount(ranks)[:10]
    assert hot.min() > 100 and ranks[uniform > 0.9].min() > hot.size  # rank 0 is the hottest


def test_small_tables() -> None:
    """Where a table has fewer rows than the histogram needs, all of them are used."""
    uniform = np.random.default_rng(0).random(10_000)
    for size in (1, 2, 50):
        assert set(reuse_ranks(uniform, size, 1.0, SHARES)) == set(range(size))


def test_metas_locality_statistics(shared_data: Path) -> None:
    """Of all batches there: rows are looked up about seven times each, as they say, and so are
    those that are drawn."""
    path = shared_data / "planner" / "meta_dlrm_datasets_locality_stats_2021.txt"
    histogram = read_histograms(path)("any")
    assert histogram is not None and sum(histogram) == pytest.approx(1)
    said = [float(n) for n in re.findall(r"Avg col size: ([0-9.]+)", path.read_text())]
    lookups = REUSE_BATCH_SIZE * 20
    ids = reuse_ranks(np.random.default_rng(0).random(lookups), 10**9, 20.0, histogram)
    assert lookups / len(np.unique(ids)) == pytest.approx(np.mean(said), rel=0.15)


def test_statistics_of_ones_own_data(tmp_path: Path) -> None:
    """By feature; a feature that is not there has none."""
    path = tmp_path / "stats.json"
    features = {"a": {"reuse_histogram": SHARES}, "b": {"reuse_histogram": None}}
    path.write_text(json.dumps({"batch_size": REUSE_BATCH_SIZE, "features": features}))
    histogram_of = read_histograms(path)
    assert histogram_of("a") == SHARES
    assert histogram_of("b") is histogram_of("c") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the reuse histograms"),
        ("(0, 1]: 0.5\n", "holds no reuse histograms"),
        (
            "Ratio of index distribution at different column sizes:\n(0, 1]: 0.5\n",
            "fewer than 17 bins",
        ),
        ("[1]", "holds no reuse histograms"),
        (json.dumps({"batch_size": 100, "features": {}}), "in batches of 100 rows; count it again"),
    ],
)
def test_other_files(tmp_path: Path, text: str | None, message: str) -> None:
    """Each is named with what would do."""
    path = tmp_path / "reuse"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_histograms(path)
