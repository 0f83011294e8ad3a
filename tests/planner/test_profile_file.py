"""A profile as a file, and plans made with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import Plan, RequestError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.cost import fit
from planner.cost.calibrate import fit_profile
from planner.cost.features import ShardWork, whole_tables
from planner.cost.learned import LearnedCost
from planner.cost.profile import Profile
from planner.cost.shipped import shipped
from planner.cost.stages import COMPUTE
from planner.hardware import preset
from planner.learned_plan import make_learned_plan, remarks
from planner.make_plan import make_plan
from planner.request import learned_cost
from planner.search.baselines import BASELINES, plan_by_baseline
from planner.shards import TableColumns
from planner.topology import parse_topology

from .commands import MALFORMED, Bench
from .measured import draw_tables, measurements

ON_FOUR = Topology(world_size=4, local_world_size=4, hardware=preset("cpu"))
BATCH_SIZE = 256
SHORT = {"MEMBERS": 2, "STEPS": (300, 300), "HEAD_STEPS": 300, "DREAMSHARD_STEPS": 10}


@pytest.fixture(scope="module")
def profile() -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(fit, name, value)
        return fit_profile(measurements(sets=160))


@pytest.fixture
def saved(profile: Profile, tmp_path: Path) -> Path:
    profile.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_a_profile_comes_back_as_it_was(profile: Profile, saved: Path) -> None:
    """Predictions agree to the six digits that the file holds, and so does what was measured."""
    loaded = Profile.load(saved)
    assert loaded.environment == profile.environment and loaded.summary() == profile.summary()
    work = ShardWork.of_tables(draw_tables(np.random.default_rng(0), 5), 1000)
    owner = np.array([0, 0, 1, 1, 1])
    before, after = (p.compute.estimate(work, owner, 3) for p in (profile, loaded))
    assert after.ms == pytest.approx(before.ms, rel=1e-5)
    assert (before.ms[2] == 0).all()  # a device without shards


def _changed(saved: Path, change: Any) -> Path:
    document = json.loads(saved.read_text())
    change(document)
    saved.write_text(json.dumps(document))
    return saved


MISTAKES = {
    "version 7": lambda d: d.update(version=7),
    "version None": lambda d: d.pop("version"),
    "environment.cores": lambda d: d["environment"].update(cores="two"),
    "compute.network.members.0.forward.weights": lambda d: d["compute"]["network"]["members"][
        0
    ].update(forward={"weights": [1.0], "biases": [0.0]}),
    "communication.all_to_all.margin": lambda d: d["communication"]["all_to_all"].pop("margin"),
    "12 features": lambda d: d["compute"].update(lowest=[0.0]),
    "speed: unknown key": lambda d: d.update(speed=1),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_damaged_profile_is_told_by_its_key(saved: Path, words: str) -> None:
    """The message names the file and what is wrong in it."""
    with pytest.raises(RequestError) as error:
        Profile.load(_changed(saved, MISTAKES[words]))
    assert str(saved) in str(error.value) and words in str(error.value)


def test_files_that_are_no_profiles(tmp_path: Path, saved: Path) -> None:
    """Cut off, empty, another kind, or not there: one message with the path each time."""
    for text in (saved.read_text()[:1000], "", "[]", "{}"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(RequestError, match=r"other\.json is (not )?a profile"):
            Profile.load(tmp_path / "other.json")
    with pytest.raises(RequestError, match="cannot read the profile"):
        Profile.load(tmp_path / "absent.json")


def test_extrapolation_is_told(profile: Profile) -> None:
    """1 within what was measured; a table of a thousand times the rows is far outside."""
    tables = draw_tables(np.random.default_rng(1), 2)
    huge = tables[0].model_copy(update={"num_embeddings": 10**9})
    within, beyond = profile.compute.extrapolated(ShardWork.of_tables((tables[1], huge), 500))
    assert within == 1 and beyond == pytest.approx(1000, rel=0.2)


def test_plans_can_be_made_with_a_profile(profile: Profile) -> None:
    """The bound is one on the sums of the shards' costs; for compute on the prediction too."""
    tables = [
        table.model_copy(update={"name": f"t{i}", "optimizer": "adagrad"})
        for i, table in enumerate(draw_tables(np.random.default_rng(2), 12))
    ]
    model = LearnedCost(profile, BATCH_SIZE)
    plan = make_plan(tables, ON_FOUR, model, BATCH_SIZE)
    predicted = plan.predicted
    assert predicted.bound_ms is not None and predicted.step_ms is not None
    assert 0 < predicted.bound_ms <= predicted.step_ms
    estimate = model.estimate(plan)
    stages = ("forward_compute_ms", "backward_compute_ms")
    summed = np.array([[getattr(device, stage) for stage in stages] for device in plan.devices])
    assert (estimate.compute.ms >= summed - 1e-9).all()
    assert estimate.step_ms > 0 and (estimate.compute.low < estimate.compute.high).all()


