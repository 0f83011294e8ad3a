from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner.errors import RequestError, UserError
from shardemb.data.dataset import read_info
from shardemb.data.movielens import convert_movielens
from tests.shardemb.splits import split_files

FILES = {
    "ncf_train.tsv": "0\t0\n0\t1\n1\t2\n1\t0\n",
    "ncf_test_rating.tsv": "0\t2\t5\t97\n1\t1\t3\t98\n",
    "ncf_test_negative.tsv": "(0,2)\t3\t4\n(1,1)\t4\t5\n",
}


def _source(folder: Path, **changes: str) -> Path:
    folder.mkdir()
    for name, text in (FILES | {f"ncf_{key}.tsv": text for key, text in changes.items()}).items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def _read(out: Path, split: str) -> pa.Table:
    return pa.concat_tables(map(pq.read_table, split_files(out, split)))


def _columns(table: pa.Table) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in ("label", "user", "item")]


def test_a_small_one(tmp_path: Path):
    """Positives in order, each followed by its negatives; the test has the given negatives."""
    info = convert_movielens(_source(tmp_path / "ml"), tmp_path / "out", negatives=2)
    label, user, item = _columns(_read(tmp_path / "out", "train"))
    assert label.tolist() == [1, 0, 0] * 4 and user.tolist() == [0] * 6 + [1] * 6
    assert item[::3].tolist() == [0, 1, 2, 0]
    assert set(item[label == 0].tolist()) <= {3, 4, 5}
    assert [column.tolist() for column in _columns(_read(tmp_path / "out", "test"))] == [
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 1],
        [2, 3, 4, 1, 4, 5],
    ]
    assert info == read_info(tmp_path / "out")
    assert info.num_embeddings == {"user": 2, "item": 6}
    assert info.rows == {"train": 12, "test": 6}


def test_the_names_of_the_published_files(tmp_path: Path):
    """As NCF's authors publish them, not compressed."""
    source = tmp_path / "ml"
    source.mkdir()
    names = ("train.rating", "test.rating", "test.negative")
    for name, text in zip(names, FILES.values(), strict=True):
        (source / f"ml-1m.{name}").write_text(text)
    info = convert_movielens(source, tmp_path / "out", negatives=0)
    assert info.rows == {"train": 4, "test": 6}


def test_the_real_one(shared_data: Path, tmp_path: Path):
    """All 994,169 pairs with one negative that the user has in no split, and 100 rows a user in
    the test; all items are sampled about equally."""
    source = shared_data / "ml-1m"
    info = convert_movielens(source, tmp_path / "out", negatives=1)
    assert info.rows == {"train": 2 * 994_169, "test": 100 * 6040}
    assert info.num_embeddings == {"user": 6040, "item": 3706}
    label, user, item = _columns(_read(tmp_path / "out", "train"))
    text = gzip.decompress((source / "ncf_train.tsv.gz").read_bytes()).decode()
    pairs = np.array([line.split("\t") for line in text.splitlines()], dtype=np.int64)
    assert np.array_equal(np.stack([user, item], 1)[label == 1], pairs)
    test_label, test_user, test_item = _columns(_read(tmp_path / "out", "test"))
    has = {*zip(user[label == 1].tolist(), item[label == 1].tolist(), strict=True)}
    has |= {*zip(test_user[test_label == 1], test_item[test_label == 1], strict=True)}
    assert has.isdisjoint(zip(user[label == 0].tolist(), item[label == 0].tolist(), strict=True))
    assert test_label.reshape(6040, 100).sum(1).tolist() == [1] * 6040
    assert (test_user.reshape(6040, 100) == np.arange(6040)[:, None]).all()
    drawn = np.bincount(item[label == 0], minlength=3706)
    assert drawn.min() > 0 and drawn.max() < 2.5 * drawn.mean()


def test_the_seed_decides_the_negatives(tmp_path: Path):
    """The same seed gives the same bytes, another one other items."""
    source = _source(tmp_path / "ml")
    items = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert_movielens(source, tmp_path / name, negatives=20, seed=seed)
        items.append(_read(tmp_path / name, "train")["item"].to_pylist())
    assert items[0] == items[1] != items[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "0\tx\n"}, "ncf_train.tsv.gz cannot be read"),
        ({"train": "0\n"}, "ncf_train.tsv.gz: at least two columns"),
        ({"train": "-1\t2\n"}, "ncf_train.tsv.gz: there are negative ids"),
        ({"train": ""}, "ncf_train.tsv.gz cannot be read"),
        ({"test_negative": "(0,2)\t3\n(1,7)\t4\n"}, "must have the pairs of the test file"),
        ({"test_negative": "(0,2)\tx\n(1,1)\t4\n"}, "must be item ids"),
        ({"train": "0\t0\n0\t1\n0\t3\n0\t4\n0\t5\n"}, "user 0 has all 6 items"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, changes: dict[str, str], message: str):
    """Told by name, and nothing is left."""
    source = _source(tmp_path / "ml", **changes)
    with pytest.raises(UserError, match=message):
        convert_movielens(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ml"]


def test_malformed_requests(tmp_path: Path):
    """A folder that is none, files that are not there, a count below 0."""
    with pytest.raises(RequestError, match="there is no such folder"):
        convert_movielens(tmp_path / "none", tmp_path / "out")
    with pytest.raises(RequestError, match="both must be 0 or more"):
        convert_movielens(tmp_path, tmp_path / "out", negatives=-1)
    with pytest.raises(UserError, match=r"has no file ncf_train.tsv or \*.train.rating"):
        convert_movielens(tmp_path, tmp_path / "out")
