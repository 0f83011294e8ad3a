from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner.errors import RequestError, UserError
from shardemb.data import conversion, generic
from shardemb.data.convert_schema import ConvertSchema
from shardemb.data.dataset import read_info
from shardemb.data.delimited import DelimitedFormat
from tests.shardemb.splits import split_files
from tests.shardemb.text_rows import (
    ROWS,
    SCHEMA,
    convert_text,
    file_bytes,
    gzip_file,
    make_rows,
    read_split,
    without_vocabularies,
    write_csv,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generic, "_BLOCK_BYTES", 7001)


# ------------------------------------------------------------------ what comes out


def zstd_file(path: Path) -> None:
    path.write_bytes(pa.compress(path.read_bytes(), codec="zstd", asbytes=True))


def _windows(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").rstrip())


@pytest.mark.parametrize("spell", [None, gzip_file, zstd_file, _windows])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_come_through_unchanged(
    tmp_path: Path, kind: str, spell: Callable[[Path], None] | None
):
    """Values, nulls, lists and weights are those that Python wrote, in order, whether the file is
    plain, compressed or made on Windows; columns that are not declared are left out."""
    rows = make_rows()
    source = tmp_path / "rows"
    write_csv(source, rows) if kind == "csv" else write_jsonl(source, rows)
    if spell:
        spell(source)
    info = convert_text(tmp_path / "out", source, kind=kind, schema=without_vocabularies())
    expected = [{k: v for k, v in row.items() if k != "ignored"} for row in rows]
    assert read_split(tmp_path / "out", "train") == expected
    assert info == read_info(tmp_path / "out")
    assert info.rows == {"train": ROWS} and info.format == kind
    assert (info.label, info.dense) == ("click", ["age"])
    assert info.sparse == ["user", "city", "tags", "genres"]


def test_names_delimiter_separator_and_nulls_as_declared(tmp_path: Path):
    """A file without header, with its own delimiter, list separator and texts for nothing."""
    source = tmp_path / "rows.txt"
    source.write_text("1;NA;a b;-\n0;2.5;NA b;4\n")
    schema = ConvertSchema.model_validate(
        {
            "columns": ["y", "x1", "words", "c"],
            "label": "y",
            "dense": ["x{1..1}"],
            "sparse": {"words": {"kind": "string", "list": True}, "c": None},
            "delimiter": ";",
            "separator": " ",
            "null_values": ["NA", "-"],
        }
    )
    convert_text(tmp_path / "out", source, schema=schema)
    assert read_split(tmp_path / "out", "train") == [
        {"y": 1.0, "x1": None, "words": ["a", "b"], "c": None},
        {"y": 0.0, "x1": 2.5, "words": [None, "b"], "c": 4},
    ]


def test_quotes_are_text_in_tsv(tmp_path: Path):
    """TSV knows no quoting."""
    source = tmp_path / "rows.tsv"
    source.write_text('label\tc\n1\t"a\n')
    schema = ConvertSchema.model_validate({"sparse": {"c": {"kind": "string"}}})
    convert_text(tmp_path / "out", source, kind="tsv", schema=schema)
    assert read_split(tmp_path / "out", "train") == [{"label": 1.0, "c": '"a'}]


def test_columns_are_found_by_name_in_each_file(tmp_path: Path):
    """Files of a glob may have their columns in another order; rows follow the files' names."""
    (tmp_path / "b.csv").write_text("label,c\n1,2\n")
    (tmp_path / "a.csv").write_text("c,label\n1,0\n")
    schema = ConvertSchema.model_validate({"sparse": {"c": {}}})
    convert_text(tmp_path / "out", tmp_path / "*.csv", schema=schema)
    assert read_split(tmp_path / "out", "train") == [{"label": 0.0, "c": 1}, {"label": 1.0, "c": 2}]


# ------------------------------------------------------------------ splits


def test_the_last_rows_are_the_test(tmp_path: Path):
    """Over all sources, in order, and across blocks."""
    rows = make_rows()
    sources = [write_csv(tmp_path / f"{i}.csv", rows[i::2]) for i in range(2)]
    options = {"schema": without_vocabularies()}
    info = convert_text(tmp_path / "out", *sources, test_rows=1700, **options)
    convert_text(tmp_path / "all", *sources, **options)
    everything = read_split(tmp_path / "all", "train")
    assert info.rows == {"train": 1300, "test": 1700}
    assert read_split(tmp_path / "out", "train") == everything[:1300]
    assert read_split(tmp_path / "out", "test") == everything[1300:]


def test_test_sources_are_the_test(tmp_path: Path):
    """All rows of these files, and no other."""
    rows = make_rows(500)
    train, test = (write_csv(tmp_path / f"{i}.csv", rows[i::2]) for i in range(2))
    options = {"schema": without_vocabularies()}
    convert_text(tmp_path / "out", train, test_sources=[test], **options)
    for split, source in (("train", train), ("test", test)):
        convert_text(tmp_path / split, source, **options)
        assert read_split(tmp_path / "out", split) == read_split(tmp_path / split, "train")


def test_a_fraction_is_drawn_by_row_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each row is in one split, a fifth of them in the test, and which does not depend on how the
    files were read; nor do the bytes."""
    rows = make_rows()
    source = write_csv(tmp_path / "rows.csv", rows)
    options: dict[str, Any] = {"schema": without_vocabularies(), "test_fraction": 0.2}
    info = convert_text(tmp_path / "out", source, **options)
    monkeypatch.setattr(generic, "_BLOCK_BYTES", 50_000)
    convert_text(tmp_path / "again", source, **options)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "again")
    drawn = [row for split in ("train", "test") for row in read_split(tmp_path / "out", split)]
    tags = [sum(row["tags"] or [0]) for row in drawn]
    assert sum(info.rows.values()) == len(drawn) == ROWS
    assert sorted(tags) == sorted(sum(row["tags"] or [0]) for row in rows)
    assert abs(info.rows["test"] - ROWS / 5) < 4 * (ROWS * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_rows": 2}, "has 2 rows.* at most 1"),
        ({"test_rows": -1}, "test_rows is -1"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"test_fraction": 1e-9}, "leaves none for the test split"),
        ({"test_fraction": 0.999999999}, "leaves none for the train split"),
        ({"test_rows": 1, "test_fraction": 0.5}, "choose one of"),
        ({"test_sources": ["rows.csv"]}, "rows.csv is named twice"),
        ({"test_sources": ["none*.csv"]}, r"none\*.csv: there is no such file"),
        ({"row_group_rows": 0}, "row groups of 0"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_malformed_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
):
    """What is wrong with the request is a RequestError, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    source = write_csv(Path("rows.csv"), make_rows(2))
    with pytest.raises(RequestError, match=message):
        convert_text(Path("out"), source, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


# ------------------------------------------------------------------ processes, interruptions


@pytest.fixture
def three_sources(tmp_path: Path) -> list[Path]:
    rows = make_rows()
    sources = [write_csv(tmp_path / f"{i}.csv", rows[i::3]) for i in range(3)]
    gzip_file(sources[1])
    return sources


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, three_sources: list[Path]):
    """Plain and compressed files, vocabularies and both splits, byte for byte."""
    options: dict[str, Any] = {"test_fraction": 0.1, "row_group_rows": 64}
    for processes in (1, 3):
        convert_text(tmp_path / str(processes), *three_sources, processes=processes, **options)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")


def test_parts_are_whole_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows cross from block to block and part to part in order; only a last part is shorter."""
    monkeypatch.setattr(conversion, "rows_of_part", lambda row_group_rows: 5 * row_group_rows)
    source = write_csv(tmp_path / "rows.csv", make_rows())
    schema = without_vocabularies()
    convert_text(tmp_path / "out", source, schema=schema, row_group_rows=100, test_rows=333)
    sizes = [pq.read_metadata(path).num_rows for path in split_files(tmp_path / "out", "train")]
    assert sizes == [500] * 5 + [167]
    rows = read_split(tmp_path / "out", "train") + read_split(tmp_path / "out", "test")
    assert [row["user"] for row in rows] == [row["user"] for row in make_rows()]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from shardemb.data import generic
from shardemb.data.conversion import convert
from shardemb.data.convert_schema import ConvertSchema
generic._BLOCK_BYTES = 7001
schema, out, processes, last, *sources = sys.argv[1:]
seen = []
def die(step, done):
    seen.append(f"{step} {done}")
    if step == last and seen.count(seen[-1]) == 1 and sum(s.startswith(last) for s in seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
conversion = generic.generic_conversion(
    "csv", sources, ConvertSchema(**json.loads(schema)), test_fraction=0.1, row_group_rows=64
)
convert(conversion, Path(out), processes=int(processes), on_progress=die)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("step", ["reading rows", "counting values of features", "writing rows"])
def test_a_killed_conversion_is_continued(
    tmp_path: Path,
    three_sources: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    processes: int,
):
    """After SIGKILL in any step the same request ends with the bytes of an undisturbed run, does
    not parse finished blocks again, and leaves nothing but the data set."""
    arguments = [json.dumps(SCHEMA), str(tmp_path / "out"), str(processes), step]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, *map(str, three_sources)], timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    parsed: list[int] = []
    parse = DelimitedFormat.parse

    def count(self: DelimitedFormat, lines: bytes, header: bytes) -> pa.Table:
        parsed.append(1)
        return parse(self, lines, header)

    monkeypatch.setattr(DelimitedFormat, "parse", count)
    options: dict[str, Any] = {"test_fraction": 0.1, "row_group_rows": 64}
    steps: list[str] = []
    report = lambda step, done: steps.append(step)  # noqa: E731
    convert_text(tmp_path / "out", *three_sources, on_progress=report, **options)
    again = len(parsed)
    convert_text(tmp_path / "undisturbed", *three_sources, **options)
    assert steps[0] == "continuing an interrupted conversion"
    assert again < len(parsed) - again and (step == "reading rows" or again == 0)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0.csv", "1.csv", "2.csv", "out", "undisturbed"}


def test_work_for_another_request_is_thrown_away(tmp_path: Path, three_sources: list[Path]):
    """A source that was changed since the kill, or another split, starts anew."""
    arguments = [json.dumps(SCHEMA), str(tmp_path / "out"), "1", "writing rows"]
    subprocess.run([sys.executable, "-c", KILLED, *arguments, *map(str, three_sources)], timeout=60)
    assert (tmp_path / ".out.converting").is_dir()
    write_csv(three_sources[0], make_rows(77))
    steps: list[str] = []
    options: dict[str, Any] = {"test_fraction": 0.1, "row_group_rows": 64}
    report = lambda step, done: steps.append(step)  # noqa: E731
    info = convert_text(tmp_path / "out", *three_sources, on_progress=report, **options)
    assert steps[0] == "reading rows" and sum(info.rows.values()) == 2077
    assert not (tmp_path / ".out.converting").exists()


def test_one_conversion_at_a_time(tmp_path: Path):
    """Two at once would write the same files: the second is refused, the first goes on."""
    source = write_csv(tmp_path / "rows.csv", make_rows(50))
    refused = []

    def start_another(step: str, done: int) -> None:
        with pytest.raises(UserError, match="another conversion is writing"):
            convert_text(tmp_path / "out", source)
        refused.append(step)

    convert_text(tmp_path / "out", source, on_progress=start_another)
    assert refused and len(read_split(tmp_path / "out", "train")) == 50


def test_an_error_keeps_an_earlier_data_set(tmp_path: Path):
    """--overwrite replaces only by what is whole."""
    source = write_csv(tmp_path / "rows.csv", make_rows(50))
    convert_text(tmp_path / "out", source)
    before = file_bytes(tmp_path / "out")
    with pytest.raises(RequestError, match="replace it with --overwrite"):
        convert_text(tmp_path / "out", source)
    source.write_text(source.read_text() + "1\n")
    with pytest.raises(UserError, match="line 52 has 1 columns"):
        convert_text(tmp_path / "out", source, overwrite=True)
    assert file_bytes(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "out"}


def test_a_lost_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker that the system kills ends the conversion with a message, not a traceback."""
    monkeypatch.setattr(
        DelimitedFormat, "__reduce__", lambda self: (os.kill, (0, 9)), raising=False
    )
    source = write_csv(tmp_path / "rows.csv", make_rows(50))
    monkeypatch.setattr(DelimitedFormat, "__reduce__", _killing)
    with pytest.raises(UserError, match="ended from outside"):
        convert_text(tmp_path / "out", source, processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def _killing(self: DelimitedFormat) -> tuple[Any, ...]:
    return exec, ("import os; os.kill(os.getpid(), 9)",)
