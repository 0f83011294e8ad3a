from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner.errors import RequestError
from shardemb.data import synthetic
from shardemb.data.click_model import BEST_AUC, CLICK_RATE, Scores
from shardemb.data.dataset import DatasetInfo, read_info
from shardemb.data.synthetic import SyntheticFeature, bag_means, scramble, synthesize, zipf_ranks
from tests.shardemb.splits import split_files

FEATURES = [
    SyntheticFeature("C1", 10_000),
    SyntheticFeature("C2", 7),
    SyntheticFeature("many", 500, pooling_factor=3.0),
    SyntheticFeature("few", 40, pooling_factor=0.5),
]
DENSE = ["I1", "I2"]


def _make(out: Path, **changes: Any) -> DatasetInfo:
    request: dict[str, Any] = {"train_rows": 5000, "test_rows": 1500, "seed": 3}
    return synthesize(out, **({"features": FEATURES, "dense": DENSE} | request | changes))


def _read(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in split_files(folder, split)])


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetInfo]:
    """A data set large enough for its statistics to be near their expectation."""
    out = tmp_path_factory.mktemp("synthetic") / "data"
    return out, _make(out, train_rows=40_000, test_rows=40_000)


def test_a_seed_decides_every_byte(tmp_path: Path):
    """The same seed writes identical files; another seed writes others."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        _make(tmp_path / name, seed=seed)
    a, b, c = (_digests(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 3
    assert a.keys() == c.keys() and not set(a.values()) & set(c.values())


def test_row_groups_do_not_change_the_data(tmp_path: Path):
    """The size of row groups is a matter of storage, not of content."""
    _make(tmp_path / "a")
    _make(tmp_path / "b", row_group_rows=100)
    assert _read(tmp_path / "a", "train").equals(_read(tmp_path / "b", "train"))
    assert pq.ParquetFile(split_files(tmp_path / "b", "train")[0]).num_row_groups == 50


def test_columns_and_rows(large: tuple[Path, DatasetInfo]):
    """Scalars for one id a row, lists otherwise, exact row counts, info as returned."""
    out, info = large
    ids, lists = pa.int64(), pa.list_(pa.int64())
    names = {"label": pa.int8(), "I1": pa.int32(), "I2": pa.int32()}
    for split in ("train", "test"):
        table = _read(out, split)
        assert table.num_rows == 40_000
        assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
            **names,
            "C1": ids,
            "C2": ids,
            "many": lists,
            "few": lists,
        }
    assert info.rows == {"train": 40_000, "test": 40_000} and read_info(out) == info
    assert (info.label, info.dense) == ("label", DENSE)
    assert info.sparse == ["C1", "C2", "many", "few"]


def test_splits_differ(large: tuple[Path, DatasetInfo]):
    """The test split is new rows from the same model, not the training rows again."""
    train, test = (_read(large[0], split)["C1"].to_numpy() for split in ("train", "test"))
    assert (train == test).mean() < 0.2


def test_ids_lie_in_their_table(large: tuple[Path, DatasetInfo]):
    """No id is below 0 or beyond the table's last row, and a small table is used whole."""
    table = _read(large[0], "train")
    for feature in FEATURES:
        column = table[feature.name].combine_chunks()
        ids = column.to_numpy() if pa.types.is_int64(column.type) else column.values.to_numpy()
        assert ids.min() >= 0 and ids.max() < feature.num_embeddings
        if feature.num_embeddings < 100:
            assert len(np.unique(ids)) == feature.num_embeddings


def test_bags_have_the_mean_length_and_some_are_empty(large: tuple[Path, DatasetInfo]):
    """Poisson lengths: mean and variance are the pooling factor, P(empty) = exp(-mean)."""
    table = _read(large[0], "train")
    for name, mean in (("many", 3.0), ("few", 0.5)):
        lengths = table[name].combine_chunks().value_lengths().to_numpy()
        assert lengths.mean() == pytest.approx(mean, rel=0.03)
        assert lengths.var() == pytest.approx(mean, rel=0.05)
        assert (lengths == 0).mean() == pytest.approx(np.exp(-mean), rel=0.1)


