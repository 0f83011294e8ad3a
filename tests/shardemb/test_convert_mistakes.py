from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.errors import RequestError, UserError
from shardemb.data import generic
from shardemb.data.convert_schema import load_schema
from tests.shardemb.text_rows import (
    NAMES,
    convert_text,
    gzip_file,
    make_rows,
    make_schema,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generic, "_BLOCK_BYTES", 7001)


GOOD = "1,2.5,7,Paris,1|2,a|b,1|2,x"
MISTAKES = [
    (GOOD + ",9", " has 9 columns: 8 are expected, separated by ','"),
    ("1,2", " has 2 columns"),
    ("", " is empty"),
    (GOOD.replace("1,", "2,", 1), ", column click: found '2', expected a number from 0 to 1"),
    (GOOD.replace("1,", "-0.1,", 1), ", column click: found '-0.1'"),
    (GOOD.replace("1,", ",", 1), ", column click: found ''"),
    (GOOD.replace("1,", "yes,", 1), ", column click: found 'yes'"),
    (GOOD.replace("2.5", "old"), ", column age: found 'old', expected a finite number"),
    (GOOD.replace("2.5", "1e300"), ", column age: found '1e300', expected a finite number"),
    (GOOD.replace("2.5", "nan"), ", column age: found 'nan'"),
    (GOOD.replace("7", "7.5"), ", column user: found '7.5', expected an integer of 64 bits"),
    (GOOD.replace("7", str(2**63)), f", column user: found '{2**63}', expected an integer"),
    (GOOD.replace("Paris", "\udcff"), r", column city: found '\\\\xff', expected text in UTF-8"),
    (
        GOOD.replace("1|2,a", "1|b,a"),
        r", column tags: found '1\|b', expected a list, each value an",
    ),
    (GOOD.replace("b,1|2", "b,1"), ", column strength: found '1', .* each value in column genres"),
    (GOOD.replace("b,1|2", "b,1|"), r", column strength: found '1\|', .* for each value"),
    (GOOD.replace("b,1|2", "b,1|inf"), r", column strength: found '1\|inf', expected a finite"),
    (GOOD.replace("x", '"x'), " has a quote that does not end on it"),
]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("more", [[], ["worse"]])
def test_the_first_mistake_is_found_whatever_the_processes(
    tmp_path: Path, processes: int, more: list[str]
):
    """Line and column are told, many blocks into the file; nothing is left of the data set."""
    source = tmp_path / "rows.csv"
    source.write_text("\n".join([",".join(NAMES), *[GOOD] * 1500, "7", GOOD, *more]))
    with pytest.raises(UserError, match=f"{source}, line 1502 has 1 columns") as caught:
        convert_text(tmp_path / "out", source, processes=processes)
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("spell", [None, gzip_file])
@pytest.mark.parametrize(("bad", "message"), MISTAKES)
def test_a_mistake_is_found_by_line_and_column(
    tmp_path: Path, bad: str, message: str, spell: Callable[[Path], None] | None
):
    """The file, the line counted from 1 with the header, the column, what was found there and
    what is expected."""
    source = tmp_path / "rows.csv"
    text = "\n".join([",".join(NAMES), *[GOOD] * 700, bad, GOOD, ""])
    source.write_bytes(text.encode("utf-8", "surrogateescape"))
    if spell:
        spell(source)
    with pytest.raises(UserError, match=f"{source}, line 702{message}"):
        convert_text(tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


JSON_MISTAKES = [
    ('{"click": 1', r", column 12: not valid JSON: Expecting"),
    ("", r", column 1: not valid JSON"),
    ("[1]", r" is \[1\], not an object"),
    ('{"click": 1} {"click": 0}', ", column 14: not valid JSON: Extra data"),
    ('{"click": 3}', ", column click: found 3, expected a number from 0 to 1"),
    ('{"click": "1"}', ", column click: found '1'"),
    ("{}", ", column click: found None"),
    ('{"click": 1, "user": 1.5}', ", column user: found 1.5, expected an integer"),
    ('{"click": 1, "user": [1]}', r", column user: found \[1\], expected an integer"),
    ('{"click": 1, "tags": 1}', ", column tags: found 1, expected a list"),
    ('{"click": 1, "city": 5}', ", column city: found 5, expected text"),
    ('{"click": 1, "city": "\udcff"}', ", byte 23: not UTF-8"),
    ('{"click": 1, "genres": ["a"], "strength": [1, 2]}', r", column strength: found \[1, 2\]"),
]


def test_an_open_quote_on_the_last_line(tmp_path: Path):
    """Also where no other line is swallowed."""
    source = tmp_path / "rows.csv"
    source.write_text(f"{','.join(NAMES)}\n{GOOD}\n" + GOOD.replace("x", '"x') + "\n")
    with pytest.raises(UserError, match="line 3 has a quote that does not end on it"):
        convert_text(tmp_path / "out", source)


@pytest.mark.parametrize(("bad", "message"), JSON_MISTAKES)
def test_a_mistake_in_json_lines(tmp_path: Path, bad: str, message: str):
    """The same of JSON, by its line."""
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(300))
    text = source.read_text() + bad + "\n" + source.read_text()
    source.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"{source}, line 301{message}"):
        convert_text(tmp_path / "out", source, kind="jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_key_that_no_line_has(tmp_path: Path):
    """A misspelt name would be a feature without values."""
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(300))
    with pytest.raises(UserError, match="no line has a value for the key usr"):
        convert_text(tmp_path / "out", source, kind="jsonl", schema=make_schema(sparse={"usr": {}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty: there are no rows"),
        (gzip.compress(b""), " is empty"),
        (b"click,age,user,city,tags,genres,strength\n", " is empty"),
        (b"click,age,user,town,tags,genres,strength\n1\n", ", line 1 has no column city"),
        (b"click,age,age,user,city,tags,genres,strength\n", ", line 1 has two columns age"),
        (gzip.compress(os.urandom(9999))[:20], " cannot be read beyond line 1"),
        (b"\x00" * 99999, ", line 1 is longer than"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str):
    """Told by name before anything is written."""
    source = tmp_path / "rows.csv"
    source.write_bytes(content)
    with pytest.raises(UserError, match=f"{source}{message}"):
        convert_text(tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("spell", [None, gzip_file])
def test_a_file_without_lines_stays_small(tmp_path: Path, spell: Callable[[Path], None] | None):
    """An endless line is refused, not read into memory."""
    source = tmp_path / "rows.csv"
    source.write_bytes(f"{','.join(NAMES)}\n{GOOD}\n".encode() + b"x" * 50_000)
    if spell:
        spell(source)
    with pytest.raises(UserError, match="line 3 is longer than"):
        convert_text(tmp_path / "out", source)


def test_no_such_file_and_a_folder(tmp_path: Path):
    """Both are the request's mistakes."""
    with pytest.raises(RequestError, match="none.csv: there is no such file"):
        convert_text(tmp_path / "out", tmp_path / "none.csv")
    with pytest.raises(RequestError, match="is a folder: name files, or a glob"):
        convert_text(tmp_path / "out", tmp_path)


# ------------------------------------------------------------------ the schema


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse: {c: {kinds: int}}", "sparse.c.kinds: unknown key; did you mean kind?"),
        ("sparse: {c: {vocabulary: {min_cout: 2}}}", "sparse.c.vocabulary.min_cout: unknown key"),
        ("sparse: {c: {vocabulary: {min_count: 0}}}", "sparse.c.vocabulary.min_count: Input sh"),
        ("sparse: {c: {kind: float}}", "sparse.c.kind: Input should be 'int' or 'string'"),
        ("sparses: {c: {}}", "sparses: unknown key; did you mean sparse?"),
        ("label: y", "sparse: required, but not given"),
        ("sparse: {}", "sparse: "),
        ("sparse: {c: {}}\ndense: [c]", "c is named twice"),
        ("sparse: {c: {}}\ndelimiter: é", "delimiter: a delimiter is one ASCII character"),
        ("sparse: [c]", "sparse: "),
        ("- c", "must hold `key: value` lines"),
    ],
)
def test_a_wrong_schema_names_the_key(tmp_path: Path, text: str, message: str):
    """By its full path, with the nearest known key."""
    path = tmp_path / "schema.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        load_schema(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_name_ranges_and_exact_names(tmp_path: Path):
    """As in a run config: a range stands for its names, an exact name wins."""
    path = tmp_path / "schema.yaml"
    path.write_text("dense: ['I{1..3}']\nsparse: {'C{1..3}': {kind: string}, C2: {kind: int}}")
    schema = load_schema(path)
    assert schema.dense == ["I1", "I2", "I3"]
    assert [feature.kind for feature in schema.sparse.values()] == ["string", "int", "string"]


def test_json_lines_have_no_delimiter(tmp_path: Path):
    """What cannot have a meaning is refused, not ignored."""
    source = write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    with pytest.raises(RequestError, match="delimiter: this is for csv and tsv"):
        convert_text(tmp_path / "out", source, kind="jsonl", schema=make_schema(delimiter=";"))
