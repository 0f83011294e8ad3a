"""The HTML page, as a person sees it in a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import Plan, PlannerError, Topology
from planner.html_report import write_html

from .example_plans import GIB, generated, hand_made, table, without_costs

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LINES = "document.getElementById('map').data[0].y.length"
TWO = Topology(world_size=2, local_world_size=2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, from SHARDEMB_BROWSER or PATH; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    named = os.environ.get("SHARDEMB_BROWSER")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no browser: install Chromium (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found)
        yield running
        running.close()


class Page:
    """The page of a plan, opened; what went wrong in it is in `complaints`."""

    def __init__(self, browser: Any, plan: Plan, folder: Path) -> None:
        path = folder / "plan.html"
        write_html(plan, path)
        self.bytes = path.stat().st_size
        self.complaints: list[str] = []
        self.requests: list[str] = []
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        self.view = context.new_page()
        self.view.on("console", lambda message: self.complaints.append(message.text))
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.view.on("request", lambda request: self.requests.append(request.url))
        started = time.monotonic()
        self.view.goto(path.as_uri())
        self.view.wait_for_selector("#map .heatmaplayer image")
        self.seconds = time.monotonic() - started

    def count(self, selector: str) -> int:
        return int(self.view.locator(selector).count())

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.view.locator(selector).all_text_contents()]

    def map_rows(self) -> list[str]:
        """The map's tables from the top; the axis counts from the bottom."""
        return self.texts("#map .ytick text")[::-1]

    def column(self, label: str) -> list[str]:
        """The cells below the header that starts with `label`."""
        place = [head.split()[0] for head in self.texts("#tables th")].index(label) + 1
        return self.texts(f"#tables tbody td:nth-child({place})")

    def sort(self, label: str) -> None:
        self.view.locator("#tables th button", has_text=re.compile(f"^{label}")).click()

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Charts follow the controls a little later."""
        give_up = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < give_up, "the page did not change"
            self.view.wait_for_timeout(20)

    def reset(self) -> None:
        """As it was when it was opened."""
        self.view.click("#clear")
        self.view.select_option("#order", "rank")
        if not self.count("#tables th:last-child[aria-sort=descending]"):
            self.sort("ms")


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[[Plan], Page]]:
    """Opens plans, and at the end checks that no page complained or asked for anything."""
    pages: list[Page] = []

    def open_plan(plan: Plan) -> Page:
        pages.append(Page(browser, plan, tmp_path))
        return pages[-1]

    yield open_plan
    for page in pages:
        _check(page)
        page.view.context.close()


def _check(page: Page) -> None:
    assert page.complaints == []
    assert page.requests == [page.view.url]


@pytest.fixture(scope="module")
def opened_once(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    tables = {
        "users": table([0], ms=1.0, name="users"),
        "ads": table([1], ms=3.0, name="ads"),
        "Items": table([0, 1], ms=0.75, name="Items"),
    }
    plan = hand_made(tables, [(4, 2, 1, 1), (1, 3, 2, 1)], TWO, [GIB, 9 * GIB])
    return Page(browser, plan, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def large_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """As many tables and devices as in TorchRec's published example."""
    plan = generated(1935, "12x8xA100-80GB")
    return Page(browser, plan, tmp_path_factory.mktemp("large"))


@pytest.fixture
def page(opened_once: Page) -> Iterator[Page]:
    """Three tables on two devices."""
    opened_once.reset()
    yield opened_once
    _check(opened_once)


def test_charts_are_drawn(page: Page) -> None:
    """Devices as stacked bars by stage with step and bound as lines, memory, the map."""
    assert page.count("#times .bars .point path") == 2 * 4
    assert page.texts("#times .legendtext") == [
        "forward compute", "forward comm", "backward compute", "backward comm",
    ]  # fmt: skip
    assert page.texts("#times .annotation-text") == [
        "predicted step 10.000 ms", "lower bound 5.000 ms",
    ]  # fmt: skip
    assert page.count("#times .shapelayer path") == 2
    assert page.count("#memory .bars .point path") == 2
    assert page.texts("#memory .annotation-text") == ["limit 8.0 GiB"]
    assert page.map_rows() == ["ads", "Items", "users"]
    assert page.texts(".tile b")[:3] == ["10.000 ms", "5.000 ms", "100.0%"]


