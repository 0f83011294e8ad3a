"""The plan in the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from planner import Plan, Topology
from planner.plan import HostPlan
from planner.report import compact_ranks, format_bytes, print_plan

from .example_plans import GIB, generated, hand_made, table, without_costs

TWO = Topology(world_size=2, local_world_size=2)
TWENTY = Topology(world_size=20, local_world_size=4)


def _shown(plan: Plan, width: int = 200, encoding: str = "utf-8") -> list[str]:
    """The lines that a file or a pipe gets."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_plan(plan, Console(file=out, width=width))
    out.seek(0)
    return out.read().splitlines()


def _row(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


def test_the_headline_says_what_is_predicted() -> None:
    """Step, bound, gap, balance, objective, cost model, topology: all numbers by hand."""
    plan = hand_made({"t": table([0])}, [(4, 2, 1, 1), (1, 3, 2, 1)], TWO)
    text = "\n".join(" ".join(line.split()) for line in _shown(plan))
    assert "predicted step 10.000 ms in embedding tables; no plan can take less than 5.000" in text
    assert "(gap 100.0%)" in text
    assert "forward compute 4.000 ms (rank 0), forward comm 3.000 ms (rank 1)" in text
    assert "the slowest device takes 1.067 x the mean" in text
    assert "stages: every stage of a step waits for its slowest device" in text
    assert "by hand, 4,096 rows a step on each rank" in text
    assert "2 devices on one host" in text
    assert plan.fingerprint in text


def test_a_device_s_bar_is_its_stages() -> None:
    """The slowest device fills the width, the others in proportion; memory is beside its limit."""
    plan = hand_made({"t": table([0])}, [(4, 2, 1, 1), (2, 0, 1, 1)], TWO, [2 * GIB, 6 * GIB])
    lines = _shown(plan)
    first, second = _row(lines, "0 "), _row(lines, "1 ")
    assert "█" * 20 + "▓" * 10 + "▒" * 5 + "░" * 5 in first and "8.000" in first
    assert "█" * 10 + "▒" * 5 + "░" * 5 + " " * 20 in second and "4.000" in second
    assert first.endswith("2.0 of 8.0 GiB ██········")
    assert second.endswith("6.0 of 8.0 GiB ████████··")


def test_memory_over_the_limit_is_pointed_out() -> None:
    """It is in words, not only in color; host memory is shown where tables are in it."""
    plan = hand_made({"t": table([0])}, [(1, 1, 1, 1)] * 2, TWO, [GIB, 9 * GIB])
    assert "9.0 of 8.0 GiB, too much" in _row(_shown(plan), "1 ")
    assert not [line for line in _shown(plan) if "Host memory" in line]
    hosts = (HostPlan(host=0, memory_bytes=3 * GIB, memory_limit_bytes=2 * GIB),)
    assert "Host memory: the fullest, host 0, 3.0 of 2.0 GiB, too much" in _shown(
        plan.model_copy(update={"hosts": hosts})
    )


def test_of_many_devices_those_that_matter_are_shown() -> None:
    """The eight slowest, the fastest, the four fullest, and a line about all of them."""
    stages = [(float(rank + 1), 0.0, 0.0, 0.0) for rank in range(20)]
    memory = [(rank % 10 + 1) * GIB // 2 for rank in range(20)]
    lines = _shown(hand_made({"t": table([0])}, stages, TWENTY, memory))
    start = next(i for i, line in enumerate(lines) if line.startswith("slowest  "))
    start = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("slowest  "))
    end = next(i for i, line in enumerate(lines) if line.startswith("All 20 devices"))
    words = [line.split() for line in lines[start:end] if line.strip()]
    ranks = [int(w[1] if w[0] in ("slowest", "fastest", "fullest") else w[0]) for w in words]
    assert ranks == [*range(19, 11, -1), 0, 9, 19, 8, 18]
    assert lines[end] == (
        "All 20 devices: 1.000 to 20.000 ms, mean 10.500; memory 512.0 MiB to 5.0 GiB"
    )


def test_tables_are_listed_the_most_expensive_first() -> None:
    """With sharding type, kernel, ranks, shards, memory and the cost of all shards."""
    tables = {"cheap": table([1], ms=0.5), "dear": table([0, 1], ms=1.25)}
    lines = _shown(hand_made(tables, [(1, 1, 1, 1)] * 2, TWO))
    found = [line.split() for line in lines if line.startswith(("cheap", "dear"))]
    assert found == [
        ["dear", "column_wise", "fused", "all", "2", "2.0", "GiB", "2.500"],
        ["cheap", "table_wise", "fused", "1", "1", "1.0", "GiB", "0.500"],
    ]


def test_of_many_tables_forty_and_a_summary() -> None:
    """41 tables: the cheapest is in the summary by sharding type and kernel alone."""
    tables = {f"t{i}": table([i % 2], ms=float(i + 1)) for i in range(40)}
    tables["wide"] = table([0, 1], ms=100.0)
    lines = _shown(hand_made(tables, [(1, 1, 1, 1)] * 2, TWO))
    assert len([line for line in lines if line.startswith(("t3", "wide"))]) == 12
    assert not [line for line in lines if line.startswith("t0 ")]
    assert "These are the 40 most expensive of 41 tables. All:" in lines
    summary = [line.split() for line in lines[-3:] if line.strip()]
    assert summary == [
        ["table_wise", "fused", "40", "40.0", "GiB", "820.0"],
        ["column_wise", "fused", "1", "2.0", "GiB", "200.0"],
    ]


def test_a_plan_without_costs_has_no_times() -> None:
    """A plan by rule shows where tables are and what they take, and no column of nothing."""
    text = "\n".join(_shown(without_costs()))
    assert " ms" not in text and "forward" not in text and "None" not in text
    assert "66.4 KiB" in text and "row_wise" in text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_a_hundred_columns(width: int) -> None:
    """Long names are folded, whatever the terminal's width."""
    names = {"a" * 300: table([0]), "b" * 50: table([0, 1]), "short": table([1])}
    plans = [
        generated(200, "4x8xA100-80GB"),
        hand_made(names, [(1e4, 2e4, 3e4, 4e4)] * 2, TWO, [10**13] * 2),
        without_costs(),
    ]
    for plan in plans:
        assert max(len(line) for line in _shown(plan, width)) <= min(width, 100)


def test_names_are_text() -> None:
    """A name is neither rich's markup nor a command to the terminal."""
    lines = _shown(without_costs(("[red]x[/red]", "cursor\x1b[2Jup\n")))
    assert _row(lines, "[red]x[/red] ") and _row(lines, "cursor?[2Jup? ")


def test_a_terminal_without_unicode() -> None:
    """The bars are drawn with signs of ASCII."""
    plan = hand_made({"t": table([0])}, [(4, 2, 1, 1), (2, 0, 1, 1)], TWO, [2 * GIB, 6 * GIB])
    text = "\n".join(_shown(plan, encoding="ascii"))
    assert "#" * 20 + "=" * 10 + "+" * 5 + "-" * 5 in text and "##........" in text


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([5, 5, 1], "1, 5"), (range(20), "all"),
        (range(12, 16), "host 3"), ([0, 1, 2, 3, 8, 9, 10, 11], "hosts 0, 2"),
        (range(12), "hosts 0-2"), (range(1, 5), "1-4"), (range(0, 20, 2), "0, 2, 4, ... (10)"),
    ],
)  # fmt: skip
def test_ranks_are_short(ranks: list[int], expected: str) -> None:
    """Whole hosts by their numbers, neighbours as ranges, of many ranges the first."""
    assert compact_ranks(ranks, TWENTY, most=3) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (GIB, "1.0 GiB"), (2**61, "2,048.0 PiB")],
)  # fmt: skip
def test_bytes_have_a_unit(count: int, expected: str) -> None:
    """The largest unit that keeps the number at one or more."""
    assert format_bytes(count) == expected
