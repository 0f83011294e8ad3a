"""Kinds x counts x batch sizes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from planner.sweep import Cell, Line

from .commands import MALFORMED, Bench

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def swept(bench: Bench, *options: str) -> dict[str, Any]:
    made: dict[str, Any] = bench.made("sweep", "tables.json", *options)
    return made


def test_every_combination(bench: Bench) -> None:
    """A line for each kind and batch size, a cell for each count, each as `plan` would say."""
    lines = swept(
        bench, "--kinds", "H100,a100-80gb", "--devices", "4,2,16", "--batch-sizes", "512,64"
    )["lines"]
    assert [(line["kind"], line["batch"]) for line in lines] == [
        ("H100", "64 a rank"),
        ("H100", "512 a rank"),
        ("A100-80GB", "64 a rank"),
        ("A100-80GB", "512 a rank"),
    ]
    for line in lines:
        assert [(cell["devices"], cell["hosts"]) for cell in line["cells"]] == [
            (2, 1), (4, 1), (16, 2),
        ]  # fmt: skip
    plan = bench.made("tables.json", "--topology", "2x8xH100", "--batch-size", "512")
    assert lines[1]["cells"][2]["step_ms"] == plan["predicted"]["step_ms"]
    assert lines[1]["cells"][2]["bound_ms"] == plan["predicted"]["bound_ms"]


def test_the_arithmetic(bench: Bench) -> None:
    """By hand, from the step: speed, cost of a thousand samples, money, efficiency and gain."""
    line = swept(bench, "--kinds", "H100", "--devices", "2,8", "--price", "h100=3.6")["lines"][0]
    two, eight = line["cells"]
    for cell in (two, eight):
        rows, seconds = 1024 * cell["devices"], cell["step_ms"] / 1000
        assert cell["samples_per_second"] == pytest.approx(rows / seconds)
        device_ms = cell["devices"] * cell["step_ms"] / rows * 1000
        assert cell["device_ms_per_1000_samples"] == pytest.approx(device_ms)
        # 3.6 USD an hour are 1e-6 USD a device-ms.
        assert cell["usd_per_million_samples"] == pytest.approx(device_ms * 1000 * 1e-6)
    faster = eight["samples_per_second"] / two["samples_per_second"]
    assert (two["efficiency"], two["gain"]) == (1.0, None)
    assert eight["efficiency"] == pytest.approx(faster / 4)
    assert eight["gain"] == pytest.approx((faster - 1) / 3)


def test_no_money_without_prices(bench: Bench) -> None:
    """Nothing is assumed about what devices cost."""
    line = swept(bench, "--kinds", "H100", "--devices", "2")["lines"][0]
    assert line["cells"][0]["usd_per_million_samples"] is None


def line_of(*gains: float | str | None) -> Line:
    """2, 4, 8, ... devices with these gains; a text is a reason not to fit."""
    cells = [
        Cell(2 << i, 1, 8, reason=gain) if isinstance(gain, str) else Cell(2 << i, 1, 8, gain=gain)
        for i, gain in enumerate(gains)
    ]
    return Line("H100", "8 a rank", tuple(cells))


@pytest.mark.parametrize(
    ("line", "fewest", "scales_to", "stops_at"),
    [
        (line_of(None, 0.9, 0.8), 2, 8, None),
        (line_of(None, 0.9, 0.4), 2, 4, 8),
        (line_of(None, 0.4, 0.9), 2, 2, 4),
        (line_of("full", None, 0.5), 4, 8, None),
        (line_of("full", "full"), None, None, None),
    ],
)
def test_where_scaling_stops(
    line: Line, fewest: int | None, scales_to: int | None, stops_at: int | None
) -> None:
    """Before the first count whose added devices each do less than half of one before."""
    assert (line.fewest_devices, line.scales_to, line.stops_at) == (fewest, scales_to, stops_at)


def test_what_does_not_fit(bench: Bench) -> None:
    """The cell has the reason, and the sweep goes on."""
    big = {"name": "big", "num_embeddings": 10**9, "embedding_dim": 128}
    bench.write_tables(big, batch_size_per_rank=8)
    ended = bench.plan("sweep", "tables.json", "--kinds", "L40S", "--devices", "1,64")
    assert ended.code == 0
    assert "no fit" in ended.out and "1 devices are too few: no plan fits 1x1xL40S" in ended.out
    one, many = swept(bench, "--kinds", "L40S", "--devices", "1,64")["lines"][0]["cells"]
    assert "big" in one["reason"] and one["step_ms"] is None
    assert many["reason"] is None and many["efficiency"] == 1.0


def test_a_batch_of_all_ranks(bench: Bench) -> None:
    """What the table list says of all ranks together is shared by them."""
    bench.write_tables(batch_size=4096)
    line = swept(bench, "--kinds", "H100", "--devices", "2,4")["lines"][0]
    assert line["batch"] == "4,096 in all"
    assert [cell["batch_size"] for cell in line["cells"]] == [2048, 1024]


def test_own_hardware(bench: Bench) -> None:
    """A kind may be a topology file, whose counts do not matter."""
    bench.write("mine.yaml", "hosts: 9\ndevices_per_host: 9\nhardware: {like: H100, kind: mine}\n")
    lines = swept(bench, "--kinds", "mine.yaml,H100", "--devices", "2")["lines"]
    assert [line["kind"] for line in lines] == ["mine", "H100"]
    assert lines[0]["cells"] == lines[1]["cells"]


def test_out_is_what_json_prints(bench: Bench) -> None:
    """The same object, in a file."""
    made = swept(bench, "--kinds", "H100", "--devices", "2", "--out", "sweep.json")
    assert json.loads(Path("sweep.json").read_text()) == made


MISTAKES = {
    "unknown kind": (["--kinds", "H100,X1"], "--kinds 'X1': there is no hardware kind 'X1'"),
    "no kind": (["--kinds", ","], "--kinds: name kinds of devices"),
    "no number": (["--devices", "8,many"], "--devices '8,many': write positive whole numbers"),
    "zero": (["--devices", "0"], "--devices '0': write positive whole numbers"),
    "half a host": (["--devices", "12"], "--devices 12: these are not full hosts of 8"),
    "too many": (["--devices", "8000000"], "--devices 8000000: more than 1,000,000"),
    "batch sizes": (["--batch-sizes", "1e3"], "--batch-sizes '1e3': write positive whole"),
    "price": (["--price", "H100"], "--price 'H100': write KIND=USD"),
    "price of another kind": (["--price", "H200=1"], "--price 'H200=1': --kinds has no such kind"),
    "baseline": (["--search", "best"], "--search 'best': choose auto, dreamshard"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_malformed_sweep(bench: Bench, options: list[str], message: str) -> None:
    """The option is named, and what was given."""
    defaults = {"--kinds": "H100", "--devices": "8"}
    given = {**defaults, **dict(zip(options[::2], options[1::2], strict=True))}
    ended = bench.plan("sweep", "tables.json", *(word for pair in given.items() for word in pair))
    assert message in ended.err
    assert (ended.code, ended.out) == (MALFORMED, "")


def test_the_page_in_a_browser(bench: Bench) -> None:
    """Charts and table are drawn, offline, without a complaint; a kind's name is text."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("SHARDEMB_BROWSER") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if found is None:
        pytest.skip("no browser: install Chromium (Debian: apt-get install chromium)")
    name = "<img src=x onerror=alert(1)>"
    bench.write(
        "x.yaml", f"hosts: 1\ndevices_per_host: 1\nhardware: {{like: H100, kind: '{name}'}}"
    )
    swept(
        bench, "--kinds", "x.yaml", "--devices", "1,2", "--price", f"{name}=2", "--html", "s.html"
    )
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found)
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto((bench.folder / "s.html").as_uri())
        page.wait_for_selector("#usd_per_million_samples .main-svg")
        charts = page.locator(".chart .scatterlayer .points path").count()
        cells = page.locator("#cells tbody tr").all_inner_texts()
        browser.close()
    assert complaints == []
    assert charts == 4 * 2  # charts, counts
    assert len(cells) == 2 and all(name in cell for cell in cells)
