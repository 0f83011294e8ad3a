"""Statistics of data, against counting in plain Python."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner import RequestError, UserError
from planner.table_list import load_table_list
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS
from shardemb.config import RunConfig
from shardemb.data import statistics_counts, statistics_input
from shardemb.data.criteo import DENSE, SPARSE, convert_criteo
from shardemb.data.hashing import hash_ids, strings_to_ids
from shardemb.data.statistics import collect_statistics
from shardemb.data.statistics_ids import IdCounts, Skew
from shardemb.data.statistics_summary import Collisions

Rows = list[list[int | None] | None]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a batch or two, so that small data has many."""
    monkeypatch.setattr(statistics_input, "CHUNK_ROWS", 1)
    monkeypatch.setattr(statistics_input, "ROW_GROUPS_IN_CHUNK", 1)


def write(path: Path, row_group_size: int = 7, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, write_page_checksum=True)
    return path


def drawn_rows(seed: int, rows: int) -> Rows:
    """Lists of ids that repeat, some of them null, empty or with null ids."""
    random = np.random.default_rng(seed)
    made: Rows = [
        random.zipf(1.3, random.integers(0, 6)).clip(0, 500).tolist() for _ in range(rows)
    ]
    for i in range(0, rows, 11):
        made[i] = None
    for i in range(3, rows, 13):
        made[i] = [5, None, 5]
    return made


def histogram_by_hand(batches: Sequence[Sequence[Any]]) -> list[float]:
    """Lookups of rows that occur (2^(i-1), 2^i] times in their batch; bin 0: once."""
    bins = [0] * REUSE_BINS
    for batch in batches:
        for count in Counter(batch).values():
            bins[min(math.ceil(math.log2(count)), REUSE_BINS - 1)] += count
    return [lookups / sum(bins) for lookups in bins]


def top_by_hand(ids: Sequence[Any], percent: int) -> float:
    counts = sorted(Counter(ids).values(), reverse=True)
    return sum(counts[: math.ceil(len(counts) * percent / 100)]) / len(ids)


