from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner import UserError
from shardemb.data import vocabulary
from shardemb.data.conversion import convert
from shardemb.data.convert_schema import ConvertSchema, VocabularySchema
from shardemb.data.dataset import DatasetInfo, VocabularyInfo
from shardemb.data.generic import generic_conversion
from shardemb.data.vocabulary import (
    Vocabulary,
    count_values,
    read_vocabulary,
    vocabulary_file,
    write_vocabulary,
)
from tests.shardemb.splits import split_files


def _chunks(values: list[Any], kind: pa.DataType, size: int) -> list[pa.ChunkedArray]:
    parts = (values[i : i + size] for i in range(0, len(values), size))
    return [pa.chunked_array([pa.array(part, kind)]) for part in parts]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
@pytest.mark.parametrize("in_lists", [False, True])
def test_counts_are_those_of_python(
    monkeypatch: pytest.MonkeyPatch, size: int, kind: pa.DataType, in_lists: bool
):
    """However the values come and however often counts are merged; nulls are not counted."""
    monkeypatch.setattr(vocabulary, "_MERGE_ROWS", 5)
    numbers = np.random.default_rng(0).zipf(1.5, 1000).clip(max=99).tolist()
    values = [None if n == 3 else str(n) if kind == pa.string() else n for n in numbers]
    if in_lists:
        columns = _chunks([values[i : i + 3] for i in range(0, 1000, 3)], pa.list_(kind), size)
    else:
        columns = _chunks(values, kind, size)
    counts = count_values(columns).to_pydict()
    found = dict(zip(counts["value"], counts["count"], strict=True))
    assert found == Counter(value for value in values if value is not None)


def _written(path: Path, counts: dict[Any, int], **schema: Any) -> Vocabulary:
    table = pa.table({"value": list(counts), "count": list(counts.values())})
    write_vocabulary(path, table, VocabularySchema(**schema))
    return read_vocabulary(path, VocabularySchema(**schema))


COUNTS = {"rare": 1, "b": 4, "most": 9, "a": 4, "é": 4}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({}, ["most", "a", "b", "é", "rare"]),
        ({"min_count": 2}, ["most", "a", "b", "é"]),
        ({"max_size": 2}, ["most", "a"]),
        ({"min_count": 4, "max_size": 9}, ["most", "a", "b", "é"]),
        ({"min_count": 10}, []),
    ],
)
def test_frequent_values_come_first(tmp_path: Path, schema: dict[str, int], values: list[str]):
    """Row i of the file is id i: by descending count, equal counts by value, rare ones left out."""
    path = tmp_path / "v" / "c.parquet"
    assert _written(path, COUNTS, **schema).values.to_pylist() == values
    table = pq.read_table(path)
    assert table.column_names == ["value", "count"]
    assert table["count"].to_pylist() == [COUNTS[value] for value in values]


def test_integers_tie_by_number(tmp_path: Path):
    """9 before 10, though not as text."""
    path = tmp_path / "v" / "c.parquet"
    assert _written(path, {10: 1, 9: 1, -1: 1}).values.to_pylist() == [-1, 9, 10]


@pytest.mark.parametrize("texts", [False, True])
def test_unknown_values_are_hashed_after_the_vocabulary(texts: bool):
    """Known values get their rank; each unknown one always the same of the rows after, all of
    which are used; nulls stay nulls, in lists too."""
    spell = str if texts else int
    words = Vocabulary(pa.array([spell(7), spell(5)]), oov_rows=3)
    unknown = pa.array([spell(i) for i in range(100, 200)])
    ids = words.encode(unknown)
    assert set(ids.to_pylist()) == {2, 3, 4} and words.num_embeddings == 5
    assert words.encode(unknown.slice(50)) == ids.slice(50)
    lists = pa.array([[spell(5), None, spell(100)], [], None, [spell(7)]]).slice(0, 4)
    assert words.encode(lists).to_pylist() == [[1, None, ids[0].as_py()], [], None, [0]]
    assert words.encode(lists.slice(2)).to_pylist() == [None, [0]]


def test_an_empty_vocabulary_hashes_all():
    """Where no value is frequent enough, all share the rows for unknown ones."""
    words = Vocabulary(pa.array([], pa.int64()), oov_rows=1)
    assert words.encode(pa.array([1, None, 2])).to_pylist() == [0, None, 0]
    assert words.num_embeddings == 1


def _convert_text(folder: Path, text: str, sparse: dict[str, Any], **options: Any) -> DatasetInfo:
    source = folder / "rows.csv"
    source.write_text(text)
    schema = ConvertSchema.model_validate({"sparse": sparse})
    return convert(generic_conversion("csv", [source], schema, **options), folder / "out")


def test_ids_in_a_data_set(tmp_path: Path):
    """Only training rows count: what the test alone has is out of vocabulary there. dataset.json
    has the sizes, and the rows that a table needs."""
    text = "label,c,l\n1,x,1|2\n0,y,2\n0,y,\n1,z,2|9\n1,z,9\n1,,\n"
    sparse = {
        "c": {"kind": "string", "vocabulary": {"min_count": 2}},
        "l": {"list": True, "vocabulary": {"oov_rows": 2}},
    }
    info = _convert_text(tmp_path, text, sparse, test_rows=3)
    out = tmp_path / "out"
    assert info.vocabularies == {
        "c": VocabularyInfo(size=1, oov_rows=1),
        "l": VocabularyInfo(size=2, oov_rows=2),
    }
    assert info.num_embeddings == {"c": 2, "l": 4}
    train, test = (pq.read_table(split_files(out, split)[0]) for split in ("train", "test"))
    assert train["c"].to_pylist() == [1, 0, 0] and test["c"].to_pylist() == [1, 1, None]
    assert train["l"].to_pylist() == [[1, 0], [0], None]
    known, unknown = test["l"][0].as_py()
    assert known == 0 and unknown in (2, 3) and test["l"].to_pylist()[1:] == [[unknown], None]
    assert pq.read_table(out / "vocabularies" / "c.parquet").to_pylist() == [
        {"value": "y", "count": 2}
    ]


