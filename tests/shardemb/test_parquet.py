from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import UserError
from shardemb.data.batch import Batch
from shardemb.data.columns import Origin, convert
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema, FeatureSchema, LabelSchema
from shardemb.data.sources import parquet_files
from tests.shardemb.test_hashing import splitmix64

INTEGERS = [getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)]


class Row(NamedTuple):
    label: float
    dense: list[float]
    bags: dict[str, list[tuple[int, float]]]  # (id, weight)


def _feature(name: str, rows: int = 100, **fields: Any) -> FeatureSchema:
    return FeatureSchema(name, f"table_{name}", rows, **{"column": name, **fields})


def _schema(*features: FeatureSchema, dense: Sequence[str] = (), **fields: Any) -> BatchSchema:
    """With the row number, `n`, as the last dense feature."""
    return BatchSchema("label", dense=(*dense, "n"), features=features, **fields)


def _write(path: Path, columns: dict[str, Any], row_group_size: int = 1000, **options: Any) -> Path:
    """Columns as a Parquet file; with row numbers, and labels of zero unless they are given."""
    rows = len(next(iter(columns.values())))
    added = {"n": pa.array(range(rows), pa.int32()), "label": pa.array([0] * rows, pa.int8())}
    columns = {**added, **columns}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **options)
    return path


def _plain_rows(path: Path, schema: BatchSchema) -> list[Row]:
    """What the rows of a file mean, by a loop over Python values; a null list is an empty one."""
    lists = {field.name for field in pq.read_schema(path) if pa.types.is_nested(field.type)}
    records = [
        {name: [] if value is None and name in lists else value for name, value in record.items()}
        for record in pq.read_table(path).to_pylist()
    ]
    return [_plain_row(record, schema) for record in records]


def _plain_row(record: dict[str, Any], schema: BatchSchema) -> Row:
    dense, bags = [], {}
    for name in schema.dense:
        value = record[name]
        if value is None or math.isnan(value):
            value = schema.dense_null_value
        elif schema.dense_transform == "log":
            value = math.copysign(math.log(1 + abs(value)), value)
        dense.append(float(value))
    for feature in schema.features:
        ids = record[feature.column]
        weights = record[feature.weights] if feature.weights else None
        if not isinstance(ids, list):
            ids, weights = [ids], [1.0 if weights is None else weights]
        bag = []
        for index, value in enumerate(ids):
            weight = weights[index] if weights else 1.0
            if value is None and feature.null_row is not None:
                bag.append((feature.null_row, weight))
            elif value is not None and feature.ids == "as_is":
                bag.append((value, weight))
            elif value is not None:
                reserved = feature.null_row
                row = splitmix64(value % 2**64) % (feature.num_embeddings - (reserved is not None))
                bag.append((row + (reserved is not None and row >= reserved), weight))
        bags[feature.name] = bag
    return Row(float(record[schema.label]), dense, bags)


def _rows(batch: Batch) -> list[Row]:
    """The rows of data of a batch; padding is checked to be nothing."""
    bags = {}
    for name, jagged in batch.sparse.to_dict().items():
        ids, weights = jagged.to_dense(), jagged.weights_or_none()
        parts = [[1.0] * len(bag) for bag in ids]
        if weights is not None:
            parts = [part.tolist() for part in jagged.to_dense_weights()]
        bags[name] = [
            list(zip(i.tolist(), w, strict=True)) for i, w in zip(ids, parts, strict=True)
        ]
    count = int(batch.mask.sum())
    size = len(batch.mask)
    assert batch.mask.tolist() == [1.0] * count + [0.0] * (size - count)
    assert not batch.dense[count:].any() and not batch.labels[count:].any()
    assert all(bag == [] for name in bags for bag in bags[name][count:])
    assert len(batch.dense) == len(batch.labels) == size
    return [
        Row(float(batch.labels[i]), batch.dense[i].tolist(), {name: bags[name][i] for name in bags})
        for i in range(count)
    ]


