"""How often each id occurs, in constant memory: exactly, or of a uniform sample of the ids."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shardemb.data.hashing import mix64

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_FEWEST_PENDING = 1 << 16
_CURVE_POINTS = 60
# A point of the curve rests on at least so many ids of a sample.
_SAMPLED_AT_LEAST = 100


def combine(ids: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Each id once, ascending, with the sum of its counts."""
    if not len(ids):
        return ids, counts
    order = np.argsort(ids, kind="stable")  # quick where sorted runs are put together
    ids = ids[order]
    starts = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    return ids[starts], np.add.reduceat(counts[order], starts)


class IdCounts:
    """Exact counts of up to `limit` distinct ids; of more, of the `limit` with smallest hashes.

    This is a bottom-k sketch (KMV: Bar-Yossef et al., RANDOM 2002; Beyer et al., SIGMOD 2007).
    Whether an id is among them depends on no other id's count, so they are a uniform sample of the
    distinct ids. None of them was ever left out, so their counts are exact, and parts that are
    counted apart and merged give what counting all at once gives.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ids = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._largest_hash: np.uint64 | None = None  # of the sample, once it is one
        self._pending: list[tuple[Ints, Ints]] = []
        self._num_pending = 0

    def add(self, ids: Ints, counts: Ints) -> None:
        """Each of `ids` occurred so many times more."""
        if self._largest_hash is not None:
            is_kept = mix64(ids) <= self._largest_hash
            ids, counts = ids[is_kept], counts[is_kept]
        self._pending.append((ids, counts))
        self._num_pending += len(ids)
        if self._num_pending > max(len(self._ids), _FEWEST_PENDING):
            self.compact()

    def merge(self, other: IdCounts) -> None:
        other.compact()
        if other._largest_hash is not None:
            self._shrink_to(other._largest_hash)
        self.add(other._ids, other._counts)

    def compact(self) -> None:
        """Puts what was added in its place."""
        if not self._pending:
            return
        runs = [(self._ids, self._counts), *self._pending]
        self._pending, self._num_pending = [], 0
        ids, counts = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        self._ids, self._counts = combine(ids, counts)
        if len(self._ids) > self._limit:
            hashes = mix64(self._ids)
            self._shrink_to(np.partition(hashes, self._limit - 1)[self._limit - 1])

    def _shrink_to(self, largest_hash: np.uint64) -> None:
        self.compact()
        if self._largest_hash is None or largest_hash < self._largest_hash:
            self._largest_hash = largest_hash
            is_kept = mix64(self._ids) <= largest_hash
            self._ids, self._counts = self._ids[is_kept], self._counts[is_kept]

    @property
    def is_exact(self) -> bool:
        self.compact()
        return self._largest_hash is None

    @property
    def relative_error(self) -> float:
        """The standard error of `distinct`, as a share of it."""
        return 0.0 if self.is_exact else 1 / math.sqrt(self._limit - 2)

    @property
    def distinct(self) -> int:
        """How many distinct ids there are, or an unbiased estimate of it."""
        if self.is_exact or self._largest_hash is None:
            return len(self._ids)
        return round((self._limit - 1) * 2**64 / (int(self._largest_hash) + 1))

    @property
    def ids(self) -> Ints:
        """All ids, or those of the sample; ascending."""
        self.compact()
        return self._ids

    @property
    def counts(self) -> Ints:
        """How often each of `ids` occurred."""
        self.compact()
        return self._counts


class Skew:
    """How the lookups are spread over the distinct ids, the most frequent ids first.

    Of a sample, a share is what the less frequent ids leave: their counts are alike, so a sample
    knows their sum well, while it may lack the few ids that have most of the lookups.
    `null_lookups` are those of one more row, which has no id.
    """

    def __init__(self, counted: IdCounts, null_lookups: int = 0, *, lookups: int) -> None:
        self._is_exact = counted.is_exact
        counts = counted.counts
        stand_for = 1.0 if self._is_exact else counted.distinct / len(counts)
        if null_lookups and self._is_exact:
            counts = np.append(counts, null_lookups)
        rest = np.concatenate([[0], np.cumsum(np.sort(counts))])[::-1]  # beyond the i first
        self._shares = np.clip((lookups - rest * stand_for) / max(lookups, 1), 0, 1)
        self._num_ids = len(counts)

    def top(self, percent: int) -> float:
        """The share of lookups of the most frequent `percent` of the ids, at least of one."""
        return float(self._shares[-(-self._num_ids * percent // 100)])

    def curve(self) -> list[tuple[float, float]]:
        """(share of distinct ids, share of lookups), closer together towards the most frequent."""
        if not self._num_ids:
            return []
        first = 1 if self._is_exact else min(_SAMPLED_AT_LEAST, self._num_ids)
        points = np.geomspace(first, self._num_ids, _CURVE_POINTS)
        numbers = np.unique(points.round().astype(int))
        return [(float(n / self._num_ids), float(self._shares[n])) for n in numbers]
