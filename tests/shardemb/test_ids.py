"""Values to rows through vocabularies and several hashes, against dictionaries and plain loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner import UserError
from shardemb.data.hashing import hash_ids, mix64, strings_to_ids
from shardemb.data.ids import Vocabulary
from shardemb.data.parquet import ParquetReader
from shardemb.data.schema import BatchSchema, FeatureSchema


def _feature(**fields: Any) -> FeatureSchema:
    return FeatureSchema("f", "t", **{"num_embeddings": 100, "column": "f", **fields})


def _bags(folder: Path, values: pa.Array, feature: FeatureSchema, **columns: Any) -> list[Any]:
    """The rows that the feature's values mean, row by row, with weights where it has them."""
    path = folder / "f.parquet"
    table = {"label": [0] * len(values), "f": values, **columns}
    pq.write_table(pa.table(table), path)
    schema = BatchSchema("label", features=(feature,))
    size = len(values)
    (batch,) = ParquetReader([path], schema, batch_size=size, rank=0, world_size=1).epoch()
    jagged = batch.sparse["f"]
    bags = [bag.tolist() for bag in jagged.to_dense()]
    if feature.weights:
        return list(zip(bags, [w.tolist() for w in jagged.to_dense_weights()], strict=True))
    return bags


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 50_000])
def test_ranks_are_those_of_a_dictionary(size: int) -> None:
    """For values near each other and far apart, known and unknown."""
    generator = np.random.default_rng(size)
    near = np.arange(-size, size, 2)[: size // 2]
    far = generator.integers(-(2**63), 2**63 - 1, size - len(near))
    codes = generator.permutation(np.concatenate([near, far]))
    ranks = {code: rank for rank, code in enumerate(codes.tolist())}
    asked = np.concatenate([codes, np.arange(-3000, 3000), generator.integers(-(2**63), 2**63, 99)])
    found = Vocabulary(codes, is_text=False).ranks(asked)
    assert found.tolist() == [ranks.get(code, -1) for code in asked.tolist()]


@pytest.mark.parametrize("kind", ["text file", "text", "integers"])
def test_a_vocabulary(tmp_path: Path, kind: str) -> None:
    """Known values are their ranks; unknown ones share the rows after them; nulls have none."""
    words: list[Any] = [f"w{i}" for i in range(30)] if kind != "integers" else list(range(7, 97, 3))
    file = tmp_path / ("words.txt" if kind == "text file" else "words.parquet")
    if kind == "text file":
        file.write_text("\n".join(words) + "\n")
    else:
        pq.write_table(pa.table({"value": words, "count": range(30)}), file)
    feature = _feature(ids="vocabulary", vocabulary=str(file), oov_rows=4)
    unknown = [f"x{i}" for i in range(200)] if kind != "integers" else list(range(1000, 1200))
    values = pa.array([[words[3], None, unknown[0]], [], [words[29]], unknown, [unknown[0]]])
    bags = _bags(tmp_path, values, feature)
    assert bags[0] == [3, bags[4][0]] and bags[1:3] == [[], [29]]
    assert set(bags[3]) == {30, 31, 32, 33}


def test_a_null_has_its_row_in_a_vocabulary_too(tmp_path: Path) -> None:
    """Also beside unknown values."""
    file = tmp_path / "words.txt"
    file.write_text("a\nb\n")
    feature = _feature(ids="vocabulary", vocabulary=str(file), null_row=9)
    values = pa.array(["b", None, "c", "a"])
    assert _bags(tmp_path, values, feature) == [[1], [9], [2], [0]]


def test_nulls_are_the_rows_of_all_other_values(tmp_path: Path) -> None:
    """Which is how a vocabulary grows without a row that moves: what was unknown before and still
    is has the same row as before."""
    feature = _feature(ids="vocabulary", vocabulary=str(tmp_path / "v.parquet"), oov_rows=3)
    unknown = [f"x{i}" for i in range(100)]
    values = pa.array([["a", "b", "c", "d"], unknown])
    pq.write_table(pa.table({"value": ["a", "b"]}), tmp_path / "v.parquet")
    before = _bags(tmp_path, values, feature)
    assert before[0][:2] == [0, 1] and set(before[0][2:]) <= {2, 3, 4} == set(before[1])
    grown = tmp_path / "grown.parquet"
    pq.write_table(pa.table({"value": ["a", "b", None, None, None, "c", "d"]}), grown)
    feature = replace(feature, vocabulary=str(grown))
    assert _bags(tmp_path, values, feature) == [[0, 1, 5, 6], before[1]]


def test_several_hashes(tmp_path: Path) -> None:
    """Each id is in the rows of each seed, side by side; its weight is with all of them."""
    values = pa.array([[5, 6], [7], [], [5, None]])
    weights = pa.array([[1.0, 2.0], [3.0], [], [4.0, 5.0]])
    feature = _feature(ids="hash", num_hashes=3, hash_seed=10, weights="w", null_row=0)

    def rows(value: int | None) -> list[int]:
        if value is None:
            return [0, 0, 0]
        return [int(hash_ids(np.array([value]), 100, 0, seed)[0]) for seed in (10, 11, 12)]

    expected = [
        ([row for v in ids for row in rows(v)], [w for w in given for _ in range(3)])
        for ids, given in zip(values.to_pylist(), weights.to_pylist(), strict=True)
    ]
    assert _bags(tmp_path, values, feature, w=weights) == expected
    assert len({*rows(5), *rows(6), *rows(7)}) > 5
    same_width = pa.array([[1, 2], [3, 4]])
    plain = _feature(ids="hash", num_hashes=2)
    assert [len(bag) for bag in _bags(tmp_path, same_width, plain)] == [4, 4]


def test_seeds_are_different_hashes() -> None:
    """Ids that one seed puts together are apart under another; seed 0 is the plain hash."""
    ids = np.arange(20_000)
    first, second = (hash_ids(ids, 1000, seed=seed) for seed in (0, 1))
    assert first.tolist() == (mix64(ids) % np.uint64(1000)).tolist()
    assert abs(np.mean(first == second) - 1 / 1000) < 1e-3
    pairs = np.flatnonzero(first == first[0])[1:]
    assert np.mean(second[pairs] == second[0]) < 0.3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na\n", "has the value a twice"),
        (
            pa.table({"value": ["a", None, None]}),
            "data.features.f.oov_rows: 1, but the vocabulary .* has 2 nulls",
        ),
        (pa.table({"value": [1.5]}), "has values of double"),
        (pa.table({"word": ["a"]}), "cannot read the vocabulary .* a column `value`"),
        (None, "cannot read the vocabulary"),
        ("\n".join(map(str, range(100))), "need 101 rows, table t has 100; raise tables.t.num_em"),
        (pa.table({"value": [1, 2]}), "has values of string, and its vocabulary .* another kind"),
    ],
)
def test_vocabularies_that_are_wrong(tmp_path: Path, content: Any, message: str) -> None:
    """Each is told before the first batch, with the file's name."""
    file = tmp_path / ("v.txt" if isinstance(content, str) else "v.parquet")
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        pq.write_table(content, file)
    feature = _feature(ids="vocabulary", vocabulary=str(file))
    with pytest.raises(UserError, match=message):
        _bags(tmp_path, pa.array(["a"]), feature)


def test_texts_and_numbers_of_one_look_differ() -> None:
    """What the vocabulary's check of kinds is for."""
    assert strings_to_ids(pa.array(["5"])).to_pylist() != [5]
