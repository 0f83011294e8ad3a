"""Training of the placement policy: what it is trained on, that it learns, and does so again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planner import ShardingRule, plan_by_rule
from planner.cost.profile import Profile
from planner.cost.shipped import shipped
from planner.tables import TableSpec
from shardemb.profiler import placement_tasks, train_policy
from shardemb.profiler.placement_tasks import PlacementTask, draw_tasks, play
from shardemb.profiler.train_policy import PolicyNetwork, with_policy


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load(shipped()["cpu-2core"])


def _network(seed: int) -> PolicyNetwork:
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    return PolicyNetwork(generator.normal(size=21), generator.uniform(0.5, 2, 21))


def test_the_plan_uses_the_network_that_was_trained(profile: Profile) -> None:
    """In numpy, table after table, the same scores as torch's network gives for whole episodes."""
    network, generator = _network(0), np.random.default_rng(0)
    policy = network.frozen()
    tasks = draw_tasks(profile, generator, 3)
    played = play(tasks, policy, 2, generator)
    features = np.repeat(np.stack([task.features for task in tasks]), 2, axis=0)
    with torch.no_grad():
        expected = network(
            torch.tensor(features, dtype=torch.float32),
            torch.tensor(played.devices),
            torch.tensor(played.costs, dtype=torch.float32),
        ).numpy()
    episodes, tables, devices = expected.shape
    worth = policy.worth(features) * devices / tables
    sums = np.zeros((episodes, devices))
    for table in range(tables):
        found = policy.score(sums, played.costs[:, table])
        assert found == pytest.approx(expected[:, table], rel=1e-4, abs=1e-4)
        sums[np.arange(episodes), played.devices[:, table]] += worth[:, table]


def test_a_saved_policy_is_the_same(profile: Profile, tmp_path: Path) -> None:
    """To the seven digits of the file."""
    policy = _network(1).frozen()
    profile.model_copy(update={"policy": policy}).save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json").policy
    assert loaded is not None
    features, costs = np.random.default_rng(0).normal(size=(5, 21)), np.ones((5, 6))
    for before, after in (
        (policy.worth(features), loaded.worth(features)),
        (policy.score(np.zeros(5), costs), loaded.score(np.zeros(5), costs)),
    ):
        assert after == pytest.approx(before, rel=1e-5)


def test_episodes_are_judged_as_plans_are(profile: Profile) -> None:
    """The step of an episode is what the profile predicts for the plan with its placements, in one
    host and in two."""
    hosts = set()
    for seed in range(6):
        generator = np.random.default_rng(seed)
        tasks = draw_tasks(profile, generator, 2)
        played = play(tasks, _network(0).frozen(), 3, generator)
        hosts.add(tasks[0].topology.num_hosts)
        for number, task in enumerate(tasks):
            ratios = []
            for episode in range(3 * number, 3 * number + 3):
                plan = _plan(task, played.devices[episode])
                ratios.append(task.model.estimate(plan).step_ms / played.step[episode])
            assert ratios == pytest.approx([ratios[0]] * 3)  # an even device's ms
    assert hosts == {1, 2}


def _plan(task: PlacementTask, devices: np.ndarray) -> object:
    """Whole tables on these devices, made without the policy's code."""
    columns, numbers = task.shards.tables, task.shards.table
    names = ("sgd", "adagrad", "rowwise_adagrad")
    tables = [
        TableSpec(
            name=f"t{i}",
            num_embeddings=int(columns.num_embeddings[number]),
            embedding_dim=int(columns.embedding_dim[number]),
            pooling_factor=float(columns.pooling_factor[number]),
            dtype={4: "fp32", 2: "fp16"}[int(columns.element_bytes[number])],
            optimizer=names[int(columns.optimizer[number])],
            reuse_histogram=tuple(columns.reuse_histogram[number]),
        )
        for i, number in enumerate(numbers)
    ]
    rules = {
        table.name: ShardingRule(sharding_type="table_wise", ranks=(int(rank),))
        for table, rank in zip(tables, devices, strict=True)
    }
    return plan_by_rule(tables, task.topology, rules["t0"], rules)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of seconds: few batches, small tasks."""
    monkeypatch.setattr(train_policy, "BATCHES", 10)
    monkeypatch.setattr(placement_tasks, "DEVICES", (2, 5))
    monkeypatch.setattr(placement_tasks, "TABLES_A_DEVICE", (2.0, 5.0))


class LeastLoaded:
    """Each table to the device that is predicted to be done first then."""

    def worth(self, features: np.ndarray) -> np.ndarray:
        return np.zeros(len(features))

    def score(self, worth: np.ndarray, costs: np.ndarray) -> np.ndarray:
        return -costs[..., :3].sum(axis=-1)


@pytest.mark.usefixtures("_short")
def test_it_learns(profile: Profile) -> None:
    """On tasks that no training has seen, a training of seconds closes nine tenths of the distance
    between random devices and the least loaded ones. The same seed gives the same policy."""
    trained, again = (with_policy(profile, 3).policy for _ in range(2))
    assert trained is not None and again is not None
    assert trained.model_dump_json() == again.model_dump_json()
    generator = np.random.default_rng(1234)
    batches = [draw_tasks(profile, generator, 8) for _ in range(10)]

    def mean_step(policy: Any, draws: np.random.Generator | None = None) -> float:
        return float(np.mean([play(tasks, policy, 1, draws).step.mean() for tasks in batches]))

    random = mean_step(trained.model_copy(update={"head": np.zeros_like(trained.head)}), generator)
    learned, least = mean_step(trained), mean_step(LeastLoaded())
    assert random - learned > 0.9 * (random - least)


def test_a_profile_gets_a_policy(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command needs the profile alone, and changes nothing else in it."""
    monkeypatch.setattr(train_policy, "BATCHES", 2)
    path, before = tmp_path / "profile.json", profile.model_copy(update={"policy": None})
    before.save(path)
    assert "policy" not in json.loads(path.read_text())
    train_policy.main(path, seed=1)
    after = Profile.load(path)
    assert after.policy is not None
    assert after.model_copy(update={"policy": None}).model_dump_json() == before.model_dump_json()
