"""MovieLens with implicit feedback -> a data set, by the protocol of the NCF paper.

He et al., "Neural Collaborative Filtering", WWW 2017: each user's last item is held out and ranked
among 99 items that the user has not seen; for training, items are sampled as negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from planner.errors import RequestError, UserError
from shardemb.data.dataset import (
    DatasetInfo,
    default_row_group_rows,
    new_dataset,
    write_info,
    write_split,
)

# Each file by the names it has in the wild, without what a compression adds.
_FILES = {
    "train": ("ncf_train.tsv", "*.train.rating"),
    "test": ("ncf_test_rating.tsv", "*.test.rating"),
    "negatives": ("ncf_test_negative.tsv", "*.test.negative"),
}
_CHUNK_ROWS = 1 << 16  # positives; part of what a seed means

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Interactions: users[i] with items[i]."""

    users: _Ints
    items: _Ints


@dataclass(frozen=True)
class LeaveOneOut:
    """`negatives[i]` are the items that test pair i is ranked among."""

    train: Pairs
    test: Pairs
    negatives: _Ints
    num_users: int
    num_items: int


def convert_movielens(
    source: Path,
    out: Path,
    *,
    negatives: int = 4,
    seed: int = 0,
    row_group_rows: int | None = None,
    overwrite: bool = False,
) -> DatasetInfo:
    """Convert the folder `source` of NCF's three files; columns are label, user and item.

    Each training pair has label 1 and is followed by `negatives` sampled items with label 0, none
    of which its user has in either split. The test split has each user's held-out pair, then the
    given negatives.
    """
    if negatives < 0 or seed < 0:
        raise RequestError(f"{negatives} negatives, seed {seed}: both must be 0 or more")
    data = read_leave_one_out(source)
    rows = {
        "train": len(data.train.users) * (1 + negatives),
        "test": data.negatives.size + len(data.test.users),
    }
    tables = {"train": _train_tables(data, negatives, seed), "test": iter([_test_table(data)])}
    with new_dataset(out, overwrite=overwrite) as folder:
        for split, count in rows.items():
            size = row_group_rows or default_row_group_rows(count)
            write_split(folder, split, tables[split], row_group_rows=size)
        info = DatasetInfo(
            format="movielens",
            rows=rows,
            label="label",
            dense=[],
            sparse=["user", "item"],
            num_embeddings={"user": data.num_users, "item": data.num_items},
        )
        write_info(folder, info)
    return info


def read_leave_one_out(source: Path) -> LeaveOneOut:
    """The three files; UserError where they do not fit each other."""
    train = _read_pairs(_find(source, "train"))
    test = _read_pairs(_find(source, "test"))
    negatives = _read_negatives(_find(source, "negatives"), test)
    items = (train.items, test.items, negatives)
    return LeaveOneOut(
        train,
        test,
        negatives,
        num_users=1 + max(int(pairs.users.max()) for pairs in (train, test)),
        num_items=1 + max(int(each.max()) for each in items),
    )


def _find(source: Path, role: str) -> Path:
    if not source.is_dir():
        raise RequestError(f"{source}: there is no such folder")
    for name in _FILES[role]:
        for pattern in (name, f"{name}.*"):
            found = sorted(source.glob(pattern))
            if found:
                return found[0]
    names = " or ".join(_FILES[role])
    raise UserError(f"{source} has no file {names} (plain or .gz): NCF publishes these files")


def _read(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """A tab-separated file: columns f0, f1 ... of `types`, the others as they look."""
    try:
        table = csv.read_csv(
            path,
            csv.ReadOptions(autogenerate_column_names=True),
            csv.ParseOptions(delimiter="\t"),
            csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; fetch it again") from error
    if table.num_columns < 2:
        raise UserError(f"{path}: at least two columns are expected, separated by tabs")
    return table


def _read_pairs(path: Path) -> Pairs:
    """The first two columns: user and item."""
    table = _read(path, {"f0": pa.int64(), "f1": pa.int64()})
    pairs = Pairs(table["f0"].to_numpy(), table["f1"].to_numpy())
    if min(pairs.users.min(), pairs.items.min()) < 0:
        raise UserError(f"{path}: there are negative ids; users and items count from 0")
    return pairs


def _read_negatives(path: Path, test: Pairs) -> _Ints:
    """[test pairs, negatives]; each line starts with its pair as `(user,item)`."""
    table = _read(path, {"f0": pa.string()})
    expected = [f"({user},{item})" for user, item in zip(test.users, test.items, strict=True)]
    if table["f0"].to_pylist() != expected:
        raise UserError(f"{path}: its first column must have the pairs of the test file, in order")
    columns = table.columns[1:]
    if any(column.type != pa.int64() for column in columns):
        raise UserError(f"{path}: after its first column all must be item ids")
    negatives = np.column_stack([column.to_numpy() for column in columns])
    if negatives.min() < 0:
        raise UserError(f"{path}: there are negative ids; items count from 0")
    return negatives


def _train_tables(data: LeaveOneOut, negatives: int, seed: int) -> Iterator[pa.Table]:
    sampler = NegativeSampler(data)
    random = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, len(data.train.users), _CHUNK_ROWS):
        users = data.train.users[start : start + _CHUNK_ROWS]
        positives = data.train.items[start : start + _CHUNK_ROWS]
        sampled = sampler.sample(np.repeat(users, negatives), random).reshape(len(users), negatives)
        yield _table(users, positives, sampled)


def _test_table(data: LeaveOneOut) -> pa.Table:
    return _table(data.test.users, data.test.items, data.negatives)


def _table(users: _Ints, positives: _Ints, negatives: _Ints) -> pa.Table:
    """Each user's positive, then the negatives of the same row."""
    items = np.column_stack([positives, negatives])
    labels = np.zeros(items.shape, np.int8)
    labels[:, 0] = 1
    return pa.table(
        {
            "label": labels.reshape(-1),
            "user": np.repeat(users, items.shape[1]),
            "item": items.reshape(-1),
        }
    )


class NegativeSampler:
    """Draws items that a user has in no split, all with the same probability."""

    def __init__(self, data: LeaveOneOut) -> None:
        self._num_items = data.num_items
        self._seen = np.unique(
            np.concatenate(
                [self._codes(pairs.users, pairs.items) for pairs in (data.train, data.test)]
            )
        )
        seen_by_user = np.bincount(self._seen // data.num_items)
        if seen_by_user.max() == data.num_items:
            user = int(np.argmax(seen_by_user))
            raise UserError(f"user {user} has all {data.num_items} items: there are no negatives")

    def sample(self, users: _Ints, random: np.random.Generator) -> _Ints:
        """One item for each user."""
        items = random.integers(self._num_items, size=len(users))
        while len(again := np.flatnonzero(self._is_seen(users, items))):
            items[again] = random.integers(self._num_items, size=len(again))
        return items

    def _is_seen(self, users: _Ints, items: _Ints) -> NDArray[np.bool_]:
        codes = self._codes(users, items)
        at = np.searchsorted(self._seen, codes)
        return self._seen[np.minimum(at, len(self._seen) - 1)] == codes

    def _codes(self, users: _Ints, items: _Ints) -> _Ints:
        return users * self._num_items + items