def test_costs_are_tangent_to_the_prediction(profile: Profile) -> None:
    """One device with all tables costs, shard by shard, what a kernel of them all takes but for
    what it takes before the first row."""
    tables = draw_tables(np.random.default_rng(3), 6)
    alone = Topology(world_size=1, local_world_size=1, hardware=preset("cpu"))
    shards = whole_tables(TableColumns.of(tables))
    summed = LearnedCost(profile, BATCH_SIZE).stage_costs(shards, alone)[:, COMPUTE].sum(axis=0)
    work = ShardWork.of(shards, alone, BATCH_SIZE)
    whole = profile.compute.estimate(work, np.zeros(6, dtype=int), 1).ms[0]
    heads = [(m.forward.biases.max(), m.backward.biases.max()) for m in _members(profile)]
    assert (summed <= whole).all() and (summed >= whole - np.mean(heads, axis=0)).all()


def _members(profile: Profile) -> Any:
    return profile.compute.network.members


def test_the_plan_is_the_fastest_as_predicted(profile: Profile) -> None:
    """No published rule's plan is predicted to be faster with whole kernels, and the bound is that
    of the search for all of them."""
    tables = [
        table.model_copy(update={"name": f"t{i}", "optimizer": "adagrad"})
        for i, table in enumerate(draw_tables(np.random.default_rng(4), 9))
    ]
    model = LearnedCost(profile, BATCH_SIZE)
    chosen = make_learned_plan(tables, ON_FOUR, model, BATCH_SIZE)
    searched = make_plan(tables, ON_FOUR, model, BATCH_SIZE)
    step_ms = model.estimate(chosen).step_ms
    names = [name for name in BASELINES if name != "all_table_row_wise"]  # there is one host
    rules = [plan_by_baseline(name, tables, ON_FOUR, model, BATCH_SIZE) for name in names]
    assert step_ms <= min(model.estimate(plan).step_ms for plan in (searched, *rules))
    assert chosen.predicted.bound_ms == searched.predicted.bound_ms


def test_what_a_profile_does_not_know_is_told(profile: Profile) -> None:
    """Another kind of device, another number of ranks, tables far outside what was measured."""
    (table,) = draw_tables(np.random.default_rng(5), 1)
    huge = table.model_copy(update={"num_embeddings": 10**8, "optimizer": "adagrad"})
    on_gpus = Topology(world_size=4, local_world_size=4, hardware=preset("H100"))
    model = LearnedCost(profile, BATCH_SIZE)
    text = " ".join(remarks(make_plan([huge], on_gpus, model, BATCH_SIZE), model))
    assert "a machine of the tests" in text and "H100" in text
    assert "extrapolated" in text and "over 2 ranks, the plan has 4" in text
    on_two = Topology(world_size=2, local_world_size=2, hardware=preset("cpu"))
    assert len(remarks(make_plan([table], on_two, model, BATCH_SIZE), model)) == 1


def test_plan_takes_a_profile(profile: Profile, bench: Bench) -> None:
    """As --cost FILE; the plan names it, so that `explain` costs its other options alike."""
    profile.save(bench.folder / "profile.json")
    on_cpus = ("--topology", "1x2xcpu", "--cost", "profile.json")
    made = bench.made("tables.json", *on_cpus, "--out", "plan.json")
    assert "predicted with whole kernels" in bench.plan("tables.json", *on_cpus).err
    assert made["cost_model"] == "profile.json" and made["predicted"]["bound_ms"] > 0
    assert Plan.load(Path("plan.json")).fingerprint == made["fingerprint"]
    assert bench.plan("explain", "plan.json", "users").code == 0
    ended = bench.plan("tables.json", "--topology", "1x2xcpu", "--cost", "absent.json")
    assert ended.code == MALFORMED and "absent.json" in ended.err
    assert "profile" in bench.plan("tables.json", *on_cpus[:2], "--cost", "best").err


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_plan(name: str) -> None:
    """Each loads, says when and where it was measured, and gives more to a device with more."""
    model = learned_cost(name, batch_size=512)
    assert model.profile.environment.date
    assert model.profile.compute.measured > 500
    table = TableSpec(name="t", num_embeddings=100_000, embedding_dim=32, pooling_factor=5)
    topology = parse_topology("1x2xcpu")
    rule = ShardingRule(sharding_type="table_wise")
    one = model.estimate(plan_by_rule([table], topology, rule))
    both = [table, table.model_copy(update={"name": "u"})]
    same = ShardingRule(sharding_type="table_wise", ranks=(0,))
    two = model.estimate(plan_by_rule(both, topology, same))
    assert 0 < one.step_ms < two.step_ms
    assert one.extrapolated == 1