def _assert_same(found: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(found) == len(expected)
    for row, plain in zip(found, expected, strict=True):
        assert row.label == pytest.approx(plain.label)
        assert row.dense == pytest.approx(plain.dense, rel=1e-6)
        assert row.bags.keys() == plain.bags.keys()
        for name, bag in plain.bags.items():
            assert [i for i, _ in row.bags[name]] == [i for i, _ in bag]
            assert [w for _, w in row.bags[name]] == pytest.approx([w for _, w in bag])


def _read(path: Path, schema: BatchSchema, **options: Any) -> list[Row]:
    """The rows that a reader gives, in the order of the file."""
    reader = ParquetReader([path], schema, rank=0, world_size=1, **{"batch_size": 3, **options})
    rows = [row for batch in reader.epoch() for row in _rows(batch)]
    return sorted(rows, key=lambda row: row.dense[-1])


LISTS = [[1, 2, 3], [], None, [4], [5, None, 6], [None], [7, 8]]
SCALARS = [3, None, 0, 99, None, 5, 5]


@pytest.mark.parametrize("null_row", [None, 0, 42])
@pytest.mark.parametrize("ids", ["as_is", "hash"])
@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integer_columns_of_every_width(tmp_path: Path, kind: pa.DataType, ids: Any, null_row: Any):
    """Scalars and lists, nulls as no id or as their row, null and empty lists: as read plainly."""
    columns = {"c": pa.array(SCALARS, kind), "l": pa.array(LISTS, pa.list_(kind))}
    path = _write(tmp_path / "f.parquet", columns, row_group_size=4)
    schema = _schema(
        _feature("c", ids=ids, null_row=null_row), _feature("l", ids=ids, null_row=null_row)
    )
    _assert_same(_read(path, schema), _plain_rows(path, schema))


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()], ids=str)
def test_ids_of_all_64_bits_are_hashed(tmp_path: Path, kind: pa.DataType):
    """The smallest and largest integers, and those beyond int64, have the rows of their bits."""
    low = 0 if kind == pa.uint64() else -(1 << 63)
    values = [low, low + 1, low + (1 << 64) - 1, 12345, None]
    path = _write(tmp_path / "f.parquet", {"c": pa.array(values, kind)})
    schema = _schema(_feature("c", rows=1000, ids="hash", null_row=5))
    _assert_same(_read(path, schema), _plain_rows(path, schema))


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)], ids=str
)
def test_list_types(tmp_path: Path, kind: pa.DataType):
    """Lists, large lists and lists of fixed size, with null lists and null elements."""
    lists = [[1, 2], None, [3, 4], [None, 5], [6, 7]]
    path = _write(tmp_path / "f.parquet", {"l": pa.array(lists, kind)}, row_group_size=2)
    schema = _schema(_feature("l"))
    _assert_same(_read(path, schema), _plain_rows(path, schema))


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())], ids=str)
def test_chunked_and_sliced_arrays(kind: pa.DataType):
    """A table cut out of larger ones and glued together means its rows and no others."""
    whole = pa.table(
        {"n": range(14), "label": [0, 1] * 7, "c": range(14), "l": pa.array(LISTS * 2, kind),
         "w": pa.array([None if x is None else [0.5] * len(x) for x in LISTS] * 2)}
    )  # fmt: skip
    table = pa.concat_tables([whole.slice(2, 4), whole.slice(9, 0), whole.slice(7, 5)])
    schema = _schema(_feature("c"), _feature("l", null_row=50, weights="w"), dense=("c",))
    piece = convert(table, schema, Origin("f", 0))
    lists = [[] if x is None else [50 if v is None else v for v in x] for x in LISTS * 2]
    numbers = [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert piece.dense[0].tolist() == piece.bags[0].ids.tolist() == numbers
    ids, offsets = piece.bags[1].ids, piece.bags[1].offsets
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [lists[i] for i in numbers]
    assert piece.bags[1].weights is not None and (piece.bags[1].weights == 0.5).all()


@pytest.mark.parametrize("null_row", [None, 9])
def test_weights(tmp_path: Path, null_row: int | None):
    """Weights go with their ids, also past nulls; features without weights have ones."""
    columns = {
        "l": pa.array(LISTS, pa.list_(pa.int64())),
        "w": [[0.5, 1.5, 2.5], [], None, [4.5], [1.0, 2.0, 3.0], [8.0], [7.0, -8.0]],
        "c": pa.array([1, 2, 3, 4, 5, 6, 7]),
        "v": pa.array([1, 2, 3, 4, 5, 6, 7], pa.int8()),
    }
    path = _write(tmp_path / "f.parquet", columns, row_group_size=3)
    schema = _schema(
        _feature("l", weights="w", null_row=null_row),
        _feature("c", weights="v"),
        _feature("p", column="c"),
    )
    _assert_same(_read(path, schema), _plain_rows(path, schema))


def test_a_null_id_needs_no_weight(tmp_path: Path):
    """Where a null stands for no id, its weight does not matter."""
    path = _write(tmp_path / "f.parquet", {"c": [1, None], "w": [0.5, None]})
    assert [row.bags["c"] for row in _read(path, _schema(_feature("c", weights="w")))] == [
        [(1, 0.5)],
        [],
    ]


@pytest.mark.parametrize("transform", ["none", "log"])
@pytest.mark.parametrize("kind", [*INTEGERS, pa.float32(), pa.float64(), pa.bool_()], ids=str)
def test_dense_columns_of_every_type(tmp_path: Path, kind: pa.DataType, transform: Any):
    """Nulls, and NaN among floats, become the null value, after the transform."""
    values: list[Any] = [False, True, None, True, False]
    if pa.types.is_floating(kind):
        values = [0.0, -2.5, None, math.nan, 1e30, -1e-30]
    elif kind != pa.bool_():
        values = [0, 1, None, 100, 3 if str(kind).startswith("u") else -3]
    path = _write(tmp_path / "f.parquet", {"d": pa.array(values, kind), "c": [0] * len(values)})
    schema = _schema(_feature("c"), dense=("d",), dense_transform=transform, dense_null_value=-7.5)
    _assert_same(_read(path, schema), _plain_rows(path, schema))


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.uint64(), pa.float32(), pa.float64()])
def test_labels_of_every_type(tmp_path: Path, kind: pa.DataType):
    """Zeros and ones of any type are labels."""
    labels = pa.array([0, 1, 1, 0], pa.int64()).cast(kind)
    path = _write(tmp_path / "f.parquet", {"label": labels, "c": [1, 2, 3, 4]})
    assert [row.label for row in _read(path, _schema(_feature("c")))] == [0, 1, 1, 0]