def test_a_device_tells_its_numbers(page: Page) -> None:
    """Under the pointer: each stage and the total; memory, and that it is too much."""
    page.view.locator("#times .bars .point path").first.hover(force=True)
    page.view.wait_for_selector("#times .hoverlayer .legendtext")
    assert page.texts("#times .hoverlayer text") == [
        "rank 0", "forward compute : 4 ms", "forward comm : 2 ms", "backward compute : 1 ms",
        "backward comm : 1 ms", "total : 8 ms",
    ]  # fmt: skip
    page.view.locator("#memory .bars .point path").last.hover(force=True)
    page.view.wait_for_selector("#memory .hoverlayer text")
    assert page.texts("#memory .hoverlayer text") == [
        "rank 1, host 0: 9.0 GiB of 8.0 GiB, too much"
    ]


def test_a_header_sorts(page: Page) -> None:
    """The list is sorted by cost; a click sorts by the column, another turns the order around."""
    assert page.column("table") == ["ads", "Items", "users"]
    assert page.column("ms") == ["3.000", "1.500", "1.000"]
    page.sort("table")
    assert page.column("table") == ["ads", "Items", "users"]
    page.sort("table")
    assert page.column("table") == ["users", "Items", "ads"]
    page.sort("memory")
    assert page.column("memory") == ["2.0 GiB", "1.0 GiB", "1.0 GiB"]
    sorted_by = page.view.locator("#tables th[aria-sort]")
    assert sorted_by.all_inner_texts() == ["memory"]
    assert sorted_by.get_attribute("aria-sort") == "descending"


def test_filters_choose_tables(page: Page) -> None:
    """By name, sharding type and rank; the map shows the same tables as the list."""
    page.view.fill("#search", "S")
    assert page.column("table") == ["ads", "Items", "users"]
    page.view.fill("#search", "item")
    assert page.column("table") == ["Items"]
    assert page.texts("#count") == ["1 of 3 tables, 2.0 GiB, 1.500 ms on all ranks"]
    page.wait_for(lambda: page.map_rows() == ["Items"])
    page.view.click("#clear")
    page.view.select_option("#type", "table_wise")
    page.view.fill("#rank", "1")
    assert page.column("table") == ["ads"]
    page.view.fill("#search", "nowhere")
    assert page.texts("#tables tbody td") == ["No table matches."]
    page.view.wait_for_selector("#map", state="hidden")
    page.view.click("#clear")
    page.wait_for(lambda: page.map_rows() == ["ads", "Items", "users"])


def test_a_click_on_a_device_lists_its_tables(page: Page) -> None:
    """A bar that is too high leads to what makes it high."""
    page.view.locator("#times .bars .point path").first.click(force=True)
    page.wait_for(lambda: page.column("table") == ["Items", "users"])
    assert page.view.input_value("#rank") == "0"


def test_devices_are_ordered(page: Page) -> None:
    """By rank at first, on demand the fullest first."""
    assert page.texts("#memory .xtick text") == ["0", "1"]
    page.view.select_option("#order", "memory")
    page.wait_for(lambda: page.texts("#memory .xtick text") == ["1", "0"])
    assert page.texts("#times .xtick text") == ["1", "0"]


def test_names_are_text(open_page: Callable[[Plan], Page]) -> None:
    """Not markup of the page, nor Plotly's, nor the end of the script that they are in."""
    names = ("<script>alert(1)</script>", "<b>&amp;</b>{{plotly}}", "<img src=x onerror=alert(2)>")
    page = open_page(without_costs(names))
    assert sorted(page.column("table")) == sorted(names)
    assert sorted(page.map_rows()) == sorted(names)
    assert page.count("main img, main b:not(.tile b)") == 0


