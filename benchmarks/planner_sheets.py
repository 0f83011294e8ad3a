"""What benchmarks.planner has measured, as rows and as tables to show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from planner.plan import Objective
from planner.search.baselines import BASELINES
from planner.topology import parse_topology

OURS, TORCHREC = "shardemb", ("torchrec default", "torchrec tuned")


@dataclass(frozen=True)
class Case:
    """What is planned for."""

    tables: str
    topology: str
    batch_size: int


@dataclass(frozen=True)
class Row:
    """One plan under one objective; without `objective_ms` there is none, and `error` says why."""

    section: str
    case: Case
    planner: str
    objective: Objective
    objective_ms: float | None = None
    bound_ms: float | None = None
    gap_percent: float | None = None
    max_over_mean: float | None = None
    memory_share: float | None = None  # of the fullest device, or host
    seconds: float | None = None
    cpu_seconds: float | None = None
    planning_seconds: float | None = None  # TorchRec's: of these, without imports
    own_max_total_ms: float | None = None  # TorchRec's: what it says itself of its plan
    peak_mib: float | None = None
    fingerprint: str | None = None
    error: str | None = None
    proven: bool | None = None  # that nothing fits


class Sheet(NamedTuple):
    """A table to show; columns after the first `words` are numbers."""

    title: str
    header: list[str]
    lines: list[list[str]]
    words: int
    note: str = ""

    def show(self, console: Console) -> None:
        table = Table(title=self.title, caption=self.note or None, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.words else "right")
        for line in self.lines:
            table.add_row(*line)
        console.print(table)

    def markdown(self) -> str:
        rule = ["---" if i < self.words else "---:" for i in range(len(self.header))]
        lines = ["| " + " | ".join(line) + " |" for line in (self.header, rule, *self.lines)]
        return "\n".join([f"## {self.title}", "", *([self.note, ""] if self.note else []), *lines])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def ranks(row: Row) -> int:
    return parse_topology(row.case.topology).world_size


def plans_sheet(rows: list[Row]) -> Sheet:
    header = ["tables", "ranks", "objective", "seconds", "CPU s", "peak MiB", "ms", "bound ms"]
    lines = [
        [
            row.case.tables, str(ranks(row)), row.objective, number(row.seconds),
            number(row.cpu_seconds), number(row.peak_mib, 0), number(row.objective_ms, 3),
            number(row.bound_ms, 3), number(row.gap_percent), number(row.max_over_mean, 4),
        ]
        for row in rows
        if row.planner == OURS
    ]  # fmt: skip
    return Sheet("Plans", [*header, "gap %", "max/mean"], lines, 3)


def rules_sheet(rows: list[Row]) -> Sheet:
    """Each rule's objective in multiples of ours."""
    lines = []
    for own in (row for row in rows if row.planner == OURS):
        same = {row.planner: row for row in rows if _same_problem(row, own)}
        ratios = [_ratio(same.get(name), own) for name in BASELINES]
        lines.append([own.case.tables, str(ranks(own)), own.objective, *ratios])
    note = "The objective in multiples of our plan's; - where it finds no room, or one host only."
    header = ["tables", "ranks", "objective", *BASELINES]
    return Sheet("The published rules", header, lines, 3, note)


def torchrec_sheet(rows: list[Row]) -> Sheet:
    lines = []
    for own in (row for row in rows if row.planner == OURS):
        for row in rows:
            if row.planner in TORCHREC and _same_problem(row, own):
                lines.append([
                    row.case.tables, str(ranks(row)), row.objective, row.planner,
                    number(row.seconds, 1), number(row.cpu_seconds, 1),
                    number(row.planning_seconds, 1), row.error or number(row.objective_ms, 3),
                    _ratio(row, own), number(row.max_over_mean, 4),
                    number(row.own_max_total_ms, 3),
                ])  # fmt: skip
    header = [
        "tables", "ranks", "objective", "planner", "seconds", "CPU s", "planning s", "ms",
        "times ours", "max/mean", "its max_total",
    ]  # fmt: skip
    note = "Its max_total: TorchRec's own milliseconds of its plan, which ours of it must equal."
    return Sheet("TorchRec's own planner", header, lines, 4, note)


def wiki_sheet(table_list: Path, rows: list[Row]) -> Sheet:
    """Balance, for which TorchRec's own report of these tables is at hand."""
    reported = json.loads(table_list.read_text())["reported"]
    theirs = reported["max_perf_ms"] / reported["mean_perf_ms"]
    seconds = number(reported["planner_seconds"])
    lines = [["torchrec, as reported", seconds, "-", "-", number(theirs, 4), ""]]
    lines += [
        [
            row.planner, number(row.seconds), number(row.objective_ms, 3), number(row.gap_percent),
            number(row.max_over_mean, 4), row.error or "",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["planner", "seconds", "max_total ms", "gap %", "max/mean", "error"]
    note = "Milliseconds do not compare with the report's: it does not say on which bandwidths."
    return Sheet(f"{rows[0].case.tables} on {rows[0].case.topology}", header, lines, 1, note)


def others_sheet(rows: list[Row]) -> Sheet:
    header = ["tables", "topology", "batch size", "plan", "seconds", "memory %", "ms", "gap %"]
    lines = [
        [
            row.case.tables, row.case.topology, str(row.case.batch_size), _verdict(row),
            number(row.seconds), number(row.memory_share and 100 * row.memory_share, 1),
            number(row.objective_ms, 3), number(row.gap_percent),
        ]
        for row in rows
    ]  # fmt: skip
    note = "Objective stages; the batch size of a rank; the memory of the fullest device or host."
    return Sheet("Other table lists: plans within memory", header, lines, 4, note)


def _verdict(row: Row) -> str:
    if row.error:
        return f"{'proven' if row.proven else 'NOT PROVEN'}: {row.error}"
    return "fits" if row.memory_share is not None and row.memory_share <= 1 else "DOES NOT FIT"


def _same_problem(row: Row, own: Row) -> bool:
    return (row.case, row.objective) == (own.case, own.objective)


def _ratio(row: Row | None, own: Row) -> str:
    if row is None or not row.objective_ms or not own.objective_ms:
        return "-"
    return f"{row.objective_ms / own.objective_ms:.3f}x"
