"""Which rows are for training and which for the test, and which go to which part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from planner.errors import RequestError
from shardemb.data.hashing import mix64


@dataclass(frozen=True)
class TestRows:
    """Those for the test: the last `count`, a `fraction` drawn by row number, or all of `sources`,
    which come after the others."""

    __test__ = False  # for pytest

    count: int = 0
    fraction: float = 0.0
    sources: tuple[Path, ...] = ()

    def check(self) -> None:
        """RequestError where these cannot be the test rows of any files."""
        if self.count < 0:
            raise RequestError(f"test_rows is {self.count}: it must be 0 or more")
        if not 0 <= self.fraction < 1:
            raise RequestError(f"test_fraction is {self.fraction}: it must be 0 to less than 1")
        if sum(map(bool, (self.count, self.fraction, self.sources))) > 1:
            raise RequestError("choose one of test rows, a test fraction and test sources")


@dataclass(frozen=True)
class Staged:
    """Rows in a file of the workspace; `first_row` is their number over all sources."""

    path: Path
    source: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Split:
    """Rows before `cut` are for training, those from it on for the test; with a `fraction`, the
    hash of its number decides for each row."""

    name: Literal["train", "test"]
    cut: int
    fraction: float

    def read(self, staged: Staged, columns: list[str] | None = None) -> pa.Table:
        """The rows of this split."""
        table = pq.ParquetFile(staged.path).read(columns)
        mask = self._mask(staged)
        return table if mask.all() else table.filter(pa.array(mask))

    def count(self, staged: Staged) -> int:
        return int(np.count_nonzero(self._mask(staged)))

    def _mask(self, staged: Staged) -> NDArray[np.bool_]:
        rows = np.arange(staged.first_row, staged.first_row + staged.rows, dtype=np.int64)
        if self.fraction:
            is_test = mix64(rows) < np.uint64(self.fraction * 2.0**64)
        else:
            is_test = rows >= self.cut
        return is_test if self.name == "test" else ~is_test


@dataclass(frozen=True)
class Part:
    """`rows` rows of a split: those of `staged` without the first `skip`."""

    split: Split
    number: int
    staged: tuple[Staged, ...]
    skip: int
    rows: int

    def tables(self) -> Iterator[pa.Table]:
        skip, left = self.skip, self.rows
        for staged in self.staged:
            table = self.split.read(staged).slice(skip, left)
            skip, left = 0, left - table.num_rows
            yield table


class SplitRows:
    """The rows of one split and where they are."""

    def __init__(self, split: Split, staged: Sequence[Staged]) -> None:
        counts = [split.count(each) for each in staged]
        self.split = split
        self.staged = [each for each, count in zip(staged, counts, strict=True) if count]
        self._counts = [count for count in counts if count]
        self.rows = sum(counts)

    def parts(self, rows_of_part: int) -> Iterator[Part]:
        ends = np.cumsum(self._counts)
        for number, start in enumerate(range(0, self.rows, rows_of_part)):
            stop = min(start + rows_of_part, self.rows)
            first, last = np.searchsorted(ends, [start + 1, stop])
            skip = start - int(ends[first] - self._counts[first])
            staged = tuple(self.staged[first : last + 1])
            yield Part(self.split, number, staged, skip, stop - start)


def split_rows(staged: Sequence[Staged], test: TestRows, train_sources: int) -> list[SplitRows]:
    """train, and test where one is asked for; RequestError where one of them has no rows."""
    total = sum(each.rows for each in staged)
    if test.sources:
        cut = sum(each.rows for each in staged if each.source < train_sources)
    else:
        cut = total - test.count
    if cut <= 0:
        raise RequestError(
            f"the source has {total:,} rows, so {test.count:,} for the test split leave none to "
            f"train on: set test_rows to at most {total - 1:,}"
        )
    splits = [SplitRows(Split("train", cut, test.fraction), staged)]
    if test != TestRows():
        splits.append(SplitRows(Split("test", cut, test.fraction), staged))
    for each in splits:
        if each.rows == 0:
            raise RequestError(
                f"test_fraction {test.fraction} of {total:,} rows leaves none for the "
                f"{each.split.name} split: choose another, or test_rows"
            )
    return splits
