"""Trains DreamShard's placement policy on what a profile predicts: no hardware is asked.

    python -m shardemb.profiler.train_policy profile.json --seed 0

gives a profile a policy, or another one; `shardemb profile` trains one at its end.

REINFORCE as published (Zha et al., NeurIPS 2022): Adam with a rate that falls linearly, a weight of
1e-3 on the entropy, and the mean of a task's episodes as their baseline. Other than published, each
batch of tasks has other tables, devices and batch sizes, so that nothing is learned by heart;
advantages are divided by their spread, since tasks differ in how much there is to gain; and rate
and batches are those that did best here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from planner.cli import run, stderr
from planner.cost.features import DREAMSHARD_FEATURES
from planner.cost.fit import SMALLEST_SCALE, linear_layers, mlp, seeded, to_array
from planner.cost.profile import Profile
from planner.search.policy import COSTS, PlacementPolicy
from planner.shards import Floats
from shardemb.profiler.placement_tasks import Played, draw_tasks, play

TABLE_NET, COST_NET = (128, 32), (64, 32)
BATCHES, ROUNDS = 40, 4  # of tasks, and how often each is played
TASKS, EPISODES = 8, 8  # of a batch, and of each task in a round
RATE, ENTROPY_WEIGHT = 2e-2, 1e-3
SMALLEST_SPREAD = 1e-3  # of the steps of a task's episodes, over what an even device takes
SAMPLE = 64  # tasks that features are scaled by


def with_policy(profile: Profile, seed: int) -> Profile:
    """`profile` with a policy; the same profile and seed give the same."""
    return profile.model_copy(update={"policy": train_policy(profile, seed)})


def train_policy(profile: Profile, seed: int) -> PlacementPolicy:
    """For the costs that `profile` predicts; some ten seconds on one core."""
    generator = np.random.default_rng(seed)
    with seeded(seed):
        network = _network(profile, generator)
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
        steps = ROUNDS * BATCHES
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        batches = [draw_tasks(profile, generator, TASKS) for _ in range(BATCHES)]
        for step in range(steps):
            tasks = batches[step % BATCHES]
            played = play(tasks, network.frozen(), EPISODES, generator)
            features = np.repeat(np.stack([task.features for task in tasks]), EPISODES, axis=0)
            optimizer.zero_grad()
            torch.autograd.backward(_loss(network, features, played))
            optimizer.step()
            schedule.step()
    return network.frozen()


def _network(profile: Profile, generator: np.random.Generator) -> PolicyNetwork:
    drawn = [task for _ in range(SAMPLE) for task in draw_tasks(profile, generator, 1)]
    features = np.concatenate([task.features for task in drawn])
    scale = features.std(axis=0)
    return PolicyNetwork(features.mean(axis=0), np.where(scale > SMALLEST_SCALE, scale, 1.0))


def _loss(network: PolicyNetwork, features: Floats, played: Played) -> torch.Tensor:
    """A step of less than its task's mean raises the odds of what was done in its episode."""
    steps = played.step.reshape(-1, EPISODES)
    spread = np.maximum(steps.std(axis=1, keepdims=True), SMALLEST_SPREAD)
    advantage = _tensor(((steps.mean(axis=1, keepdims=True) - steps) / spread).ravel())
    devices = torch.from_numpy(played.devices)
    odds = network(_tensor(features), devices, _tensor(played.costs)).log_softmax(dim=2)
    chosen = odds.gather(2, devices[:, :, None])[:, :, 0]
    entropy = -(odds.exp() * odds).sum(dim=2).mean()
    return -(advantage * chosen.mean(dim=1)).mean() - ENTROPY_WEIGHT * entropy


def _tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(values).to(torch.float32)


class PolicyNetwork(torch.nn.Module):
    """PlacementPolicy as it is trained."""

    def __init__(self, mean: Floats, scale: Floats) -> None:
        super().__init__()
        self.mean, self.scale = _tensor(mean), _tensor(scale)
        self.table = mlp(DREAMSHARD_FEATURES, *TABLE_NET).append(torch.nn.ReLU())
        self.cost = mlp(COSTS, *COST_NET).append(torch.nn.ReLU())
        self.head = torch.nn.Linear(TABLE_NET[-1] + COST_NET[-1], 1, bias=False)

    def forward(
        self, features: torch.Tensor, devices: torch.Tensor, costs: torch.Tensor
    ) -> torch.Tensor:
        """[episodes, tables, devices]: the scores before each table, from `features` [episodes,
        tables, DREAMSHARD_FEATURES] and what was played."""
        of_table, of_cost = self.head.weight[0].split([TABLE_NET[-1], COST_NET[-1]])
        tables, world = costs.shape[1:3]
        worth = self.table((features - self.mean) / self.scale) @ of_table
        placed = torch.nn.functional.one_hot(devices, world) * worth[:, :, None]
        before = placed.cumsum(dim=1) - placed
        return before * (world / tables) + self.cost(costs) @ of_cost

    def frozen(self) -> PlacementPolicy:
        """As it is now, in numpy."""
        return PlacementPolicy(
            mean=to_array(self.mean),
            scale=to_array(self.scale),
            table=linear_layers(self.table),
            cost=linear_layers(self.cost),
            head=to_array(self.head.weight[0]),
        )


def main(
    path: Annotated[Path, typer.Argument(metavar="PROFILE", help="a profile.json, changed")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Give a profile a policy for `plan --search dreamshard`, from its predictions alone."""
    profile = Profile.load(path)
    with stderr.status("training"):
        trained = with_policy(profile, seed)
    trained.save(path)
    print(f"{path}: has a policy of seed {seed}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    run(app)
