"""`shardemb profile` as a user runs it: a short run with every part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cost.profile import Profile
from shardemb.profiler.samples import read_measurements
from tests.launch.tiny_run import make_data, shardemb, tiny_config, write_config

MEASURED = {"all_to_all", "reduce_scatter", "all_gather", "all_reduce"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of eighteen seconds; of more on a busy machine, where so long is too short."""
    out = tmp_path_factory.mktemp("profile") / "new"
    for _ in range(5):
        ended = shardemb("profile", "--minutes", "0.3", "--out", out, "--json")
        if ended.returncode == 0:
            break
        assert "too few measurements" in ended.stderr
        assert "measure longer: what is there is kept" in ended.stderr
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["profile"] == str(out / "profile.json")
    assert document["fitted"].keys() >= MEASURED
    return out


def test_a_profile_is_of_this_machine(folder: Path) -> None:
    """It says where it was measured, and predicts what was measured there better than by chance."""
    profile, measured = Profile.load(folder / "profile.json"), read_measurements(folder)
    assert profile.environment == measured.environment
    assert profile.compute.measured == len(measured.kernels) > 20
    assert profile.communication.keys() == MEASURED
    assert {times.world_size for times in profile.communication.values()} == {2}


@pytest.mark.slow
def test_measurements_can_be_fitted_again(folder: Path) -> None:
    """Without new ones the same seed gives the same profile; without --json people can read it."""
    before = (folder / "profile.json").read_text()
    again = shardemb("profile", "--minutes", "0", "--out", folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "profile.json").read_text() == before
    assert "forward_compute" in again.stdout and "measuring" not in again.stderr


def test_plan_takes_it(folder: Path, tmp_path: Path) -> None:
    """--cost names the file."""
    table = {"name": "t", "num_embeddings": 1000, "embedding_dim": 8, "pooling_factor": 2}
    (tmp_path / "tables.json").write_text(json.dumps({"tables": [table]}))
    arguments = ("--topology", "1x2xcpu", "--batch-size", "64", "--json")
    ended = shardemb(
        "plan", tmp_path / "tables.json", *arguments, "--cost", folder / "profile.json"
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["predicted"]["step_ms"] > 0


def test_a_run_takes_it(folder: Path, tmp_path: Path) -> None:
    """`sharding.cost` names it: `shardemb plan` and `shardemb train` make the same plan of it."""
    config = tiny_config(make_data(tmp_path / "data"), tmp_path / "run")
    profile = folder / "profile.json"
    config["sharding"] = {"default": "auto", "cost": str(profile), "hardware": "cpu"}
    path = write_config(tmp_path / "run.yaml", config)
    planned = shardemb("plan", path, "--json")
    assert planned.returncode == 0, planned.stderr
    assert "predicted with whole kernels" in planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["cost_model"] == str(profile)
    trained = shardemb("train", path, "train.max_steps=2", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["plan_fingerprint"] == plan["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--minutes", "-1"), "--minutes"),
        (("--minutes", "soon"), "--minutes"),
        (("--minutes", "inf"), "--minutes inf"),
        (("--nproc", "0"), "--nproc"),
        (("--out", "/dev/null/profile"), "--out /dev/null/profile"),
        (("--minutes", "0", "--out", "empty"), "no measurements"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that names the option, exit code 2, and no traceback."""
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    ended = shardemb("profile", *arguments)
    assert ended.returncode == 2 and words in ended.stderr
    assert "Traceback" not in ended.stderr