def test_dense_columns_are_counts_with_a_heavy_tail(large: tuple[Path, DatasetInfo]):
    """Integers from 0 whose mean lies above the median; one column misses 5% of its values."""
    table = _read(large[0], "train")
    assert table["I1"].null_count / 40_000 == pytest.approx(0.05, abs=0.005)
    assert table["I2"].null_count == 0
    for name in DENSE:
        counts = table[name].drop_null().to_numpy()
        assert counts.min() >= 0 and counts.mean() > 1.1 * np.median(counts)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.1, 2.0])
def test_ranks_follow_the_power_law(exponent: float):
    """Frequencies equal the integral of x ** -exponent over each rank, computed by a sum."""
    size, draws = 50, 200_000
    ranks = zipf_ranks(np.random.default_rng(0).random(draws), size, exponent)
    fine = (np.arange(1000 * size) + 0.5) / 1000 + 1
    mass = (fine**-exponent).reshape(size, 1000).sum(axis=1)
    observed = np.bincount(ranks, minlength=size) / draws
    assert len(observed) == size
    assert np.abs(observed - mass / mass.sum()).max() < 0.005


def test_ranks_at_the_ends_of_the_uniform():
    """The first and the last number below 1 give the first and the last rank, at any size."""
    ends = np.array([0.0, np.nextafter(1.0, 0.0)])
    for size in (1, 2, 1000, 1 << 31):
        for exponent in (0.0, 0.5, 1.0, 1.1, 3.0):
            ranks = zipf_ranks(ends, size, exponent)
            assert ranks[0] == 0 and 0 <= ranks[1] < size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 97, 1000, 4096, 30030])