def test_one_column_dense_and_sparse(tmp_path: Path):
    """A column can be a dense feature and two sparse ones, read in two ways, at once."""
    path = _write(tmp_path / "f.parquet", {"I1": pa.array([5, None, 7], pa.int32())})
    schema = _schema(
        _feature("I1", null_row=0),
        _feature("hashed", column="I1", ids="hash"),
        dense=("I1",),
        dense_transform="log",
    )
    _assert_same(_read(path, schema), _plain_rows(path, schema))


def test_strings_are_hashed(tmp_path: Path):
    """Equal strings have equal rows, other strings mostly others; a null is the null row."""
    texts = ["a", "b", None, "a", "", "b"]
    path = _write(tmp_path / "f.parquet", {"s": texts, "l": [[t, "a"] for t in texts]})
    schema = _schema(
        _feature("s", rows=10**6, ids="hash", null_row=3), _feature("l", rows=10**6, ids="hash")
    )
    rows = _read(path, schema)
    ids = [row.bags["s"][0][0] for row in rows]
    assert ids[0] == ids[3] and ids[1] == ids[5] and ids[2] == 3 and len(set(ids)) == 4
    assert [len(row.bags["l"]) for row in rows] == [2, 2, 1, 2, 2, 2]
    assert len({row.bags["l"][-1] for row in rows}) == 1


@st.composite
def _layouts(draw: st.DrawFn) -> dict[str, Any]:
    files = draw(st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=4))
    groups = sum(rows > 0 for file in files for rows in file)
    world_size = draw(st.integers(1, 6))
    if groups < world_size:
        files.append([draw(st.integers(1, 40)) for _ in range(world_size)])
    return {"files": files, "world_size": world_size, "batch_size": draw(st.integers(1, 50)),
            "shuffle": draw(st.booleans()), "seed": draw(st.integers(0, 3))}  # fmt: skip


