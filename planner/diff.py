"""What changed between two plans: tables, devices and the predicted step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from planner.plan import Plan, TablePlan
from planner.report import (
    compact_ranks,
    format_bytes,
    format_ms,
    kernel_name,
    printable,
    text_table,
)

MOST_TABLES, MOST_DEVICES = 40, 16
SAME = 1e-9  # relative: sums in another order differ by less
FACTS = ("step_ms", "bound_ms", "gap_percent", "max_over_mean")


@dataclass(frozen=True)
class Change:
    """A value in both plans."""

    before: Any
    after: Any


@dataclass(frozen=True)
class DeviceChange:
    rank: int
    total_ms: Change
    memory_bytes: Change


@dataclass(frozen=True)
class Difference:
    """What is equal in both is left out of everything."""

    settings: dict[str, Change]  # what was planned for, and how
    predicted: dict[str, Change]
    tables: dict[str, dict[str, Change]]  # table -> what of it
    only_before: tuple[str, ...]  # tables
    only_after: tuple[str, ...]
    devices: tuple[DeviceChange, ...]

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, field) for field in self.__dataclass_fields__)

    def to_dict(self) -> dict[str, Any]:
        """For json.dumps."""
        return {"different": not self.is_empty, **asdict(self)}


def compare(before: Plan, after: Plan) -> Difference:
    """What `after` has otherwise than `before`, but for the time that planning took."""
    common = [name for name in before.tables if name in after.tables]
    tables = {n: _changes(_of_table(before, n), _of_table(after, n)) for n in common}
    return Difference(
        settings=_changes(_settings(before), _settings(after)),
        predicted=_changes(_predicted(before), _predicted(after)),
        tables={name: changes for name, changes in tables.items() if changes},
        only_before=tuple(name for name in before.tables if name not in after.tables),
        only_after=tuple(name for name in after.tables if name not in before.tables),
        devices=_devices(before, after),
    )


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Change]:
    return {k: Change(v, after[k]) for k, v in before.items() if not _is_same(v, after[k])}


def _is_same(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=SAME, abs_tol=1e-12)
    return bool(before == after)


def _settings(plan: Plan) -> dict[str, Any]:
    topology = plan.topology
    return {
        "devices": topology.world_size,
        "devices_per_host": topology.local_world_size,
        "hardware": topology.hardware and topology.hardware.model_dump(mode="json"),
        "batch_size": plan.batch_size,
        "cost_model": plan.cost_model,
        "objective": plan.objective,
    }


def _predicted(plan: Plan) -> dict[str, Any]:
    return {fact: getattr(plan.predicted, fact) for fact in FACTS}


def _of_table(plan: Plan, name: str) -> dict[str, Any]:
    table = plan.tables[name]
    return {
        "table": table.spec and table.spec.model_dump(mode="json", exclude_defaults=True),
        "sharding_type": table.sharding_type,
        "compute_kernel": kernel_name(table),
        "shards": _shards(table),
        "ranks": compact_ranks((shard.rank for shard in table.shards), plan.topology),
        "constraint": table.constraint
        and table.constraint.model_dump(mode="json", exclude_defaults=True),
    }


def _shards(table: TablePlan) -> str:
    """`4 of 1000 x 32`: their number and the size of the largest."""
    largest = max(table.shards, key=lambda shard: shard.rows * shard.columns)
    return f"{len(table.shards)} of {largest.rows:,} x {largest.columns}"


def _devices(before: Plan, after: Plan) -> tuple[DeviceChange, ...]:
    """The ranks of both plans whose cost or memory changed."""
    changes = []
    for a, b in zip(before.devices, after.devices, strict=False):
        if not (_is_same(a.total_ms, b.total_ms) and a.memory_bytes == b.memory_bytes):
            times, bytes_ = Change(a.total_ms, b.total_ms), Change(a.memory_bytes, b.memory_bytes)
            changes.append(DeviceChange(a.rank, times, bytes_))
    return tuple(changes)


# ------------------------------------------------------------------ in the terminal


def print_difference(difference: Difference, console: Console) -> None:
    """What changed, or that nothing did."""
    if difference.is_empty:
        console.print("no difference")
        return
    _print_facts(difference, console)
    _print_tables(difference, console)
    _print_devices(difference.devices, console)


def _print_facts(difference: Difference, console: Console) -> None:
    facts = {**difference.predicted, **difference.settings}
    if not facts:
        return
    shown = text_table([""], ["before", "after", "change"])
    for name, change in facts.items():
        shown.add_row(name, *_in_words(name, change))
    console.print(shown, "")


def _in_words(name: str, change: Change) -> list[str]:
    if name == "hardware":
        kinds = [value["kind"] if value else "unknown" for value in (change.before, change.after)]
        return [*kinds, "" if kinds[0] != kinds[1] else "other numbers"]
    return [_number(change.before), _number(change.after), _percent(change)]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return (
        format_ms(value)
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )


def _percent(change: Change) -> str:
    before, after = change.before, change.after
    if not isinstance(before, float) or not isinstance(after, float) or not before:
        return ""
    return f"{100 * (after / before - 1):+.2f}%"


def _print_tables(difference: Difference, console: Console) -> None:
    for what, names in (
        ("only before", difference.only_before),
        ("only after", difference.only_after),
    ):
        if names:
            shown_names = ", ".join(names[:MOST_TABLES]) + (
                " ..." if len(names) > MOST_TABLES else ""
            )
            console.print(Text(f"{len(names):,} tables {what}: {shown_names}"), "")
    if not difference.tables:
        return
    shown = text_table([])
    for column in ("table", "what", "before", "after"):
        shown.add_column(column, overflow="fold")
    for name, changes in list(difference.tables.items())[:MOST_TABLES]:
        for number, (what, change) in enumerate(changes.items()):
            first = printable(name) if number == 0 else Text("")
            shown.add_row(first, what, *map(_value, _only_changed(change)))
    console.print(f"{len(difference.tables):,} tables changed:")
    console.print(shown, "")
    if len(difference.tables) > MOST_TABLES:
        console.print(f"... and {len(difference.tables) - MOST_TABLES} more: --json lists all\n")


def _only_changed(change: Change) -> tuple[Any, Any]:
    """Of two mappings, what differs."""
    if not isinstance(change.before, dict) or not isinstance(change.after, dict):
        return change.before, change.after
    keys = sorted(change.before.keys() | change.after.keys())
    keys = [key for key in keys if change.before.get(key) != change.after.get(key)]
    return {k: change.before.get(k) for k in keys}, {k: change.after.get(k) for k in keys}


def _value(value: Any) -> Text:
    if isinstance(value, dict):
        return Text(", ".join(f"{k} {'default' if v is None else v}" for k, v in value.items()))
    return Text("-" if value is None else str(value))


def _print_devices(changes: Sequence[DeviceChange], console: Console) -> None:
    if not changes:
        return
    ordered = sorted(changes, key=lambda c: (-_weight(c.total_ms), -_weight(c.memory_bytes)))
    shown = text_table([], ["rank", "ms\nbefore", "ms\nafter", "memory\nbefore", "memory\nafter"])
    for change in ordered[:MOST_DEVICES]:
        times = [_number(value) for value in (change.total_ms.before, change.total_ms.after)]
        memory = [format_bytes(v) for v in (change.memory_bytes.before, change.memory_bytes.after)]
        shown.add_row(str(change.rank), *times, *memory)
    console.print(f"{len(changes):,} devices changed, those that changed most first:")
    console.print(shown)


def _weight(change: Change) -> float:
    return abs(float(change.after or 0.0) - float(change.before or 0.0))