def test_a_plan_without_costs(open_page: Callable[[Plan], Page]) -> None:
    """Memory and map are there, times are not, and the page says why."""
    page = open_page(without_costs())
    assert page.count("#times") == 0
    assert page.count("#memory .bars .point path") == 2
    assert "without a cost model" in page.texts("#device-note")[0]
    assert "ms" not in {head.split()[0] for head in page.texts("#tables th")}
    assert page.texts("#color option") == ["memory"]


def test_reasons_are_shown_where_there_are_any(
    open_page: Callable[[Plan], Page], page: Page
) -> None:
    """Why an option was chosen is a column; without reasons there is none."""
    tables = {"a": table([0], name="a", reason="nothing else fits"), "b": table([1], name="b")}
    reasoned = open_page(hand_made(tables, [(1, 1, 1, 1)] * 2, TWO))
    assert reasoned.column("reason") == ["nothing else fits", "–"]
    assert "reason" not in page.texts("#tables th")


def test_a_large_plan_opens_quickly(large_page: Page) -> None:
    """1,935 tables on 96 devices: a few seconds, a few megabytes, all of it there."""
    page = large_page
    assert page.seconds < 20  # 3 on two cores; a busy machine takes longer
    assert page.bytes < 8e6
    assert page.count("#times .bars .point path") == 96 * 4
    assert page.count("#tables tbody tr") == 200
    page.view.click("#more")
    assert page.count("#tables tbody tr") == 1935
    page.view.fill("#search", "table_193")
    page.wait_for(lambda: len(page.map_rows()) == page.count("#tables tbody tr") == 6)
    _check(page)


def test_the_map_shows_every_table(large_page: Page) -> None:
    """There is a pixel for each line; zooming in takes the tables of a line apart."""
    page = large_page
    page.reset()
    page.wait_for(lambda: page.view.evaluate(LINES) == -(-1935 // 4))
    image = page.view.locator("#map .heatmaplayer image")
    assert int(image.get_attribute("height")) >= -(-1935 // 4)
    assert page.texts("#map-note")[0].startswith("Each line stands for 4 tables")
    page.view.locator("#map").scroll_into_view_if_needed()
    box = image.bounding_box()
    page.view.mouse.move(box["x"] + 50, box["y"] + 1)
    page.view.mouse.down()
    page.view.mouse.move(box["x"] + 300, box["y"] + 25, steps=4)
    page.view.mouse.up()
    page.wait_for(lambda: page.texts("#map-note") == [""])
    assert set(page.map_rows()) <= set(page.column("table")[:100])
    page.view.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    page.wait_for(lambda: page.texts("#map-note")[0].startswith("Each line stands for 4 tables"))
    _check(page)


def test_more_devices_than_bars_fit(open_page: Callable[[Plan], Page]) -> None:
    """Of thousands of devices the slowest and the fullest are drawn, and the page says so."""
    page = open_page(generated(20, "160x8xA100-80GB"))
    note = page.texts("#device-note")[0]
    shown = re.search(r"The slowest and the fullest ([\d,]+) of 1,280 devices", note)
    assert shown is not None
    assert page.count("#memory .bars .point path") == int(shown[1].replace(",", "")) <= 512
    width = page.view.locator("#map .heatmaplayer image").get_attribute("width")
    assert int(width) >= 512  # a pixel for each device in the map


def test_the_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be written there is an error for a person, and the earlier page stays."""
    page = tmp_path / "plan.html"
    write_html(without_costs(), page)
    before = page.read_text()
    with pytest.raises(PlannerError, match=r"cannot write the page .*No such file or directory"):
        write_html(without_costs(), tmp_path / "nowhere" / "plan.html")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PlannerError, match=r"cannot write the page .*No space left on device"):
        write_html(without_costs(("other",)), page)
    assert page.read_text() == before
    assert list(tmp_path.iterdir()) == [page]


def test_charts_are_loaded_only_for_a_page() -> None:
    """A plan in the terminal does not wait for Plotly."""
    code = "import sys, planner.html_report; print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