def _write_layout(folder: Path, files: list[list[int]]) -> list[Path]:
    """Files whose row groups have the given numbers of rows; `n` numbers all rows."""
    schema = pa.schema({"label": pa.int8(), "n": pa.int64(), "l": pa.list_(pa.int64())})
    paths, start = [], 0
    for number, groups in enumerate(files):
        paths.append(folder / f"{number}.parquet")
        with pq.ParquetWriter(paths[-1], schema) as writer:
            for rows in groups:
                numbers = range(start, start + rows)
                lists = [[n % 7] * (n % 4) for n in numbers]
                columns = [[n % 2 for n in numbers], list(numbers), lists]
                writer.write_table(pa.table(columns, schema=schema))
                start += rows
    return paths


LAYOUT_SCHEMA = _schema(_feature("n", rows=10**6), _feature("l"))


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layout=_layouts())
def test_every_row_once_an_epoch(tmp_path: Path, layout: dict[str, Any]):
    """For any files, row groups, ranks and batch sizes: each row is on one rank once, whole; all
    ranks make the same steps and know how many rows each has over all ranks."""
    paths = _write_layout(tmp_path, layout.pop("files"))
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    world_size = layout["world_size"]
    readers = [ParquetReader(paths, LAYOUT_SCHEMA, rank=r, **layout) for r in range(world_size)]
    assert {reader.rows_per_epoch for reader in readers} == {total}
    steps = list(zip(*(reader.epoch(1) for reader in readers), strict=True))
    assert {reader.steps_per_epoch for reader in readers} == {len(steps)}
    seen: list[int] = []
    for batches in steps:
        assert all(len(batch.mask) == layout["batch_size"] for batch in batches)
        rows = [row for batch in batches for row in _rows(batch)]
        assert {batch.global_rows for batch in batches} == {len(rows)} and rows
        for row in rows:
            n = int(row.dense[0])
            assert row == Row(n % 2, [n], {"n": [(n, 1.0)], "l": [(n % 7, 1.0)] * (n % 4)})
            seen.append(n)
    assert sorted(seen) == list(range(total))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_with_equally_many_ids(tmp_path: Path, shuffle: bool, world_size: int):
    """Their batches are filled in another way, up to the rows that fill no batch: the same rows
    come out as a plain loop finds, weights and nulls in place."""
    random = np.random.default_rng(0)
    rows = 1003
    columns = {
        "a": pa.array(random.integers(0, 100, rows)),
        "l": pa.array(random.integers(0, 100, (rows, 3)).tolist()),
        "w": pa.array(random.random((rows, 3)).astype(np.float32).tolist()),
        "e": pa.array([[]] * rows, pa.list_(pa.int64())),
        "d": pa.array(random.integers(0, 9, rows), mask=random.random(rows) < 0.3),
    }
    path = _write(tmp_path / "f.parquet", columns, row_group_size=37)
    schema = _schema(
        _feature("a", ids="hash", null_row=4), _feature("l", weights="w"), _feature("e"),
        dense=("d",), dense_transform="log", dense_null_value=-1.0,
    )  # fmt: skip
    found = []
    for rank in range(world_size):
        options = {"batch_size": 20, "rank": rank, "world_size": world_size, "shuffle": shuffle}
        batches = list(ParquetReader([path], schema, **options).epoch())
        found += [row for batch in batches for row in _rows(batch)]
    found.sort(key=lambda row: row.dense[-1])
    expected = _plain_rows(path, schema)
    for row in found:
        row.dense[-1] = round(math.expm1(row.dense[-1]))
    for row in expected:
        row.dense[-1] = round(math.expm1(row.dense[-1]))
    _assert_same(found, expected)


def _order(paths: list[Path], epoch: int = 0, **options: Any) -> list[int]:
    options = {"batch_size": 10, "rank": 0, "world_size": 1, **options}
    reader = ParquetReader(paths, LAYOUT_SCHEMA, **options)
    return [int(row.dense[0]) for batch in reader.epoch(epoch) for row in _rows(batch)]


