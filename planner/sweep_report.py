"""A sweep in the terminal and as one HTML page: `sweep_page.html`, filled."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from planner.page import write_page
from planner.report import format_ms, text_table
from planner.sweep import Cell, Line, Sweep

TEMPLATE = Path(__file__).with_name("sweep_page.html")
WHAT = (
    "Embedding tables only: the dense model takes time of its own. efficiency: the speed of a "
    "device, over that with the fewest that fit; gain: of each device added since the count "
    "before, over one there."
)


def print_sweep(swept: Sweep, console: Console) -> None:
    """A row for each cell, and where each kind stops scaling."""
    has_prices = any(c.usd_per_million_samples is not None for e in swept.lines for c in e.cells)
    money = ["USD/1M\nsamples"] if has_prices else []
    numbers = ["devices", "step\nms", "samples/s", "device-ms\n/1000", *money]
    shown = text_table([""], [*numbers, "effi-\nciency", "gain"])
    for line in swept.lines:
        shown.add_section()
        for label, cell in zip(_labels(line), line.cells, strict=True):
            shown.add_row(label, f"{cell.devices:,}", *_values(cell, has_prices))
    console.print(shown, "")
    for conclusion in conclusions(swept):
        console.print(Text(conclusion))
    console.print("", Text(f"{WHAT} Cost model: {swept.cost_model}.", style="dim"))


def _labels(line: Line) -> list[str]:
    """Kind and batch size, beside the first cells."""
    if len(line.cells) == 1:
        return [f"{line.kind}\n{line.batch}"]
    return [line.kind, line.batch, *[""] * (len(line.cells) - 2)]


def _values(cell: Cell, has_prices: bool) -> list[str | Text]:
    if not cell.fits:
        return [Text("no fit", style="red")]
    usd = cell.usd_per_million_samples
    money = ["-" if usd is None else f"{usd:.3g}"] if has_prices else []
    speed = cell.samples_per_second
    return [
        format_ms(cell.step_ms or 0.0),
        "-" if speed is None else f"{speed:,.0f}",
        format_ms(cell.device_ms_per_1000_samples or 0.0),
        *money,
        _percent(cell.efficiency),
        Text(_percent(cell.gain), style="" if cell.pays else "yellow"),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def conclusions(swept: Sweep) -> list[str]:
    """Where each line ends, and why cells do not fit."""
    return [f"{e.kind}, {e.batch}: {text}" for e in swept.lines for text in _of_line(e)]


def _of_line(line: Line) -> list[str]:
    misfits = [cell for cell in line.cells if not cell.fits]
    found = [_scaling(line)] if line.scales_to else []
    if misfits:
        counts = ", ".join(f"{cell.devices:,}" for cell in misfits)
        reason = (misfits[-1].reason or "").splitlines()[0]
        found.append(f"{counts} devices are too few: {reason}")
    return found


def _scaling(line: Line) -> str:
    if line.stops_at is None:
        return f"scales up to {line.scales_to:,} devices, the most tried"
    return (
        f"scales up to {line.scales_to:,} devices; with {line.stops_at:,}, each added one does "
        "less than half of what one did before"
    )


def write_sweep_html(swept: Sweep, path: Path) -> None:
    """Write the page `path`, whole or not at all."""
    content = {"what": WHAT, "conclusions": conclusions(swept), **swept.to_dict()}
    write_page(TEMPLATE, content, path)