def batches_of(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Whole batches only."""
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]


def flat(rows: Rows) -> list[int]:
    return [i for row in rows if row is not None for i in row if i is not None]


def config_of(tables: dict[str, Any], features: dict[str, Any], **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"data": {"dir": "unused", "features": features, **data}, "tables": tables}
    )


def test_lists_of_ids(tmp_path: Path, small_chunks: None) -> None:
    """Every number of a list column with nulls, whatever files and row groups cut it into."""
    rows = drawn_rows(0, 300)
    for i, (start, stop) in enumerate([(0, 90), (90, 97), (97, 300)]):
        column = pa.array(rows[start:stop], pa.list_(pa.int32()))
        write(tmp_path / f"{i}.parquet", row_group_size=[7, 40, 64][i], ids=column)
    found = collect_statistics([tmp_path], batch_size=50).features["ids"]
    ids, lengths = flat(rows), sorted(len(flat([row])) for row in rows)
    assert found.rows == 300 and found.lookups == len(ids)
    assert found.nulls == sum(row is None or None in row for row in rows)
    assert found.distinct_ids == len(set(ids)) and found.is_exact
    assert found.pooling_factor == len(ids) / 300
    assert (found.pooling_p50, found.pooling_p99) == (lengths[149], lengths[296])
    assert found.top_1_percent == pytest.approx(top_by_hand(ids, 1))
    assert found.top_10_percent == pytest.approx(top_by_hand(ids, 10))
    assert found.reuse_histogram == histogram_by_hand([flat(b) for b in batches_of(rows, 50)])
    assert found.largest_id == max(ids) and found.out_of_range == 0


def test_histogram_by_hand(tmp_path: Path) -> None:
    """One row 5 times, one twice, one once: 5/8 of the lookups are in bin 3, 2/8 in bin 1."""
    write(tmp_path / "a.parquet", ids=[7, 3, 7, 7, 3, 7, 9, 7])
    found = collect_statistics([tmp_path], batch_size=8).features["ids"].reuse_histogram
    assert found == [1 / 8, 2 / 8, 0, 5 / 8] + [0] * 13


@pytest.mark.parametrize(
    ("count", "bin_"),
    [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (32768, 15), (32769, 16), (10**6, 16)],
)
def test_edges_of_bins(count: int, bin_: int) -> None:
    """The bin of a row that occurs so often, as `TableSpec.reuse_histogram` has it."""
    found = statistics_counts.reuse_lookups(np.array([count]))
    assert found.tolist() == [count if i == bin_ else 0 for i in range(REUSE_BINS)]


def test_batches_cross_files_and_short_ones_do_not_count(tmp_path: Path) -> None:
    """A batch is so many rows of all files on end; what is left over has no histogram."""
    for i in range(4):
        write(tmp_path / f"{i}.parquet", row_group_size=2, ids=[i // 2] * 3)
    found = collect_statistics([tmp_path], batch_size=6)
    assert found.batches == 2
    assert found.features["ids"].reuse_histogram == histogram_by_hand([[0] * 6, [1] * 6])
    found = collect_statistics([tmp_path], batch_size=10)
    assert found.batches == 1
    assert found.features["ids"].reuse_histogram == histogram_by_hand([[0] * 6 + [1] * 4])
    found = collect_statistics([tmp_path], batch_size=13)
    assert found.batches == 0 and found.features["ids"].reuse_histogram is None


@pytest.mark.parametrize("chunk_rows", [1, 100, 10**6])
def test_parts_merged_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_rows: int
) -> None:
    """Ids, samples of ids and histograms are the same to the last digit however data is cut."""
    monkeypatch.setattr(statistics_counts, "MOST_IDS_OF_FEATURE", 100)
    rows, strings = drawn_rows(1, 1000), [f"s{i % 333}" for i in range(1000)]
    path = write(tmp_path / "a.parquet", row_group_size=64, ids=rows, words=strings)
    whole = collect_statistics([path], batch_size=30)
    monkeypatch.setattr(statistics_input, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(statistics_input, "ROW_GROUPS_IN_CHUNK", 0)
    assert collect_statistics([path], batch_size=30) == whole
    assert not whole.features["words"].is_exact


def test_moments(tmp_path: Path, small_chunks: None) -> None:
    """Of the finite numbers, also far from 0; nulls, NaN and infinities are counted apart."""
    values = np.random.default_rng(0).normal(1e6, 1e-1, 200)
    column: list[float | None] = [*values, None, None, math.nan, math.inf, -math.inf]
    wrong = [None] * 204 + [math.nan]
    write(tmp_path / "a.parquet", x=column, empty=wrong, flag=[True] * 41 + [False] * 164)
    found = collect_statistics([tmp_path], batch_size=16).dense
    x, empty = found["x"], found["empty"]
    assert (x.rows, x.nulls, x.nans, x.infinite) == (205, 2, 1, 2)
    assert (x.min, x.max) == (values.min(), values.max())
    assert x.mean == pytest.approx(math.fsum(values) / 200, rel=1e-14)
    assert x.std == pytest.approx(values.std(), rel=1e-6)
    assert (empty.nulls, empty.nans, empty.mean, empty.std) == (204, 1, None, None)
    assert found["flag"].mean == pytest.approx(0.2)


def test_max_rows(tmp_path: Path) -> None:
    """The first rows only, over row groups and files."""
    for i in range(3):
        write(tmp_path / f"{i}.parquet", ids=list(range(10 * i, 10 * i + 10)))
    found = collect_statistics([tmp_path], max_rows=13)
    assert found.rows == 13 and found.features["ids"].largest_id == 12


def test_tables_of_a_config(tmp_path: Path, small_chunks: None) -> None:
    """Ids out of range, rows of shared and hashed tables, and nulls that a row stands for."""
    big = [(i * 7919) % 61 * 10**12 if i % 5 else None for i in range(80)]
    a, b = [i % 9 for i in range(80)], [i % 4 if i % 10 else -1 for i in range(80)]
    write(tmp_path / "t.parquet", label=[0] * 80, a=a, b=b, big=big, x=[0.5] * 80, other=["q"] * 80)
    config = config_of(
        {
            "both": {"num_embeddings": 8, "embedding_dim": 4, "feature_names": ["a", "b"]},
            "hashed": {"num_embeddings": 16, "embedding_dim": 8, "feature_names": ["h"]},
        },
        {"h": {"column": "big", "ids": "hash", "null_row": 0}},
        dense={"columns": ["x"]},
    )
    found = collect_statistics([tmp_path], config, batch_size=20)
    assert list(found.features) == ["a", "b", "h"] and list(found.dense) == ["x"]
    assert found.features["a"].out_of_range == a.count(8)
    assert found.features["b"].out_of_range == b.count(-1)
    hashed = found.features["h"]
    rows = [0 if i is None else int(hash_ids(np.array([i]), 16, 0)[0]) for i in big]
    assert (hashed.nulls, hashed.lookups, hashed.pooling_factor) == (16, 80, 1.0)
    assert hashed.distinct_ids == len(set(big) - {None})
    assert hashed.top_1_percent == max(Counter(big).values()) / 80
    assert hashed.reuse_histogram == histogram_by_hand(batches_of(rows, 20))
    ids_of_row = Counter(int(hash_ids(np.array([i]), 16, 0)[0]) for i in {*big} - {None})
    assert hashed.collisions is not None and hashed.collisions.rows == 15
    assert hashed.collisions.measured_rows_used == len(ids_of_row)
    shared = sum(n for n in ids_of_row.values() if n > 1)
    assert hashed.collisions.measured_share == shared / len(set(big) - {None})


def test_ids_of_several_hashes(tmp_path: Path) -> None:
    """An id makes a lookup for each hash: so the pooling factor and the reuse of rows count."""
    ids = [i % 7 if i % 4 else None for i in range(24)]
    write(tmp_path / "t.parquet", label=[0] * 24, a=ids)
    read = {"ids": "hash", "num_hashes": 2, "hash_seed": 5, "null_row": 1}
    config = config_of({"a": {"num_embeddings": 9, "embedding_dim": 4}}, {"a": read})
    found = collect_statistics([tmp_path], config, batch_size=24).features["a"]
    rows = [
        1 if i is None else int(hash_ids(np.array([i]), 9, 1, seed)[0])
        for i in ids
        for seed in (5, 6)
    ]
    assert found.reuse_histogram == histogram_by_hand([rows])
    assert (found.pooling_factor, found.pooling_p99, found.lookups) == (2, 2, 48)
    assert found.top_1_percent == 2 * 6 / 48 and found.collisions is None


def test_a_vocabulary(tmp_path: Path) -> None:
    """Known words have rows of their own, all others share one."""
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    words = ["dog", "cat", "emu", "yak", "dog", "dog"]
    write(tmp_path / "t.parquet", label=[0] * 6, a=words)
    read = {"ids": "vocabulary", "vocabulary": str(tmp_path / "words.txt")}
    config = config_of({"a": {"num_embeddings": 3, "embedding_dim": 4}}, {"a": read})
    found = collect_statistics([tmp_path], config, batch_size=6).features["a"]
    assert found.reuse_histogram == histogram_by_hand([[1, 0, 2, 2, 1, 1]])
    assert found.distinct_ids == 4 and found.collisions is None and found.out_of_range == 0


def test_nulls_of_ids_as_they_are(tmp_path: Path) -> None:
    """A null counts as the row that stands for it, wherever it is in a list."""
    write(tmp_path / "t.parquet", label=[0] * 4, a=[[1, None], None, [2], [2, 2, None]])
    tables = {"a": {"num_embeddings": 8, "embedding_dim": 4}}
    found = collect_statistics(
        [tmp_path], config_of(tables, {"a": {"null_row": 2}}), batch_size=4
    ).features["a"]
    assert (found.lookups, found.distinct_ids, found.nulls) == (6, 2, 3)
    assert found.reuse_histogram == histogram_by_hand([[1, 2, 2, 2, 2, 2]])


def test_the_table_list_is_one_the_planner_reads(tmp_path: Path) -> None:
    """Measured pooling and reuse of the table, both features' lookups together; the rest is the
    config's. Another batch size has no histogram that the planner could use."""
    n = REUSE_BATCH_SIZE
    random = np.random.default_rng(0)
    a, b = random.integers(0, 1000, n), random.integers(0, 3000, n)
    lists = [[int(i), int(i)] for i in b]
    write(tmp_path / "t.parquet", row_group_size=n // 3, label=[0] * n, a=a, b=lists)
    both = {"num_embeddings": 5000, "embedding_dim": 4, "feature_names": ["a", "b"]}
    config = config_of({"both": both}, {})
    path = tmp_path / "tables.json"
    for batch_size in (n, n // 2):
        found = collect_statistics([tmp_path / "t.parquet"], config, batch_size=batch_size)
        path.write_text(json.dumps(found.to_dict()["table_list"]))
        (table,) = load_table_list(path).tables
        wanted = config.table_specs()[0].model_copy(update={"pooling_factor": 1.5})
        if batch_size == n:
            reuse = histogram_by_hand([[*a.tolist(), *b.tolist(), *b.tolist()]])
            wanted = wanted.model_copy(update={"reuse_histogram": tuple(reuse)})
        assert table == wanted


def test_expected_collisions(tmp_path: Path) -> None:
    """Of n ids in m random rows: the mean over all the ways to place 3 ids in 4 rows."""
    places = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    used = sum(len(set(place)) for place in places) / len(places)
    alone = sum(n for place in places for n in Counter(place).values() if n == 1) / len(places)
    found = collisions(tmp_path, np.array([10, 20, 30]), num_embeddings=4)
    assert found.expected_rows_used == pytest.approx(used)
    assert found.expected_share == pytest.approx(1 - alone / 3)


def test_predicted_collisions_are_those_of_the_hash(tmp_path: Path) -> None:
    """Twenty thousand ids in forty thousand rows: 39% share a row, measured and predicted."""
    found = collisions(tmp_path, np.arange(20_000) * 3, num_embeddings=40_000)
    assert found.measured_share is not None
    assert found.expected_share == pytest.approx(1 - math.exp(-0.5), abs=1e-4)
    assert found.measured_share == pytest.approx(found.expected_share, abs=0.02)


def collisions(folder: Path, ids: Any, num_embeddings: int) -> Collisions:
    """Of ids that are hashed to a table."""
    write(folder / "a.parquet", row_group_size=1000, label=[0] * len(ids), a=ids)
    table = {"num_embeddings": num_embeddings, "embedding_dim": 4}
    found = collect_statistics([folder], config_of({"a": table}, {"a": {"ids": "hash"}}))
    assert found.features["a"].collisions is not None
    return found.features["a"].collisions


def test_strings(tmp_path: Path) -> None:
    """Words are ids: as many distinct ones, and in the same rows as in training."""
    words = ["cat", "dog", "cat", None, "émeu", "", "cat"]
    write(tmp_path / "a.parquet", label=[0] * 7, w=words, lists=[[w] * 2 for w in words])
    plain = collect_statistics([tmp_path], batch_size=7)
    assert plain.features["w"].distinct_ids == plain.features["lists"].distinct_ids == 4
    assert plain.features["w"].out_of_range == 0 and plain.features["w"].nulls == 1
    tables = {"w": {"num_embeddings": 3, "embedding_dim": 4}}
    config = config_of(tables, {"w": {"ids": "hash"}})
    ids = strings_to_ids(pa.array(words)).drop_null().to_numpy(zero_copy_only=False)
    found = collect_statistics([tmp_path], config, batch_size=7).features["w"]
    assert found.reuse_histogram == histogram_by_hand([hash_ids(ids, 3).tolist()])


def test_a_sketch_of_many_ids() -> None:
    """Three million distinct ids in 64 Ki: within four standard errors, in parts too; counts of
    the sample are exact."""
    limit, distinct = 1 << 16, 3_000_000
    parts = [IdCounts(limit) for _ in range(3)]
    for i, start in enumerate(range(0, distinct, 500_000)):
        ids = np.arange(start, start + 500_000) * 97
        parts[i % 3].add(ids, np.full(len(ids), 2))
        parts[i % 2].add(ids[::2], np.ones(len(ids) // 2, np.int64))
    merged = IdCounts(limit)
    for part in parts:
        merged.merge(part)
    assert not merged.is_exact and len(merged.ids) == limit
    assert merged.relative_error == pytest.approx(1 / 256, rel=1e-3)
    assert merged.distinct == pytest.approx(distinct, rel=4 * merged.relative_error)
    assert np.array_equal(merged.counts, np.where(merged.ids // 97 % 2 == 0, 3, 2))


def test_up_to_the_limit_counts_are_exact() -> None:
    """One id more, and it is a sample."""
    for distinct, is_exact in ((1000, True), (1001, False)):
        counts = IdCounts(1000)
        for _ in range(3):
            counts.add(np.arange(distinct), np.ones(distinct, np.int64))
        assert counts.is_exact == is_exact
        if is_exact:
            assert counts.distinct == 1000 and counts.relative_error == 0
            assert counts.counts.tolist() == [3] * 1000


def test_skew_of_a_sample() -> None:
    """Zipf's law over 300,000 ids, from a sample of 20,000 of them: within one percent, though the
    sample lacks most of the hottest ids."""
    weights = 1 / np.arange(1, 300_001) ** 1.1
    times = np.maximum((weights / weights[-1]).astype(np.int64), 1)
    ids = np.random.default_rng(0).permutation(300_000)
    sampled = IdCounts(20_000)
    sampled.add(np.sort(ids), times[np.argsort(ids)])
    skew = Skew(sampled, lookups=int(times.sum()))
    assert skew.top(1) == pytest.approx(times[:3000].sum() / times.sum(), abs=0.01)
    assert skew.top(10) == pytest.approx(times[:30_000].sum() / times.sum(), abs=0.01)
    for share, lookups in skew.curve():
        wanted = times[: round(share * 300_000)].sum() / times.sum()
        assert lookups == pytest.approx(wanted, abs=0.02)
    assert skew.curve()[-1] == (1, 1)


def test_real_data(shared_data: Path, tmp_path: Path) -> None:
    """Criteo's 80,000 rows, as a run reads them and as they are, against plain Python."""
    convert_criteo(shared_data / "criteo/criteo_80k.tsv.gz", tmp_path / "data")
    table = pq.read_table(tmp_path / "data/train")
    config = config_of(
        {name: {"num_embeddings": 20_000, "embedding_dim": 8} for name in SPARSE},
        {name: {"ids": "hash", "null_row": 0} for name in SPARSE},
        dense={"columns": list(DENSE)},
    )
    hashed = collect_statistics([tmp_path / "data"], config)
    plain = collect_statistics([tmp_path / "data"])
    assert set(plain.features) == {"label", *DENSE, *SPARSE} and plain.rows == 80_000
    for name in SPARSE:
        values = table[name].to_pylist()
        ids = [value for value in values if value is not None]
        assert plain.features[name].distinct_ids == len(set(ids))
        assert plain.features[name].pooling_factor == len(ids) / 80_000
        assert plain.features[name].top_1_percent == pytest.approx(top_by_hand(ids, 1))
        wanted = histogram_by_hand([[v for v in values[:REUSE_BATCH_SIZE] if v is not None]])
        assert plain.features[name].reuse_histogram == wanted
        assert hashed.features[name].pooling_factor == 1
        assert hashed.features[name].nulls == values.count(None)
        found = hashed.features[name].collisions
        assert found is not None and found.measured_share is not None
        assert found.measured_share == pytest.approx(found.expected_share, abs=0.05)
    for name in DENSE:
        numbers = [value for value in table[name].to_pylist() if value is not None]
        assert hashed.dense[name].mean == pytest.approx(math.fsum(numbers) / len(numbers))
        assert hashed.dense[name].std == pytest.approx(np.std(numbers))


def test_ray_counts_the_same(tmp_path: Path, small_chunks: None) -> None:
    """To the last digit, mean and standard deviation too; a damaged file is told the same way."""
    ray = pytest.importorskip("ray")
    numbers = np.random.default_rng(0).normal(size=1000)
    path = write(tmp_path / "a.parquet", 64, ids=drawn_rows(2, 1000), x=numbers)
    try:
        local = collect_statistics([path], batch_size=50)
        assert collect_statistics([path], batch_size=50, engine="ray") == local
        damage(path, "ids", 12)
        with pytest.raises(
            UserError, match=r"a\.parquet, row group 12, column ids: cannot be read"
        ):
            collect_statistics([path], batch_size=50, engine="ray")
    finally:
        ray.shutdown()


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, or to leave out."""
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write(tmp_path / "a.parquet", ids=[1])
    with pytest.raises(RequestError, match=r"needs Ray, which is not installed: pip install ray"):
        collect_statistics([path], engine="ray")


def damage(path: Path, column: str, row_group: int) -> None:
    """One bit of a column's first page is not what it was."""
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(row_group)
        chunks = [group.column(i) for i in range(group.num_columns)]
    (chunk,) = (c for c in chunks if c.path_in_schema.split(".")[0] == column)
    content = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    content[first + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)


def _corrupt(path: Path) -> None:
    write(path / "a.parquet", row_group_size=100, ids=list(range(1000)), x=[0.0] * 1000)
    damage(path / "a.parquet", "ids", 5)


def _truncated(path: Path) -> None:
    write(path / "a.parquet", ids=list(range(1000)))
    (path / "a.parquet").write_bytes((path / "a.parquet").read_bytes()[:-100])


def _retyped(path: Path) -> None:
    write(path / "a.parquet", ids=[1], y=[1])
    write(path / "b.parquet", ids=["1"], y=[1])


def _now_a_list(path: Path) -> None:
    write(path / "a.parquet", ids=[1])
    write(path / "b.parquet", ids=[[1]])


def _one_column_less(path: Path) -> None:
    write(path / "a.parquet", ids=[1], y=[1])
    write(path / "b.parquet", ids=[1])


def _no_rows(path: Path) -> None:
    write(path / "a.parquet", ids=pa.array([], pa.int64()))
    write(path / "b.parquet", ids=pa.array([], pa.string()))


def _only_dates(path: Path) -> None:
    write(path / "a.parquet", day=pa.array([1], pa.date32()))


MISTAKES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: None, r"holds no \.parquet file"),
    (lambda path: (path / "a.parquet").write_text("a,b\n"), r"a\.parquet is not a whole Parquet"),
    (_truncated, r"a\.parquet is not a whole Parquet file"),
    (_no_rows, r"a\.parquet and 1 more: there are no rows"),
    (_corrupt, r"a\.parquet, row group 5, column ids: cannot be read .* damaged: write it again"),
    (_retyped, r"b\.parquet, column ids: the type is string, in .*a\.parquet it is int64; write"),
    (_now_a_list, r"b\.parquet, column ids: the type is list<.*int64>, in .* it is int64"),
    (_one_column_less, r"b\.parquet has no column y, which other files have"),
    (_only_dates, r"a\.parquet has no column of numbers, .* it has day \(date32\[day\]\)"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_bad_data(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    """Told with the file, and the row group or column, and what to do."""
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        collect_statistics([tmp_path])
    assert caught.value.exit_code == 1


WRONG_FOR_A_CONFIG = [
    ({"b": ["x"]}, {}, r"column b: feature b needs integer ids .*ids: hash for strings"),
    ({"b": [0.5]}, {"b": {"ids": "hash"}}, "feature b needs integers, strings or lists of them"),
    ({"a": [1]}, {}, r"has no column b, which the config uses; it has label, x, a"),
    ({"b": [1], "x": ["1"]}, {}, "column x: a dense feature needs numbers, found string"),
]


@pytest.mark.parametrize(("columns", "features", "message"), WRONG_FOR_A_CONFIG)
def test_data_that_is_not_the_config_s(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any], message: str
) -> None:
    """A column that a run of the config could not read: which, for what, and what was found."""
    write(tmp_path / "a.parquet", **{"label": [0], "x": [1], **columns})
    tables = {"b": {"num_embeddings": 4, "embedding_dim": 4}}
    config = config_of(tables, features, dense={"columns": ["x"]})
    with pytest.raises(UserError, match=message):
        collect_statistics([tmp_path], config)


def test_paths(tmp_path: Path) -> None:
    """Files, folders and globs; a file that is named twice is counted once."""
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a", "b", "sub/c")):
        write(tmp_path / f"{name}.parquet", ids=[i])
    glob = f"{tmp_path}/[ab].parquet"
    for paths, rows in (([tmp_path], 3), ([glob], 2), ([glob, tmp_path / "a.parquet"], 2)):
        assert collect_statistics(paths).rows == rows
    assert collect_statistics([f"{tmp_path}/**/*.parquet"]).rows == 3
    for paths in ([tmp_path / "d.parquet"], [f"{tmp_path}/*.csv"]):
        with pytest.raises(RequestError, match="there is no such file or folder"):
            collect_statistics(paths)
    with pytest.raises(RequestError, match="name at least one Parquet file"):
        collect_statistics([])


def test_other_columns_are_named(tmp_path: Path) -> None:
    """What no model trains on is left out and said to be."""
    path = tmp_path / "a.parquet"
    write(path, ids=[1], day=pa.array([1], pa.date32()), vector=[[0.5]])
    found = collect_statistics([path])
    assert found.skipped.keys() == {"day", "vector"} and not found.dense