def test_the_order_depends_on_seed_and_epoch(tmp_path: Path):
    """The same seed and epoch give the same order, any other another; rows really move."""
    paths = _write_layout(tmp_path, [[20, 20], [20, 20]])
    orders = [_order(paths, e, shuffle=True, seed=s) for e in (0, 1) for s in (0, 1)]
    assert [_order(paths, e, shuffle=True, seed=s) for e in (0, 1) for s in (0, 1)] == orders
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(80)) for order in orders)
    stays = Counter(order[i] == i for order in orders for i in range(80))
    assert stays[True] < 40


def test_without_shuffling_epochs_are_alike(tmp_path: Path):
    """Seed and epoch change nothing then."""
    paths = _write_layout(tmp_path, [[20, 20], [20, 20]])
    assert _order(paths) == _order(paths, 5, seed=3)


BIG = 1 << 63
BAD_IDS = [
    (pa.int64(), [5, -1, 200], "row 1: feature c has id -1"),
    (pa.int64(), [5, 100, -1], "row 1: feature c has id 100"),
    (pa.int64(), [5, 5, BIG - 1], f"row 2: feature c has id {BIG - 1}"),
    (pa.uint64(), [BIG + 5, 0, 0], f"row 0: feature c has id {BIG + 5}"),
    (pa.list_(pa.int32()), [[], [1, 2], [3, 100]], "row 2: feature c has id 100"),
    (pa.list_(pa.int32()), [None, [None, 100], [3]], "row 1: feature c has id 100"),
]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("kind", "values", "message"), BAD_IDS)
def test_ids_outside_the_table(
    tmp_path: Path, kind: pa.DataType, values: list[Any], message: str, shuffle: bool
):
    """The error has file, row, feature, the id as written, the table, and two remedies."""
    path = _write(tmp_path / "f.parquet", {"c": pa.array(values, kind)})
    expected = (
        f"{path}, {message}, outside table table_c, whose rows are 0 to 99. Raise "
        "tables.table_c.num_embeddings above the largest id, or hash the ids into the table with "
        "data.features.c.ids: hash"
    )
    with pytest.raises(UserError) as caught:
        _read(path, _schema(_feature("c")), shuffle=shuffle)
    assert str(caught.value) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_row_numbers_count_from_the_start_of_the_file(tmp_path: Path, shuffle: bool):
    """A bad value in the third row group is told by its row in the file, shuffled or not."""
    ids = [0] * 100
    ids[77] = 1000
    path = _write(tmp_path / "f.parquet", {"c": ids}, row_group_size=30)
    with pytest.raises(UserError, match=f"{path}, row 77: feature c has id 1000"):
        _read(path, _schema(_feature("c")), shuffle=shuffle)


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (pa.array([0, None, 1]), "null"),
        (pa.array([0.0, math.nan, 1]), "nan"),
        (pa.array([1, 2, 3], pa.uint8()), "2"),
        (pa.array([1, -1, 3]), "-1"),
        (pa.array([0, 123456789, 1]), "123456789"),
        (pa.array([0.0, 1.5, 1]), "1.5"),
        (pa.array([0.0, math.inf, 1]), "inf"),
    ],
)
def test_labels_outside_zero_to_one(tmp_path: Path, labels: pa.Array, shown: str):
    """The first wrong label is told with its row, whatever is wrong with it."""
    path = _write(tmp_path / "f.parquet", {"label": labels, "c": [0, 0, 0]})
    with pytest.raises(UserError, match=f"{path}, row 1: .*label.* is {shown}, it must be"):
        _read(path, _schema(_feature("c")))


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_infinite_dense_values(tmp_path: Path, value: float):
    """What float32 cannot hold is told, not trained on."""
    path = _write(tmp_path / "f.parquet", {"d": [1.0, value], "e": [1.0, 1.0], "c": [0, 0]})
    schema = _schema(_feature("c"), dense=("e", "d"), dense_transform="log")
    with pytest.raises(UserError, match=f"row 1: dense feature d is {value}".replace("+", ".")):
        _read(path, schema)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0], [1.0]], "row 1: feature l has 2 ids and 1 weights .column w.; each id needs one"),
        ([None, [1.0, 1.0]], "row 0: feature l has 1 ids and 0 weights"),
        ([[1.0], [1.0, None]], "row 1: feature l has a null, NaN or infinite weight .column w."),
        ([[math.nan], [1.0, 1.0]], "row 0: feature l has a null, NaN or infinite weight"),
        ([[math.inf], [1.0, 1.0]], "row 0: feature l has a null, NaN or infinite weight"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, weights: list[Any], message: str):
    """Each id needs one number as its weight; the row that lacks it is told."""
    path = _write(tmp_path / "f.parquet", {"l": [[1], [2, 3]], "w": weights})
    with pytest.raises(UserError, match=f"{path}, {message}"):
        _read(path, _schema(_feature("l", weights="w")))


