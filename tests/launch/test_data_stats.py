"""`shardemb data stats`, as a person uses it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.cli import app
from planner.table_list import load_table_list
from planner.tables import REUSE_BATCH_SIZE, REUSE_BINS
from tests.launch.tiny_run import ROWS, make_data, tiny_config, write_config
from tests.planner.commands import IMPOSSIBLE, MALFORMED, Ended, run_command

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
Stats = Callable[..., Ended]


@pytest.fixture
def stats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Stats:
    """Runs `shardemb data stats` where data/ and run.yaml are."""
    monkeypatch.chdir(tmp_path)
    make_data(Path("data"))
    write_config(Path("run.yaml"), tiny_config(Path("data"), Path("run")))
    return lambda *arguments: run_command(
        app, ["shardemb", "data", "stats", *arguments], monkeypatch, capfd
    )


def lines_of(ended: Ended) -> dict[str, list[str]]:
    """The cells of each line by its first."""
    assert ended.code == 0, ended.err
    return {line.split()[0]: line.split() for line in ended.out.splitlines() if line.strip()}


def test_a_table_in_a_pipe(stats: Stats) -> None:
    """A line for each feature and dense column, no wider than 100, in words what it means."""
    ended = stats("data/train", "--config", "run.yaml", "--batch-size", "500")
    lines = lines_of(ended)
    assert {*ROWS, "I1", "I2"} <= lines.keys()
    train = pq.read_table("data/train")
    assert int(lines["C1"][1]) == len(set(train["C1"].to_pylist()))
    assert lines["C1"][2:5] == ["1.00", "1", "1"]
    assert float(lines["C5"][2]) == pytest.approx(
        len(train["C5"].combine_chunks().flatten()) / 2000, abs=0.01
    )
    assert max(map(len, ended.out.splitlines())) <= 100
    assert "2,000 rows of 1 file: 6 sparse features, 2 dense" in ended.out
    assert "in 4 batches of 500 rows; the planner's histograms are of 65,536" in " ".join(
        ended.out.split()
    )


def test_json_is_what_is_written(stats: Stats) -> None:
    """--json and --out have the same statistics; each feature what the planner needs."""
    ended = stats(
        "data", "--config", "run.yaml", "--batch-size", "100", "--out", "s.json", "--json"
    )
    document = json.loads(Path("s.json").read_text())
    assert ended.document == document and document["rows"] == 2500
    c5 = document["features"]["C5"]
    assert c5["pooling_factor"] == pytest.approx(2, abs=0.1)
    assert len(c5["reuse_histogram"]) == 17 and sum(c5["reuse_histogram"]) == pytest.approx(1)
    Path("tables.json").write_text(json.dumps(document["table_list"]))
    listed = load_table_list("tables.json")
    assert listed.batch_size_per_rank == 64
    assert {table.name: table.num_embeddings for table in listed.tables} == ROWS


def test_nothing_but_json(stats: Stats) -> None:
    """Numbers that JSON does not have are null."""
    pq.write_table(pa.table({"x": [1e308, -1e308, 1e308, float("inf")]}), "x.parquet")
    ended = stats("x.parquet", "--json")
    (x,) = ended.document["dense"].values()
    assert (x["infinite"], x["max"], x["std"]) == (1, 1e308, None)


def test_less_than_a_batch(stats: Stats) -> None:
    """There is no histogram then, and that is said."""
    ended = stats("data/train", "--max-rows", "150")
    assert "150 rows are less than one batch of 65,536" in " ".join(ended.out.split())
    document = stats("data/train", "--max-rows", "150", "--json").document
    assert document["rows"] == 150 and document["features"]["C1"]["reuse_histogram"] is None


def test_ids_out_of_range(stats: Stats) -> None:
    """Named with the largest and what to do, for the first features of many."""
    columns = {f"f{i}": [-1, 3, 2**40] for i in range(12)}
    pq.write_table(pa.table(columns), "wrong.parquet")
    text = " ".join(stats("wrong.parquet").out.split())
    assert (
        "f0: 1 ids are negative; hash them into their table with data.features.f0.ids: hash" in text
    )
    assert "... and 2 more features with ids out of range" in text and "f11: 1 ids" not in text
    config = tiny_config(Path("data"), Path("run"))
    config["tables"]["C1"]["num_embeddings"] = 5
    write_config(Path("low.yaml"), config)
    ids = pq.read_table("data/train")["C1"].to_pylist()
    text = " ".join(stats("data/train", "--config", "low.yaml").out.split())
    wrong = sum(i > 4 for i in ids)
    assert f"C1: {wrong:,} ids are not in 0 to 4 (the largest is {max(ids)}); raise" in text


MISTAKES: list[tuple[tuple[str, ...], int, str]] = [
    ((), MALFORMED, "name at least one Parquet file"),
    (("nowhere.parquet",), MALFORMED, "nowhere.parquet: there is no such file or folder"),
    (("run.yaml",), IMPOSSIBLE, "run.yaml is not a whole Parquet file"),
    (("data", "--engine", "spark"), MALFORMED, "--engine 'spark': choose local or ray"),
    (("data", "--config", "no.yaml"), MALFORMED, "no.yaml"),
    (("data", "--out", "no/stats.json"), MALFORMED, "--out no/stats.json: there is no folder no"),
    (("data", "--html", "data"), MALFORMED, "--html data is a folder"),
    (("data", "--max-rows", "0"), MALFORMED, "--max-rows"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_mistakes(stats: Stats, arguments: tuple[str, ...], code: int, message: str) -> None:
    """One message, the right exit code and nothing on stdout."""
    ended = stats(*arguments)
    assert ended.code == code and message in ended.err and not ended.out


def test_without_ray(stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that cannot be met here."""
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = stats("data", "--engine", "ray")
    assert ended.code == MALFORMED and "pip install ray" in ended.err