def test_the_scramble_is_a_bijection_that_spreads_hot_ranks(size: int):
    """Every id comes once, and the hottest ranks fall into all quarters of the table alike."""
    multiplier, offset = scramble(size, np.random.default_rng(1))
    ids = (np.arange(size) * multiplier + offset) % size
    assert np.array_equal(np.sort(ids), np.arange(size))
    if size >= 97:
        quarters = np.bincount(ids[:24] * 4 // size, minlength=4)
        assert quarters.min() >= 4 and quarters.max() <= 8


def test_popular_ids_take_most_of_the_traffic(large: tuple[Path, DatasetInfo]):
    """With exponent 1.1 the 100 hottest of 10,000 ids carry more than half of all lookups."""
    counts = np.bincount(_read(large[0], "train")["C1"].to_numpy(), minlength=10_000)
    assert np.sort(counts)[-100:].sum() > 0.5 * counts.sum()


def test_a_bag_counts_by_its_mean():
    """A bag's effect is the plain mean of its ids' effects, and none for an empty bag."""
    random = np.random.default_rng(0)
    lengths = np.array([3, 0, 1, 0, 0, 5, 2, 0])
    bags = [random.normal(size=length) for length in lengths]
    expected = [sum(bag) / len(bag) if len(bag) else 0.0 for bag in bags]
    assert bag_means(np.concatenate(bags), lengths) == pytest.approx(expected, abs=1e-12)
    assert bag_means(bags[0], None) is bags[0]


def _pair_count_auc(scores: np.ndarray, clicked: np.ndarray) -> float:
    positives, negatives = scores[clicked][:, None], scores[~clicked][None, :]
    return float(((positives > negatives) + 0.5 * (positives == negatives)).mean())


def test_best_reachable_counts_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The AUC is the share of (click, no click) pairs that the true probabilities order rightly,
    counted one by one, and the log loss the textbook's, on the labels in the files."""
    kept: list[np.ndarray] = []
    add = Scores.add
    monkeypatch.setattr(
        Scores, "add", lambda self, logits, labels: (kept.append(logits), add(self, logits, labels))
    )
    best = _make(tmp_path / "data").best_reachable
    clicked = _read(tmp_path / "data", "test")["label"].to_numpy().astype(bool)
    probabilities = 1 / (1 + np.exp(-np.concatenate(kept)))
    likelihood = np.where(clicked, probabilities, 1 - probabilities)
    assert best is not None and len(clicked) == 1500
    assert best.auc == pytest.approx(_pair_count_auc(probabilities, clicked), abs=1e-12)
    assert best.logloss == pytest.approx(-np.log(likelihood).mean(), abs=1e-12)


def test_ties_count_half():
    """Rows of equal probability are ordered by nothing: each such pair counts half."""
    random = np.random.default_rng(0)
    logits, labels = random.integers(0, 5, 300) / 2.0, random.integers(0, 2, 300).astype(np.int8)
    scores = Scores()
    scores.add(logits[:100], labels[:100])
    scores.add(logits[100:], labels[100:])
    best = scores.best_reachable()
    assert best is not None
    assert best.auc == pytest.approx(_pair_count_auc(logits, labels.astype(bool)), abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_click_rate_and_best_auc_meet_their_targets(tmp_path: Path, seed: int):
    """Whatever the seed draws, the model is scaled to the same click rate and difficulty."""
    info = _make(tmp_path / "data", train_rows=1, test_rows=40_000, seed=seed)
    assert info.best_reachable is not None
    assert info.best_reachable.auc == pytest.approx(BEST_AUC, abs=0.012)
    labels = _read(tmp_path / "data", "test")["label"].to_numpy()
    assert labels.mean() == pytest.approx(CLICK_RATE, abs=0.012)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_data_can_be_learned(tmp_path: Path, seed: int):
    """Click rates of ids, counted in the training split, take a score without any interactions
    more than half the way from chance to the best reachable, and not beyond that."""
    size, names = 1000, [f"C{i}" for i in range(8)]
    features = [SyntheticFeature(name, size) for name in names]
    request = {"features": features, "dense": [], "train_rows": 40_000, "test_rows": 20_000}
    info = _make(tmp_path / "data", seed=seed, **request)
    train, test = _read(tmp_path / "data", "train"), _read(tmp_path / "data", "test")
    clicks = train["label"].to_numpy()
    score = np.zeros(test.num_rows)
    for name in names:
        ids = train[name].to_numpy()
        shown = np.bincount(ids, minlength=size)
        rate = (np.bincount(ids, clicks, size) + 20 * clicks.mean()) / (shown + 20)
        score += np.log(rate / (1 - rate))[test[name].to_numpy()]
    scores = Scores()
    scores.add(score, test["label"].to_numpy())
    learned, best = scores.best_reachable(), info.best_reachable
    assert learned is not None and best is not None
    assert (0.5 + best.auc) / 2 < learned.auc < best.auc


def test_the_smallest_requests_work(tmp_path: Path):
    """One constant feature, no counts, no test split: no click to predict, but no failure."""
    one = [SyntheticFeature("C1", 1)]
    info = _make(tmp_path / "a", features=one, dense=[], train_rows=1, test_rows=0)
    assert info.rows == {"train": 1} and info.best_reachable is None
    info = _make(tmp_path / "b", features=one, dense=[], train_rows=1, test_rows=2000)
    assert info.best_reachable is not None and info.best_reachable.auc == 0.5
    assert _read(tmp_path / "b", "test")["C1"].to_pylist() == [0] * 2000


REFUSED = [
    ({"dense": ["C1"]}, "column C1 is named twice"),
    ({"label": "I1"}, "column I1 is named twice"),
    ({"features": []}, "no sparse features"),
    ({"features": [SyntheticFeature("C1", 0)]}, "feature C1: num_embeddings is 0"),
    ({"features": [SyntheticFeature("C1", 1 << 40)]}, "feature C1: num_embeddings is"),
    ({"features": [SyntheticFeature("C1", 9, 0.0)]}, "feature C1: pooling_factor is 0.0"),
    ({"train_rows": 0}, "0 train rows"),
    ({"test_rows": -1}, "-1 test rows"),
    ({"zipf": -0.1}, "zipf is -0.1"),
    ({"zipf": float("nan")}, "zipf is nan"),
    ({"seed": -1}, "seed is -1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_malformed_requests_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    """The message names what was asked for, and nothing is written."""
    with pytest.raises(RequestError, match=message):
        _make(tmp_path / "data", **changes)
    assert list(tmp_path.iterdir()) == []


def test_progress_and_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Progress counts the rows of both splits, and an interruption leaves nothing behind."""
    monkeypatch.setattr(synthetic, "_CHUNK_ROWS", 1000)
    seen: list[int] = []
    _make(tmp_path / "data", on_progress=seen.append)
    assert seen == [1000, 2000, 3000, 4000, 5000, 6000, 6500]

    def interrupt(rows: int) -> None:
        if rows == 3000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _make(tmp_path / "other", on_progress=interrupt, row_group_rows=100)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