STRUCT = [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("column", "feature", "message"),
    [
        ([1.5, 2.5], {}, "column c: feature c needs integer ids or lists of them, found double$"),
        (["a", "b"], {}, "found string; set data.features.c.ids: hash$"),
        ([["a"], ["b"]], {}, "found list<.*string>; set data.features.c.ids: hash$"),
        ([[1.5], []], {"ids": "hash"}, "found list<.*double>$"),
        ([True, False], {"ids": "hash"}, "found bool$"),
        ([[[1]], [[2]]], {}, "found list<.*list<.*int64>>$"),
        (STRUCT, {}, "found struct<a: int64>$"),
        ([{"a": 1, "b": 2}] * 2, {}, "found struct<a: int64, b: int64>$"),
        ([[s] for s in STRUCT], {}, "found list<.*struct<a: int64>>$"),
        (
            pa.array([[(1, 2)], []], pa.map_(pa.int64(), pa.int64())),
            {},
            "found map<int64, int64.*>$",
        ),
        ([None, None], {"ids": "hash"}, "found null$"),
    ],
)
def test_columns_that_are_no_ids(tmp_path: Path, column: Any, feature: Any, message: str):
    """A type that cannot be ids is told before anything is read, nested structs included."""
    path = _write(tmp_path / "f.parquet", {"c": column})
    with pytest.raises(UserError, match=f"^{path}, .*{message}"):
        ParquetReader([path], _schema(_feature("c", **feature)), batch_size=2)


@pytest.mark.parametrize("column", [["a", "b"], [[1], [2]], STRUCT])
def test_columns_that_are_no_numbers(tmp_path: Path, column: Any):
    """Neither labels, dense features nor weights can be text or structs."""
    path = _write(tmp_path / "f.parquet", {"x": column, "c": [1, 2]})
    for schema in [
        BatchSchema("x", features=(_feature("c"),)),
        _schema(_feature("c"), dense=("x",)),
    ]:
        with pytest.raises(UserError, match=f"{path}, column x: a number is needed, found"):
            ParquetReader([path], schema, batch_size=2)
    if column != [[1], [2]]:
        with pytest.raises(UserError, match="column x: the weights of feature c must be numbers"):
            ParquetReader([path], _schema(_feature("c", weights="x")), batch_size=2)


def test_missing_and_doubled_columns(tmp_path: Path):
    """The error has the file, the column and what columns there are."""
    path = _write(tmp_path / "f.parquet", {"c": [1], "d": [1]})
    schema = _schema(_feature("x"))
    with pytest.raises(UserError, match=f"{path} has no column x, .* it has n, label, c, d"):
        ParquetReader([path], schema, batch_size=2)
    pq.write_table(pa.table([[0], [0], [1], [2]], names=["n", "label", "x", "x"]), path)
    with pytest.raises(UserError, match=f"{path} has two columns x"):
        ParquetReader([path], schema, batch_size=2)


def test_a_truncated_file(tmp_path: Path):
    """A file cut anywhere is refused before training, by name."""
    path = _write(tmp_path / "f.parquet", {"c": list(range(100))}, row_group_size=10)
    content = path.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"{path}"):
            ParquetReader([path], _schema(_feature("c")), batch_size=2)


