"""Fits the networks of learned costs; the one user of torch here, inside the functions that fit.

The same measurements and seed give the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.cost.networks import ConvexHead, DreamShardNetwork, Ensemble, Linear, SetNetwork
from planner.shards import Floats, Ints

if TYPE_CHECKING:
    import torch

MEMBERS, WIDTH, HIDDEN, PIECES = 8, 8, 32, 3
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 4e-3, 0.02
EPOCHS, STEPS = 150, (600, 6000)  # passes over all sets, but no fewer and no more steps
HUBER = 0.05  # log errors below count by their square: 5%, about what repetitions scatter
SMALLEST_SCALE = 1e-6  # of a feature that differs at all
HEAD_STEPS, HEAD_RATE = 2000, 0.03

# As published: ten rounds of 300 steps of batch 64, Adam at 5e-4 decayed linearly.
DREAMSHARD_STEPS, DREAMSHARD_BATCH, DREAMSHARD_RATE = 3000, 64, 5e-4
DREAMSHARD_TABLE, DREAMSHARD_HEAD = (128, 32), 64


@dataclass(frozen=True)
class Sets:
    """Sets of shards, one after the other, and the times of each."""

    features: Floats  # [shards, features]
    counts: Ints  # [sets]: shards of each
    times: Floats  # [sets, stages] ms

    @property
    def owner(self) -> Ints:
        """[shards]: the set of each."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def fit_ensemble(sets: Sets, seed: int) -> Ensemble:
    """Ours, to the logarithms of forward and backward ms."""
    members = [_fit_set_network(sets, seed * MEMBERS + number) for number in range(MEMBERS)]
    return Ensemble(members=tuple(members))


