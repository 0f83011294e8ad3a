"""Ids that repeat within a batch as a reuse histogram says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner import RequestError
from planner.reuse import MEAN_COUNTS
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS

Histogram = tuple[float, ...]
# What Meta's files say of each batch: shares of its lookups, a line for each bin.
_META_HEADER = "Ratio of index distribution at different column sizes:\n"
_META_LINE = re.compile(r"\(\d+(?:, \d+\]|\+): ([0-9.]+)\n")


def reuse_ranks(
    uniform: NDArray[np.float64], size: int, pooling_factor: float, histogram: Histogram
) -> NDArray[np.int64]:
    """Popularity ranks in [0, size) such that in a batch of REUSE_BATCH_SIZE rows about so large a
    share of the lookups goes to rows looked up 1, 2, 3-4, 5-8 ... times.

    A bin has its share of the lookups at the mean count of its rows, which says how many rows it
    has; those looked up once are all the others. Within a bin all rows are alike.
    """
    shares = np.array(histogram) / sum(histogram)
    rows = shares * REUSE_BATCH_SIZE * pooling_factor / MEAN_COUNTS
    rows *= min(1.0, size / rows.sum())
    rows[0] += size - rows.sum()
    hottest_first = slice(None, None, -1)
    below = np.concatenate([[0], np.cumsum(shares[hottest_first])])
    ranks = np.interp(uniform, below, np.concatenate([[0], np.cumsum(rows[hottest_first])]))
    return np.minimum(ranks.astype(np.int64), size - 1)


def read_histograms(path: Path) -> Callable[[str], Histogram | None]:
    """Of each feature by its name, None where the file does not know it.

    From the stats.json of `shardemb data stats`, or for all features from the locality statistics
    that Meta publishes with its data sets (github.com/facebookresearch/dlrm_datasets).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the reuse histograms {path}: {error}") from error
    batches = [_META_LINE.findall(part)[:REUSE_BINS] for part in text.split(_META_HEADER)[1:]]
    if not batches:
        return _of_features(path, text).get
    if any(len(batch) < REUSE_BINS for batch in batches):
        raise RequestError(f"{path} has fewer than {REUSE_BINS} bins in one of its histograms")
    mean = np.array(batches, dtype=float).mean(axis=0)
    histogram = tuple((mean / mean.sum()).tolist())
    return lambda name: histogram


def _of_features(path: Path, text: str) -> dict[str, Histogram]:
    try:
        document = json.loads(text)
        batch_size, features = document["batch_size"], document["features"]
        found = {name: feature.get("reuse_histogram") for name, feature in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{path} holds no reuse histograms: name the stats.json of `shardemb data stats`, or "
            "Meta's locality statistics"
        ) from error
    if batch_size != REUSE_BATCH_SIZE:
        raise RequestError(
            f"{path} counts reuse in batches of {batch_size} rows; count it again with "
            f"--batch-size {REUSE_BATCH_SIZE}"
        )
    return {name: tuple(shares) for name, shares in found.items() if shares is not None}