def test_a_corrupt_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One flipped bit in a page with a checksum: rows before it are read, then the file and row
    group are told; no wrong value comes out. Or its row group alone is left out, and noted."""
    random = np.random.default_rng(0).integers(0, 100, 3000)
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = _write(tmp_path / "f.parquet", {"c": random}, 1000, **options)
    column = pq.read_metadata(path).row_group(1).column(2)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    schema = _schema(_feature("c"))
    with pytest.raises(UserError, match=f"{path}, row group 1: cannot be read .* is damaged"):
        _read(path, schema, batch_size=100)

    found = _read(path, schema, batch_size=100, skip_damaged=True, shuffle=True)
    whole = [*range(1000), *range(2000, 3000)]
    assert [int(row.dense[-1]) for row in found] == whole
    assert [row.bags["c"][0][0] for row in found] == random[whole].tolist()
    ranks = [
        ParquetReader([path], schema, batch_size=7, rank=r, world_size=2, skip_damaged=True)
        for r in range(2)
    ]
    steps = list(zip(*(reader.epoch() for reader in ranks), strict=True))
    assert sum(batch.mask.sum() for batches in steps for batch in batches) == 2000
    alone = ParquetReader([path], schema, batch_size=7, rank=0, world_size=1, skip_damaged=True)
    assert all(batch.global_rows == batch.mask.sum() for batch in alone.epoch())
    for reader in ranks:
        assert [(w.row_group, w.rows) for w in reader.skipped] == [(1, 1000)]
    assert "left out 1000 rows" in capsys.readouterr().err


def test_several_labels_and_groups(tmp_path: Path):
    """Columns of labels side by side and a number for each row's group, in batches that are full
    and in one that is not, whether rows have equally many ids or not; text and integers group the
    same rows."""
    random = np.random.default_rng(0)
    users, labels = random.integers(0, 9, 50), random.normal(size=(2, 50)).astype(np.float32)
    columns = {"y": labels[0], "z": labels[1], "user": users, "name": [f"u{n}" for n in users]}
    for lists in ([[1, 2]] * 50, [[1] * (n % 3) for n in range(50)]):
        path = _write(tmp_path / "f.parquet", {"l": lists, **columns}, 8)
        for group in ("user", "name"):
            pair = tuple(LabelSchema(name, -9, 9) for name in "yz")
            schema = BatchSchema(pair, ("n",), features=(_feature("l"),), group=group)
            for options in ({"shuffle": True}, {}):
                seen = 0
                reader = ParquetReader(path, schema, batch_size=16, rank=0, world_size=1, **options)
                for batch in reader.epoch():
                    count = int(batch.mask.sum())
                    number = batch.dense[:count, 0].long().numpy()
                    assert batch.labels.shape == (16, 2) and not batch.labels[count:].any()
                    assert np.array_equal(batch.labels[:count].numpy(), labels.T[number])
                    assert batch.groups is not None
                    groups = batch.groups[:count].numpy()
                    same = users[number][:, None] == users[number]
                    assert np.array_equal(groups[:, None] == groups, same)
                    seen += count
                assert seen == 50


@pytest.mark.parametrize(
    ("label", "values", "message"),
    [
        (LabelSchema("y", 0, 4, is_whole=True), [4, 0, 5], "is 5, it must be a class from 0 to 4; "
         "set num_classes"),
        (LabelSchema("y", 0, 4, is_whole=True), [4, 0, 1.5], "is 1.5, it must be a class"),
        (LabelSchema("y", -3e38, 3e38), [1.5, -7.0, None], "is null, it must be a finite"),
        (LabelSchema("y", 0, 3e38), [1.5, 7.0, -1], "is -1.0, it must be a finite 32-bit "
         "number, and not negative"),
    ],
)  # fmt: skip
def test_labels_of_other_losses(tmp_path: Path, label: LabelSchema, values: Any, message: str):
    """File, row, column, what is there and what must be."""
    path = _write(tmp_path / "f.parquet", {"y": values, "c": [0, 0, 0]})
    schema = BatchSchema((label,), features=(_feature("c"),))
    with pytest.raises(UserError) as caught:
        _read(path, schema)
    assert f"{path}, row 2: the label (column y) {message}" in str(caught.value)


def test_groups_that_are_none(tmp_path: Path):
    """A null group is told with its row; a column that is not there, or is no id, at once."""
    columns = {"user": ["a", None, "b"], "f": [0.5, 1.5, 2.5], "c": [0, 0, 0]}
    path = _write(tmp_path / "f.parquet", columns)
    schemas = {name: _schema(_feature("c"), group=name) for name in ("user", "f", "nobody")}
    with pytest.raises(UserError, match=rf"{path}, row 1: the group \(data.group: user\) is null"):
        _read(path, schemas["user"])
    with pytest.raises(UserError, match=r"column f: a group \(data.group\) is an integer or text"):
        _read(path, schemas["f"])
    with pytest.raises(UserError, match="has no column nobody, which the config uses"):
        _read(path, schemas["nobody"])


def test_a_damaged_file_is_never_a_traceback(tmp_path: Path):
    """One flipped bit anywhere ends in a UserError or is not noticed: no other exception."""
    columns = {"c": [i % 50 for i in range(200)], "l": [[i % 3] * (i % 3) for i in range(200)],
               "s": [str(i % 9) for i in range(200)]}  # fmt: skip
    path = _write(tmp_path / "f.parquet", columns, 50, compression="lz4", write_page_checksum=True)
    schema = _schema(_feature("c"), _feature("l"), _feature("s", ids="hash"))
    content, random = path.read_bytes(), np.random.default_rng(0)
    outcomes: Counter[bool] = Counter()
    for position in random.integers(0, len(content), 200).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            outcomes[len(_read(path, schema, batch_size=64)) == 200] += 1
        except UserError as error:
            outcomes["f.parquet" in str(error)] += 1
    assert outcomes == {True: 200}


def test_more_ranks_than_rows(tmp_path: Path):
    """Ranks share a row group, and one without any row has padding alone, in as many steps."""
    path = _write(tmp_path / "f.parquet", {"c": [1, 2, 3]})
    seen = []
    for rank in range(5):
        options = {"batch_size": 1, "rank": rank, "world_size": 5}
        (batch,) = ParquetReader([path], _schema(_feature("c")), **options).epoch()
        assert batch.global_rows == 3 and batch.sparse.values().numel() == batch.mask.sum()
        seen += [int(row.dense[0]) for row in _rows(batch)]
    assert sorted(seen) == [0, 1, 2]


def test_ids_that_are_text_in_another_file(tmp_path: Path):
    """5 and "5" are hashed to different rows: one kind of ids in all files."""
    paths = [
        _write(tmp_path / "a.parquet", {"c": [5, 6]}),
        _write(tmp_path / "b.parquet", {"c": pa.array([[5]], pa.list_(pa.int8()))}),
        _write(tmp_path / "c.parquet", {"c": ["5"]}),
    ]
    schema = _schema(_feature("c", ids="hash"))
    options = {"batch_size": 2, "rank": 0, "world_size": 1}
    assert ParquetReader(paths[:2], schema, **options).rows_per_epoch == 3
    message = (
        r"c\.parquet, column c: the ids of feature c are string here and int64 in .*a\.parquet"
    )
    with pytest.raises(UserError, match=message):
        ParquetReader(paths, schema, **options)


def test_no_data(tmp_path: Path):
    """No rows, no files, no folder and no Parquet: each is told with its place."""
    schema = _schema(_feature("c"))
    empty = _write(tmp_path / "empty.parquet", {"c": pa.array([], pa.int64())})
    with pytest.raises(UserError, match=f"{tmp_path} has no rows"):
        ParquetReader([empty], schema, batch_size=2)
    with pytest.raises(UserError, match="the data has no rows"):
        ParquetReader([], schema, batch_size=2)
    with pytest.raises(UserError, match="absent.parquet: .*No such file"):
        ParquetReader([tmp_path / "absent.parquet"], schema, batch_size=2)
    text = tmp_path / "text.parquet"
    text.write_text("label,c\n0,1\n")
    with pytest.raises(UserError, match=f"{text} is not a whole Parquet file"):
        ParquetReader([text], schema, batch_size=2)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/folder holds no .parquet file"):
        parquet_files(tmp_path / "folder")
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/absent"):
        parquet_files(tmp_path / "absent")


def test_an_empty_file_among_others(tmp_path: Path):
    """A file without rows is passed over."""
    _write(tmp_path / "a.parquet", {"c": pa.array([], pa.int64())})
    _write(tmp_path / "b.parquet", {"c": [1, 2, 3]})
    reader = ParquetReader(parquet_files(tmp_path), _schema(_feature("c")), batch_size=2)
    ids = [row.bags["c"][0][0] for batch in reader.epoch() for row in _rows(batch)]
    assert sorted(ids) == [1, 2, 3]
