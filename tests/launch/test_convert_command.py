"""`shardemb data convert`: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch import cli

SCHEMA = "sparse: {c: {kind: string, vocabulary: {min_count: 2}}}\n"
ROWS = "label,c\n1,x\n0,x\n1,y\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schema.yaml").write_text(SCHEMA)
    Path("rows.csv").write_text(ROWS)


def convert(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; nothing hidden may be left."""
    monkeypatch.setattr(sys, "argv", ["shardemb", "data", "convert", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    assert "Traceback" not in shown.err
    return int(ended.value.code or 0), shown.out, " ".join(shown.err.replace("│", " ").split())


def test_json_on_stdout_progress_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object: the folder, and all that dataset.json says."""
    arguments = ("csv", "rows.csv", "out", "--schema", "schema.yaml", "--test-rows", "1", "--json")
    code, out, err = convert(monkeypatch, capsys, *arguments)
    assert code == 0
    shown = json.loads(out)
    assert shown == {"dir": "out", **json.loads(Path("out/dataset.json").read_text())}
    assert shown["rows"] == {"train": 2, "test": 1}
    assert shown["vocabularies"] == {"c": {"size": 1, "oov_rows": 1}}
    assert "reading rows" in err and "writing rows" in err


def test_several_sources_and_a_glob(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last argument is the folder; a test source is named by its option."""
    Path("more1.csv").write_text(ROWS)
    Path("more2.csv").write_text(ROWS)
    Path("test.csv").write_text(ROWS)
    sources = ("rows.csv", "more*.csv", "out", "--test-source", "test.csv")
    code, out, _ = convert(monkeypatch, capsys, "csv", *sources, "--schema", "schema.yaml")
    assert code == 0 and out == "out: 9 train, 3 test rows\n"


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_the_other_formats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The same options, the same rows."""
    lines = {"tsv": ROWS.replace(",", "\t"), "jsonl": '{"label":1,"c":"x"}\n' * 3}
    Path("rows").write_text(lines[kind])
    code, out, _ = convert(monkeypatch, capsys, kind, "rows", "out", "--schema", "schema.yaml")
    assert code == 0 and out == "out: 3 train rows\n"


def test_criteo_with_vocabularies(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real rows, in two processes: ids are ranks, the most frequent first."""
    source = Path("raw.tsv.gz")
    source.symlink_to(shared_data / "criteo" / "criteo_raw_8k.tsv.gz")
    arguments = ("criteo", str(source), "out", "--min-count", "5", "--processes", "2", "--json")
    code, out, _ = convert(monkeypatch, capsys, *arguments)
    assert code == 0
    info = json.loads(out)
    ids = pq.read_table("out/train")["C1"].drop_null().to_numpy()
    size = info["vocabularies"]["C1"]["size"]
    counts = [(ids == i).sum() for i in range(size)]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 5
    assert ids.max() == size and info["num_embeddings"]["C1"] == size + 1


def test_movielens(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder as it lies there."""
    arguments = ("movielens", str(shared_data / "ml-1m"), "out", "--negatives", "0")
    code, out, _ = convert(monkeypatch, capsys, *arguments)
    assert code == 0 and out == "out: 994,169 train, 604,000 test rows\n"


MISTAKES = {
    "no such format": (["xml", "rows.csv", "out"], 2, "No such command 'xml'"),
    "no schema": (["csv", "rows.csv", "out"], 2, "Missing option '--schema'"),
    "no such file": (["csv", "none", "out", "--schema", "schema.yaml"], 2, "there is no such file"),
    "no such schema": (["csv", "rows.csv", "out", "--schema", "no.yaml"], 2, "cannot read the sch"),
    "unknown key": (["csv", "rows.csv", "out", "--schema", "bad.yaml"], 2, "did you mean kind?"),
    "bad row": (["csv", "bad.csv", "out", "--schema", "schema.yaml"], 1, "bad.csv, line 3, column"),
    "existing": (["csv", "rows.csv", "full", "--schema", "schema.yaml"], 2, "is not empty"),
    "two splits": (
        [
            "csv",
            "rows.csv",
            "out",
            "--schema",
            "schema.yaml",
            "--test-rows=1",
            "--test-fraction=.5",
        ],
        2,
        "choose one of",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    """Exit code 2 for the request, 1 for the data; nothing on stdout, nothing written."""
    Path("bad.yaml").write_text("sparse: {c: {kinds: int}}")
    Path("bad.csv").write_text("label,c\n1,x\n7,y\n")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("x")
    found, out, err = convert(monkeypatch, capsys, *arguments)
    assert (found, out) == (code, "") and message in err
    assert not Path("out").exists()


def test_help_names_the_formats() -> None:
    """In a process of its own, as a user calls it."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "data", "convert", "--help"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    for name in ("criteo", "csv", "tsv", "jsonl", "movielens"):
        assert name in done.stdout
