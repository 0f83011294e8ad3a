from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from planner import Plan, PlannerError, RequestError, ShardingRule, TableSpec, Topology
from planner.plan import Seconds
from planner.rules import plan_by_rule

TABLES = [
    TableSpec(name="a", num_embeddings=100, embedding_dim=8),
    TableSpec(name="b", num_embeddings=7, embedding_dim=4),
]
TWO = Topology(world_size=2, local_world_size=2)


def _plan(topology: Topology = TWO, kind: str = "column_wise") -> Plan:
    rule = ShardingRule.model_validate({"sharding_type": kind})
    return plan_by_rule(TABLES, topology, rule)


def test_a_saved_plan_comes_back(tmp_path: Path):
    """load(save(plan)) is the plan, fingerprint included."""
    plan, path = _plan(), tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(path).fingerprint == plan.fingerprint


def test_the_keys_of_the_file():
    """plan.json has the keys that other programs rely on, in this order, all of them always."""
    document = json.loads(_plan().to_json())
    assert list(document) == [
        "version", "fingerprint", "objective", "cost_model", "batch_size", "topology",
        "predicted", "devices", "hosts", "tables", "seconds",
    ]  # fmt: skip
    assert list(document["topology"]) == ["world_size", "local_world_size"]
    assert list(document["predicted"]) == ["step_ms", "bound_ms", "gap_percent", "max_over_mean"]
    assert list(document["seconds"]) == ["options", "cost", "search"]
    assert list(document["devices"][0]) == [
        "rank", "forward_compute_ms", "forward_comm_ms", "backward_compute_ms",
        "backward_comm_ms", "total_ms", "memory_bytes", "memory_limit_bytes",
    ]  # fmt: skip
    assert list(document["tables"]) == ["a", "b"]
    assert list(document["tables"]["a"]) == [
        "sharding_type", "compute_kernel", "cache_load_factor", "shards", "spec", "constraint",
        "reason",
    ]  # fmt: skip
    assert list(document["tables"]["a"]["shards"][0]) == [
        "rank", "row_offset", "rows", "column_offset", "columns", "cost_ms", "memory_bytes",
        "host_memory_bytes",
    ]  # fmt: skip


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every number, text and null in a JSON document."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    return [path]


