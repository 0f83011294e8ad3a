"""Plans beside what they take: `shardemb plan --verify`, result.json and `profile update`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import Plan, RequestError
from planner.comparison import Comparison, predicted_stages
from planner.cost.stages import STAGES
from shardemb.profiler.environment import this_environment
from shardemb.profiler.runs import add_runs
from shardemb.profiler.samples import read_measurements
from shardemb.profiler.store import Store
from tests.launch.tiny_run import make_data, shardemb, tiny_config, write_config

TABLES = [
    {"name": "a", "num_embeddings": 5000, "embedding_dim": 16, "pooling_factor": 5},
    {"name": "b", "num_embeddings": 9000, "embedding_dim": 32, "pooling_factor": 2},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of 40 steps, with the planner's predictions."""
    folder = tmp_path_factory.mktemp("verified")
    config = tiny_config(make_data(folder / "data", train_rows=5200), folder / "run")
    config["sharding"] = {"default": "auto", "cost": "cpu-2core", "hardware": "cpu"}
    ended = shardemb("train", write_config(folder / "run.yaml", config))
    assert ended.returncode == 0, ended.stderr
    assert "embeddings" in ended.stdout and "predicted" in ended.stdout
    return folder / "run"


def result(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())


def step_of(stages: dict[str, list[float]]) -> float:
    """Every stage waits for its slowest rank."""
    return sum(max(stages[name]) for name in STAGES)


def test_verify_runs_the_plan(tmp_path: Path) -> None:
    """On two ranks: the plan as it is printed without, and both times of each stage and rank."""
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"batch_size_per_rank": 64, "tables": TABLES}))
    options = ("--topology", "1x2xcpu", "--cost", "cpu-2core")
    ended = shardemb("plan", path, *options, "--verify", "--html", tmp_path / "p.html", "--json")
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    made = json.loads(shardemb("plan", path, *options, "--json").stdout)
    assert document["plan"]["fingerprint"] == made["fingerprint"]
    assert (tmp_path / "p.html").exists()
    verified = document["verified"]
    for times in (verified["measured"], verified["predicted"]):
        assert [len(times[name]) for name in STAGES] == [2] * 4
        assert min(map(min, times.values())) >= 0
    assert verified["step_ms"] == pytest.approx(step_of(verified["measured"]))
    assert verified["predicted_step_ms"] == pytest.approx(step_of(verified["predicted"]))
    assert verified["unbroken_step_ms"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--topology", "1x4xA100-80GB"), "this machine has 0 GPUs"),
        (("--topology", "2x2xcpu"), "the plan is for 2 hosts and 4 devices (cpu)"),
        (("--topology", "1x512xcpu"), "512 devices"),
    ],
)
def test_verify_says_what_it_cannot_run(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"batch_size_per_rank": 64, "tables": TABLES}))
    ended = shardemb("plan", path, *options, "--verify", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2 and words in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_run_says_what_its_embeddings_took(run: Path) -> None:
    """Of 20 steps, beside what its plan predicts; a shorter run has nothing to say."""
    found = result(run)["embeddings"]
    assert found["steps"] == 20
    assert found["step_ms"] == pytest.approx(step_of(found["measured"]))
    plan = Plan.load(run / "plan.json")
    predicted = predicted_stages(plan)
    assert predicted is not None
    assert [found["predicted"][name] for name in STAGES] == predicted.T.tolist()
    whole_step = 1000 * 128 / result(run)["samples_per_second"]
    assert 0 < found["step_ms"] < 2 * whole_step


def test_predictions_are_those_of_the_plan() -> None:
    """A plan of rules predicts nothing; steps are sums of the slowest stages."""
    measured = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 5.0, 1.0]])
    found = Comparison(measured, None, 20.0).to_dict()
    assert found["step_ms"] == 2 + 2 + 5 + 4 and found["unbroken_step_ms"] == 20
    assert found["predicted"] is None and found["predicted_step_ms"] is None


@pytest.fixture
def measured(tmp_path: Path, run: Path) -> Path:
    """A folder with a measurement of the machine that the run was on."""
    environment = this_environment_of(run)
    store = Store(tmp_path, "device", environment)
    quality = {"repetitions": 9, "spread": 0.0, "outliers": 0, "is_noisy": False}
    store.append({"kind": "kernel", "dtype": "fp32", "optimizer": "sgd", "tables": [], **quality})
    store.flush()
    return tmp_path


def this_environment_of(run: Path) -> Any:
    import torch

    fields = result(run)["embeddings"]["environment"]
    return this_environment(torch.device("cpu")).model_copy(update=fields)


def test_runs_become_measurements(measured: Path, run: Path) -> None:
    """Once, however often they are added: the plan with its batch size, and each rank's stages."""
    assert add_runs(measured, [run]) == 1
    assert add_runs(measured, [run]) == 0
    (sample,) = read_measurements(measured).plans
    assert sample.plan.tables == Plan.load(run / "plan.json").tables
    assert sample.plan.batch_size == 64
    found = result(run)["embeddings"]["measured"]
    assert sample.stages.T.tolist() == [found[name] for name in STAGES]


def changed(run: Path, to: Path, change: Any) -> Path:
    shutil.copytree(run, to)
    document = result(run)
    change(document)
    (to / "result.json").write_text(json.dumps(document))
    return to


def test_runs_that_cannot_be_added_are_named(measured: Path, run: Path, tmp_path: Path) -> None:
    """And then nothing is added."""
    short = changed(run, tmp_path / "short", lambda r: r.update(embeddings=None))
    other = changed(
        run, tmp_path / "other", lambda r: r["embeddings"]["environment"].update(torch="1")
    )
    old = changed(run, tmp_path / "old", lambda r: r["embeddings"].pop("measured"))
    for broken, words in ((short, "too short"), (other, "torch 1"), (old, "not of this version")):
        with pytest.raises(RequestError, match=rf"{broken.name}(.|\n)*{words}"):
            add_runs(measured, [run, broken])
    with pytest.raises(RequestError, match="cannot read"):
        add_runs(measured, [tmp_path / "absent"])
    assert read_measurements(measured).plans == ()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RequestError, match="shardemb profile --out"):
        add_runs(empty, [run])


def test_update_is_a_command(run: Path, tmp_path: Path) -> None:
    """It names the folder that has no measurements."""
    ended = shardemb("profile", "update", run, "--out", tmp_path)
    assert ended.returncode == 2 and "holds no measurements" in ended.stderr
