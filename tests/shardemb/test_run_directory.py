"""Runs never mix: one directory each, locked while it is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from planner import ShardingRule, Topology, UserError, plan_by_rule
from shardemb.config import RunConfig
from shardemb.run_directory import RunDirectory, close_failed, without_nan
from shardemb.summary import summarize


def make_run(output: Path, seed: int = 0) -> RunDirectory:
    config = RunConfig.model_validate(
        {
            "seed": seed,
            "output": str(output),
            "data": {"dir": "data"},
            "tables": {"a": {"num_embeddings": 4, "embedding_dim": 4}},
        }
    )
    topology = Topology(world_size=1, local_world_size=1)
    rule = ShardingRule(sharding_type="table_wise")
    return RunDirectory(config, plan_by_rule(config.table_specs(), topology, rule))


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    """A second run neither starts in, nor moves, a directory that a first one writes."""
    output = tmp_path / "run"
    waiting = make_run(output, seed=2)
    first = make_run(output, seed=1)
    first.create()
    with pytest.raises(UserError, match="another run is writing"):
        make_run(output)
    with pytest.raises(UserError, match="another run is writing"):
        waiting.create()
    assert "seed: 1" in (output / "config.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    os.close(first._lock)
    waiting.create()
    assert "seed: 2" in (output / "config.yaml").read_text()
    assert "seed: 1" in (tmp_path / "run.1" / "config.yaml").read_text()


def test_metrics_that_are_no_numbers() -> None:
    """NaN and infinities are null in JSON and `undefined` to read."""
    nan, inf = float("nan"), float("inf")
    assert without_nan({"a": nan, "b": {"c": -inf, "d": 1.5}}) == {
        "a": None,
        "b": {"c": None, "d": 1.5},
    }
    config = make_run(Path("somewhere"))._config
    result = {"steps": 1, "samples_per_second": 2.0, "eval": {"auc": None, "logloss": None}}
    assert "test AUC undefined, log loss undefined" in summarize(config, result)


@pytest.mark.parametrize("failing", ["rename", "write_text"])
def test_a_failure_keeps_the_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Whether moving the earlier run or writing the new one fails, the earlier is where it was."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("earlier")
    run = make_run(output)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, fail)
        with pytest.raises(UserError, match="No space left"):
            run.create()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (output / "config.yaml").read_text() == "earlier"


def created(output: Path, steps: int) -> RunDirectory:
    """A run that has reported `steps` steps, and was killed while it wrote two files."""
    run = make_run(output)
    run.create()
    lines = [json.dumps({"kind": "train", "step": 10 * (i + 1)}) + "\n" for i in range(steps)]
    (output / "metrics.jsonl").write_text("".join(lines) + '{"kind": "tra')
    (output / "result.json.partial").write_text("{")
    return run


def test_a_failed_run_keeps_what_it_has_told(tmp_path: Path) -> None:
    """failure.json has the error and the last step; nothing half-written stays."""
    output = tmp_path / "run"
    run = created(output, steps=2)
    close_failed(run._created, "the cause")
    names = {path.name for path in output.iterdir()}
    assert names == {"config.yaml", "plan.json", "metrics.jsonl", "failure.json"}
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert steps == [10, 20]
    assert json.loads((output / "failure.json").read_text()) == {"error": "the cause", "step": 20}
    os.close(run._lock)
    make_run(output).create()
    assert not (output / "failure.json").exists()
    assert (tmp_path / "run.1" / "failure.json").exists()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_failed_run_with_nothing_to_tell_leaves_all_as_it_was(tmp_path: Path, steps: int) -> None:
    """Its directory goes, and the earlier run gets its name back."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("earlier")
    run = created(output, steps)
    close_failed(run._created, "the cause")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name: path.read_text() for path in output.iterdir()} == {"config.yaml": "earlier"}


@pytest.mark.parametrize("steps", [1, 2])
def test_only_the_failed_run_is_touched(tmp_path: Path, steps: int) -> None:
    """A directory that has come to its place since, or a finished run, stays as it is."""
    output = tmp_path / "run"
    run = created(output, steps)
    output.rename(tmp_path / "elsewhere")
    close_failed(run._created, "the cause")  # there is nothing at its place
    shutil.copytree(tmp_path / "elsewhere", output)
    before = sorted(path.name for path in output.iterdir())
    close_failed(run._created, "the cause")
    assert sorted(path.name for path in output.iterdir()) == before

    finished = created(tmp_path / "finished", steps)
    finished.write_result({"steps": steps})
    before = sorted(path.name for path in finished.path.iterdir())
    close_failed(finished._created, "the cause")
    assert sorted(path.name for path in finished.path.iterdir()) == before