def _fit_set_network(sets: Sets, seed: int) -> SetNetwork:
    import torch

    mean, scale = sets.features.mean(axis=0), sets.features.std(axis=0)
    scale = np.where(scale > SMALLEST_SCALE, scale, 1.0)
    normal = replace(sets, features=(sets.features - mean) / scale)
    inputs = normal.features.shape[1]
    with seeded(seed):
        bent, straight = mlp(inputs, HIDDEN, HIDDEN, WIDTH), torch.nn.Linear(inputs, WIDTH)
        typical = torch.tensor(np.log(np.median(sets.times, axis=0)), dtype=torch.float32)
        # Logarithms of weights [stages, pieces, width] and of biases [stages, pieces].
        weights = torch.nn.Parameter(torch.randn(2, PIECES, WIDTH) + typical[:, None, None] - 4)
        biases = torch.nn.Parameter(torch.randn(2, PIECES) + typical[:, None] - 2)
        log_times = torch.tensor(np.log(sets.times), dtype=torch.float32)

        def loss(features: torch.Tensor, owner: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            added = torch.exp(bent(features) + straight(features))
            sums = added.new_zeros(len(chosen), WIDTH).index_add(0, owner, added)
            pieces = torch.einsum("nw,spw->nsp", sums, weights.exp()) + biases.exp()
            return torch.nn.functional.smooth_l1_loss(
                pieces.amax(dim=2).log(), log_times[chosen], beta=HUBER
            )

        parameters = [*bent.parameters(), *straight.parameters(), weights, biases]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = int(np.clip(EPOCHS * len(sets.counts) / BATCH, *STEPS))
        _minimize(normal, loss, optimizer, steps, BATCH, seed)
    return SetNetwork(
        mean=mean,
        scale=scale,
        bent=linear_layers(bent),
        straight=linear_layers([straight])[0],
        forward=ConvexHead(weights=to_array(weights[0].exp()), biases=to_array(biases[0].exp())),
        backward=ConvexHead(weights=to_array(weights[1].exp()), biases=to_array(biases[1].exp())),
    )


def fit_convex_head(inputs: Floats, times: Floats, seed: int) -> ConvexHead:
    """To the logarithms of `times` [samples] ms of what grows with `inputs` [samples, inputs]."""
    import torch

    scale = np.maximum(inputs.max(axis=0), 1.0)
    x, log_times = (torch.tensor(a, dtype=torch.float32) for a in (inputs / scale, np.log(times)))
    highest, lowest = np.log(times.max()), np.log(times.min())
    with seeded(seed):
        # The first piece starts as the latency, the others with ever steeper slopes.
        start = torch.linspace(float(lowest) - 2, float(highest), PIECES)
        weights = torch.nn.Parameter(start[:, None].repeat(1, inputs.shape[1]))
        biases = torch.nn.Parameter(torch.full((PIECES,), float(lowest)) - torch.arange(PIECES))
        optimizer = torch.optim.Adam([weights, biases], lr=HEAD_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / HEAD_STEPS)
        for _ in range(HEAD_STEPS):
            optimizer.zero_grad()
            predicted = (x @ weights.exp().T + biases.exp()).amax(dim=1).log()
            error = torch.nn.functional.smooth_l1_loss(predicted, log_times, beta=HUBER)
            torch.autograd.backward(error)
            optimizer.step()
            schedule.step()
    return ConvexHead(weights=to_array(weights.exp()) / scale, biases=to_array(biases.exp()))


def fit_dreamshard(sets: Sets, plans: Ints, step_ms: Floats, seed: int) -> DreamShardNetwork:
    """As published: squared errors of forward, backward, communication [sets, 3] and of the step.

    `plans` [plans, devices] are numbers of sets, `step_ms` [plans] what their steps take.
    """
    import torch

    inputs, (hidden, width) = sets.features.shape[1], DREAMSHARD_TABLE
    with seeded(seed):
        table = torch.nn.Sequential(mlp(inputs, hidden, width), torch.nn.ReLU())
        heads = torch.nn.ModuleList(mlp(width, DREAMSHARD_HEAD, 1) for _ in range(4))
        times = torch.tensor(sets.times, dtype=torch.float32)
        steps = torch.tensor(step_ms, dtype=torch.float32)
        all_features = torch.tensor(sets.features, dtype=torch.float32)
        generator = np.random.default_rng(seed)

        def summed(features: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
            return features.new_zeros(count, width).index_add(0, owner, table(features))

        def overall_loss() -> torch.Tensor:
            chosen = generator.choice(len(plans), min(DREAMSHARD_BATCH, len(plans)))
            rows, owner = _rows_of(sets.counts, plans[chosen].ravel())
            sums = summed(all_features[rows], torch.from_numpy(owner), plans[chosen].size)
            most = sums.view(len(chosen), -1, width).amax(dim=1)
            error: torch.Tensor = heads[3](most)[:, 0] - steps[chosen]
            return error.square().mean()

        def loss(features: torch.Tensor, owner: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            sums = summed(features, owner, len(chosen))
            predicted = torch.cat([head(sums) for head in heads[:3]], dim=1)
            return (predicted - times[chosen]).square().mean(dim=0).sum() + overall_loss()

        parameters = [*table.parameters(), *heads.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=DREAMSHARD_RATE)
        _minimize(sets, loss, optimizer, DREAMSHARD_STEPS, DREAMSHARD_BATCH, seed)
    forward, backward, communication, overall = (linear_layers(head) for head in heads)
    return DreamShardNetwork(
        table=linear_layers(table[0]),
        forward=forward,
        backward=backward,
        communication=communication,
        overall=overall,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's own random state stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def mlp(*sizes: int) -> torch.nn.Sequential:
    """Linear layers with ReLU between them."""
    import torch

    layers: list[torch.nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def _minimize(
    sets: Sets,
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Steps over random batches of sets; the learning rate falls linearly to nothing."""
    import torch

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    features = torch.tensor(sets.features, dtype=torch.float32)
    for chosen in _batches(len(sets.counts), batch_size, steps, np.random.default_rng(seed)):
        rows, owner = _rows_of(sets.counts, chosen)
        optimizer.zero_grad()
        error = loss(features[rows], torch.from_numpy(owner), torch.from_numpy(chosen))
        torch.autograd.backward(error)
        optimizer.step()
        schedule.step()


def _batches(
    count: int, batch_size: int, steps: int, generator: np.random.Generator
) -> Iterator[Ints]:
    """Batches of set numbers: every set once, in a new order, then again."""
    order = generator.permutation(count)
    for _ in range(steps):
        if len(order) < min(batch_size, count):
            order = np.concatenate([order, generator.permutation(count)])
        yield order[:batch_size]
        order = order[batch_size:]


def _rows_of(counts: Ints, chosen: Ints) -> tuple[Ints, Ints]:
    """The shards of the chosen sets, and which of these sets each is of."""
    starts = np.concatenate([[0], np.cumsum(counts)])[chosen]
    own = counts[chosen]
    owner = np.repeat(np.arange(len(chosen)), own)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(own) - own, own)
    return starts[owner] + within, owner


def to_array(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.detach().numpy().astype(np.float64))


def linear_layers(modules: Any) -> tuple[Linear, ...]:
    linear = [module for module in modules if hasattr(module, "weight")]
    return tuple(Linear(weights=to_array(m.weight), biases=to_array(m.bias)) for m in linear)