@pytest.fixture
def open_page() -> Any:
    """Opens a page in Chromium, offline; at the end it must not have complained or asked."""
    playwright = pytest.importorskip("playwright.sync_api")
    named = os.environ.get("SHARDEMB_BROWSER")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no browser: install Chromium (Debian: apt-get install chromium)")
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found)
        view = browser.new_context(offline=True).new_page()
        for event in ("console", "pageerror", "dialog"):
            view.on(event, lambda what: complaints.append(str(what)))
        view.on("request", lambda request: complaints.append(request.url))

        def open_path(path: Path) -> Any:
            view.goto(path.resolve().as_uri())
            complaints.remove(path.resolve().as_uri())
            return view

        yield open_path
        browser.close()
    assert complaints == []


def test_the_page(stats: Stats, open_page: Callable[[Path], Any]) -> None:
    """A curve and a line of the table for each feature; names are text, not markup."""
    name = "<img src=x onerror=alert(1)>"
    table = pa.table({"a": [1, 1, 2, 3] * 25, name: [[7, 8]] * 100, "x": [0.5, None] * 50})
    pq.write_table(table, "odd.parquet")
    assert stats("odd.parquet", "--batch-size", "50", "--html", "page.html").code == 0
    view = open_page(Path("page.html"))
    view.wait_for_selector("#skew .scatterlayer .trace >> nth=1", state="attached")
    assert view.locator("#skew .legendtext").all_text_contents() == ["a", name]
    assert view.locator("#reuse .ytick text").all_text_contents() == [name, "a"]
    rows = view.locator("#features tbody tr").all_inner_texts()
    assert [row.split("\t")[:7] for row in rows] == [
        ["a", "3", "100", "1", "1", "1", "50.0%"], [name, "2", "200", "2", "2", "2", "50.0%"],
    ]  # fmt: skip
    (dense,) = view.locator("#dense tbody tr").all_inner_texts()
    assert dense.split("\t") == ["x", "50", "0", "0", "0.5", "0.5", "0.5", "0"]


def test_a_page_of_dense_columns(stats: Stats, open_page: Callable[[Path], Any]) -> None:
    """Without features there is nothing about them."""
    pq.write_table(pa.table({"x": [0.5]}), "x.parquet")
    assert stats("x.parquet", "--html", "page.html").code == 0
    view = open_page(Path("page.html"))
    assert view.locator("#numbers").is_visible() and not view.locator("#sparse").is_visible()


def test_data_drawn_as_statistics_say(
    stats: Stats, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`data synth --reuse`: a feature whose lookups all repeat thousands of times has few ids."""
    hot = [0.0] * (REUSE_BINS - 2) + [1.0, 0.0]
    document = {"batch_size": REUSE_BATCH_SIZE, "features": {"C1": {"reuse_histogram": hot}}}
    Path("s.json").write_text(json.dumps(document))
    synth = ["shardemb", "data", "synth", "run.yaml", "data.dir=drawn", "--train-rows", "5000"]
    ended = run_command(app, [*synth, "--reuse", "s.json", "--json"], monkeypatch, capfd)
    assert ended.code == 0 and ended.document["rows"]["train"] == 5000
    found = stats("drawn/train", "--config", "run.yaml", "--json").document["features"]
    assert found["C1"]["distinct_ids"] <= 4 < found["C2"]["distinct_ids"]
    ended = run_command(app, [*synth, "--overwrite", "--reuse", "run.yaml"], monkeypatch, capfd)
    assert ended.code == MALFORMED and "run.yaml holds no reuse histograms" in ended.err