def _changed(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy with another valid value at `path`."""
    copy = json.loads(json.dumps(document))
    target = copy
    for key in path[:-1]:
        target = target[key]
    value = target[path[-1]]
    other: Any = {
        "sharding_type": "row_wise",
        "compute_kernel": "dense",
        "objective": "stages",
        "world_size": 4,
        "local_world_size": 1,
    }.get(path[-1], 1 if value is None else value + 1 if isinstance(value, int | float) else "x")
    target[path[-1]] = other
    return copy


def test_any_change_of_the_file_is_noticed(tmp_path: Path):
    """Whatever single value is edited, `seconds` apart, the file is refused; seconds may change."""
    document, path = json.loads(_plan().to_json()), tmp_path / "plan.json"
    leaves = _leaves(document)
    assert len(leaves) > 40
    for leaf in leaves:
        path.write_text(json.dumps(_changed(document, leaf)))
        if leaf[0] == "seconds":
            assert Plan.load(path).fingerprint == document["fingerprint"]
        else:
            edited = "(was changed after it was made|is not a plan)"
            expected = "of version 2" if leaf == ("version",) else edited
            with pytest.raises(RequestError, match=f"{path}.*{expected}"):
                Plan.load(path)


def test_the_fingerprint_names_decisions_not_time():
    """Equal plans have equal fingerprints whatever they took; tables, types and ranks count."""
    plan = _plan()
    slower = plan.model_copy(update={"seconds": Seconds(search=9.5)})
    assert plan.fingerprint == slower.fingerprint == _plan().fingerprint
    others = [
        _plan(kind="row_wise"),
        _plan(Topology(world_size=2, local_world_size=1)),
        plan_by_rule(TABLES[:1], TWO, ShardingRule(sharding_type="column_wise")),
        plan_by_rule(TABLES, TWO, ShardingRule(sharding_type="table_wise", ranks=(0,))),
        plan_by_rule(TABLES, TWO, ShardingRule(sharding_type="table_wise", ranks=(1,))),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a plan: Expecting value"),
        (b"not json", "is not a plan: Expecting value"),
        (b"\xff\xfe\x00", "is not a plan: .*utf-8"),
        (b"[]", "is not a plan: it has no fingerprint"),
        (b"null", "is not a plan: it has no fingerprint"),
        (b"{}", "is not a plan: it has no fingerprint"),
        (b'{"fingerprint": "x"}', "is a plan of version None; this shardemb reads version 1"),
        (b'{"fingerprint": "x", "version": 2}', "is a plan of version 2; .* make the plan anew"),
        (b'{"fingerprint": "x", "version": 1}', "is not a plan: topology: Field required"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes, message: str):
    """One message with the path and what is wrong, whatever the file holds."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=f"{path} {message}"):
        Plan.load(path)


def test_every_truncation_is_refused(tmp_path: Path):
    """A plan cut anywhere is no plan."""
    text, path = _plan().to_json(), tmp_path / "plan.json"
    for length in range(0, len(text.rstrip()), 7):
        path.write_text(text[:length])
        with pytest.raises(RequestError, match=f"{path} is not a plan"):
            Plan.load(path)


def test_a_table_without_shards_is_refused(tmp_path: Path):
    """Fields that no plan can have are named by their place in the file."""
    document, path = json.loads(_plan().to_json()), tmp_path / "plan.json"
    document["tables"]["a"]["shards"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(RequestError, match=r"tables\.a\.shards: "):
        Plan.load(path)


def test_a_missing_plan_is_told(tmp_path: Path):
    """The message has the path and the system's reason; a folder is no plan either."""
    with pytest.raises(RequestError, match=rf"{tmp_path}/plan\.json: No such file"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(RequestError, match=rf"{tmp_path}: Is a directory"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_failed_save_leaves_the_old_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    """A full disk while writing, or while moving into place, changes nothing and leaves nothing."""
    path = tmp_path / "plan.json"
    old = _plan()
    old.save(path)

    def write_half(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text[: len(text) // 2].encode(encoding))
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(Path, "write_text", write_half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PlannerError, match=f"cannot write the plan {path}: No space left"):
        _plan(kind="row_wise").save(path)
    assert Plan.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["absent/plan.json", "file/plan.json", "folder"])
def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, name: str):
    """No such folder, a file instead of a folder, a folder instead of a file: one message each."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlannerError, match=f"cannot write the plan {tmp_path}/{name}: "):
        _plan().save(tmp_path / name)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("topology", "has"),
    [
        (Topology(world_size=4, local_world_size=4), "the run has 4 devices, 4 a host"),
        (Topology(world_size=2, local_world_size=1), "the run has 2 devices, 1 a host"),
    ],
)
def test_a_plan_for_other_devices_does_not_fit(topology: Topology, has: str):
    """The message says what the plan is for and what the run has."""
    with pytest.raises(PlannerError, match=f"the plan is for 2 devices, 2 a host, {has}"):
        _plan().check_fits(TABLES, topology)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_a_plan_fits_what_it_was_made_for(kind: str):
    """Tables' sizes are recovered from their shards for every type, in any order of tables."""
    _plan(kind=kind).check_fits(reversed(TABLES), TWO)


def test_other_tables_do_not_fit():
    """Each table that is missing, unknown or of another shape is named, with both shapes."""
    tables = [
        TableSpec(name="a", num_embeddings=101, embedding_dim=16),
        TableSpec(name="c", num_embeddings=7, embedding_dim=4),
    ]
    with pytest.raises(PlannerError) as caught:
        _plan().check_fits(tables, TWO)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:-1] == [
        "table a is 100 x 8 in the plan, 101 x 16 in the run",
        "table c is not in the plan",
        "the plan has table b, the run has not",
    ]


def test_a_long_list_of_problems_is_cut():
    """Ten are shown, the rest counted."""
    tables = [TableSpec(name=f"t{i}", num_embeddings=1, embedding_dim=4) for i in range(30)]
    with pytest.raises(PlannerError, match=r"\.\.\. and 22 more") as caught:
        _plan().check_fits(tables, TWO)
    assert len(str(caught.value).splitlines()) == 13