def test_a_vocabulary_is_that_of_its_data_set(tmp_path: Path):
    """Written to the same folder twice in one process, each time from other rows."""
    for value in ("x", "y"):
        (tmp_path / value).mkdir()
        source = tmp_path / value / "rows.csv"
        source.write_text(f"label,c\n1,{value}\n")
        schema = ConvertSchema.model_validate(
            {"sparse": {"c": {"kind": "string", "vocabulary": {}}}}
        )
        convert(generic_conversion("csv", [source], schema), tmp_path / "out", overwrite=True)
        assert pq.read_table(tmp_path / "out" / "train")["c"].to_pylist() == [0]


def test_names_that_are_no_file_names(tmp_path: Path):
    """A column may be called as it likes."""
    name = "ads/../clicked?"
    _convert_text(tmp_path, f"label,{name}\n1,5\n", {name: {"vocabulary": {}}})
    path = vocabulary_file(tmp_path / "out", name)
    assert path.parent == tmp_path / "out" / "vocabularies"
    assert pq.read_table(path)["value"].to_pylist() == [5]


def test_no_vocabularies_no_folder(tmp_path: Path):
    """Values are kept where none is declared."""
    info = _convert_text(tmp_path, "label,c\n1,5\n", {"c": {}})
    assert info.vocabularies == {} and not (tmp_path / "out" / "vocabularies").exists()


# --- Vocabularies that are extended


def _days(folder: Path, days: dict[str, str], **vocabulary: int) -> dict[str, DatasetInfo]:
    """A data set a day, each of which extends the one before."""
    infos, before = {}, None
    for day, text in days.items():
        source = folder / f"{day}.csv"
        source.write_text(text)
        sparse = {"c": {"kind": "string", "vocabulary": vocabulary}}
        schema = ConvertSchema.model_validate({"sparse": sparse})
        conversion = replace(generic_conversion("csv", [source], schema), extends=before)
        before = folder / day
        infos[day] = convert(conversion, before)
    return infos


def _text(values: str) -> str:
    return "label,c\n" + "".join(f"1,{value}\n" for value in values)


def _values(folder: Path) -> list[str | None]:
    values: list[str | None] = pq.read_table(folder / "vocabularies" / "c.parquet")["value"]
    return values.to_pylist()  # type: ignore[attr-defined]


def test_ids_of_earlier_values_stay(tmp_path: Path):
    """New ones come after by frequency, from day to day; the rows of unknown values stay too, and
    an unknown value keeps its row until it is known. Values of today are counted, all others have
    no count."""
    infos = _days(
        tmp_path,
        {"a": _text("yyyyxxxz"), "b": _text("wwwwyvvvxuuz"), "c": _text("ttttuuq")},
        min_count=2,
        oov_rows=2,
    )
    assert _values(tmp_path / "a") == ["y", "x"]
    assert _values(tmp_path / "b") == ["y", "x", None, None, "w", "v", "u"]
    assert _values(tmp_path / "c") == ["y", "x", None, None, "w", "v", "u", "t"]
    counts = pq.read_table(tmp_path / "b" / "vocabularies" / "c.parquet")["count"].to_pylist()
    assert counts == [1, 1, 0, 0, 4, 3, 2]
    sizes = {day: info.vocabularies["c"].size for day, info in infos.items()}
    assert sizes == {"a": 2, "b": 5, "c": 6}
    assert {day: info.num_embeddings["c"] for day, info in infos.items()} == {
        "a": 4,
        "b": 7,
        "c": 8,
    }
    ids = {
        day: pq.read_table(split_files(tmp_path / day, "train")[0])["c"].to_pylist()
        for day in "abc"
    }
    assert ids["a"][:7] == [0] * 4 + [1] * 3 and ids["a"][7] in (2, 3)
    assert ids["b"] == [4] * 4 + [0] + [5] * 3 + [1, 6, 6, ids["a"][7]]
    assert ids["c"][:6] == [7] * 4 + [6, 6] and ids["c"][6] in (2, 3)


def test_a_limit_is_of_all_values(tmp_path: Path):
    """Earlier ones stay, whatever it is; new ones have the room that is left."""
    _days(tmp_path, {"a": _text("yyx"), "b": _text("wwwvvu")}, max_size=3)
    assert _values(tmp_path / "b") == ["y", "x", None, "w"]


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"d": {"vocabulary": {}}}, "has no vocabulary of d: name a data set"),
        (
            {"c": {"kind": "string", "vocabulary": {"oov_rows": 2}}},
            "c has oov_rows: 1 in .* 2 here",
        ),
        ({"c": {"vocabulary": {}}}, "has values of string, feature c of int64; declare the same"),
        ({"c": {"kind": "string"}}, "--extend: no feature has a vocabulary"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, sparse: dict[str, Any], message: str):
    """Told before anything is written."""
    _days(tmp_path, {"a": _text("xy")})
    source = tmp_path / "b.csv"
    source.write_text("label,c,d\n1,1,1\n")
    schema = ConvertSchema.model_validate({"sparse": sparse})
    conversion = replace(generic_conversion("csv", [source], schema), extends=tmp_path / "a")
    with pytest.raises(UserError, match=message):
        convert(conversion, tmp_path / "b")
    assert not (tmp_path / "b").exists()
