"""What changed between two plans."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from planner import Plan, Topology
from planner.diff import compare

from .commands import Bench
from .example_plans import GIB, hand_made, table

TWO = Topology(world_size=2, local_world_size=2)
STAGES = [(1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 1.0, 1.0)]


def made(ranks: dict[str, list[int]], **changes: Any) -> Plan:
    plan = hand_made({name: table(on, name=name) for name, on in ranks.items()}, STAGES, TWO)
    return plan.model_copy(update=changes)


def test_equal_plans() -> None:
    """A plan differs from itself in nothing, and from one made in another time in nothing."""
    plan = made({"a": [0], "b": [1]})
    later = plan.model_copy(update={"seconds": plan.seconds.model_copy(update={"search": 9.0})})
    assert compare(plan, later).is_empty


def test_a_table_elsewhere() -> None:
    """Only the table that moved is named, with both places."""
    difference = compare(made({"a": [0], "b": [1]}), made({"a": [0], "b": [0]}))
    assert difference.tables.keys() == {"b"}
    assert {k: asdict(v) for k, v in difference.tables["b"].items()} == {
        "ranks": {"before": "1", "after": "0"}
    }


def test_a_table_sharded_otherwise() -> None:
    """Type, kernel, shards and ranks are told apart."""
    before, after = made({"a": [0]}), made({"a": [0, 1]})
    assert compare(before, after).tables["a"].keys() == {
        "table", "sharding_type", "shards", "ranks",
    }  # fmt: skip
    cached = {"compute_kernel": "fused_uvm_caching", "cache_load_factor": 0.2}
    tables = {"a": before.tables["a"].model_copy(update=cached)}
    kernel = compare(before, made({"a": [0]}, tables=tables)).tables["a"]["compute_kernel"]
    assert (kernel.before, kernel.after) == ("fused", "fused_uvm_caching 20%")


def test_tables_of_one_plan_alone() -> None:
    """They are listed on their side."""
    difference = compare(made({"a": [0], "b": [1]}), made({"a": [0], "c": [1]}))
    assert (difference.only_before, difference.only_after) == (("b",), ("c",))
    assert difference.tables == {}


def test_what_was_planned_for() -> None:
    """Batch size, objective, cost model and topology are compared, and what is predicted."""
    one = Topology(world_size=2, local_world_size=1)
    after = made({"a": [0]}, batch_size=8, objective="max_total", cost_model="x", topology=one)
    assert compare(made({"a": [0]}), after).settings.keys() == {
        "batch_size", "objective", "cost_model", "devices_per_host",
    }  # fmt: skip


def test_devices_and_the_step() -> None:
    """Devices whose cost or memory changed, with both; rounding of sums is no change."""
    tables = {"a": table([0])}
    before = hand_made(tables, STAGES, TWO)
    rounded = [(1.0 + 1e-15, 1.0, 1.0, 1.0), STAGES[1]]
    assert compare(before, hand_made(tables, rounded, TWO)).is_empty
    slower = hand_made(tables, [STAGES[0], (4.0, 1.0, 1.0, 1.0)], TWO, [GIB, 3 * GIB])
    difference = compare(before, slower)
    assert [device.rank for device in difference.devices] == [1]
    changed = difference.devices[0]
    assert (changed.total_ms.before, changed.total_ms.after) == (5.0, 7.0)
    assert changed.memory_bytes.after == 3 * GIB
    assert difference.predicted["step_ms"].before == 5.0
    assert difference.predicted["step_ms"].after == 7.0


@pytest.mark.parametrize("names", [["a.json", "a.json"], ["a.json", "b.json"]])
def test_the_command(bench: Bench, names: list[str]) -> None:
    """It ends well whether or not something changed."""
    bench.plan("tables.json", "--topology", "1x4xH100", "--out", "a.json")
    bench.plan("tables.json", "--topology", "1x4xH200", "--search", "random", "--out", "b.json")
    ended = bench.plan("diff", *names)
    assert (ended.code, ended.err) == (0, "")
    document = bench.made("diff", *names)
    assert document["different"] == (names[0] != names[1])
    if document["different"]:
        assert "H200" in ended.out and "tables changed:" in ended.out
    else:
        assert ended.out == "no difference\n"
