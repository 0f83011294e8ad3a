"""Predictions in numpy: what they promise to search and bound, and that they are the networks."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError

from planner.cost.networks import ConvexHead, DreamShardNetwork, Ensemble, Linear, SetNetwork

GENERATOR = np.random.default_rng(0)
FEATURES, WIDTH = 12, 8


def _linear(outputs: int, inputs: int) -> Linear:
    return Linear(
        weights=GENERATOR.normal(size=(outputs, inputs)), biases=GENERATOR.normal(size=outputs)
    )


def _head(pieces: int = 3) -> ConvexHead:
    return ConvexHead(
        weights=GENERATOR.uniform(size=(pieces, WIDTH)), biases=GENERATOR.uniform(size=pieces)
    )


def _member() -> SetNetwork:
    return SetNetwork(
        mean=np.zeros(FEATURES),
        scale=np.full(FEATURES, 10.0),
        bent=(_linear(6, FEATURES), _linear(WIDTH, 6)),
        straight=_linear(WIDTH, FEATURES),
        forward=_head(),
        backward=_head(),
    )


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble(members=(_member(), _member(), _member()))


@pytest.fixture(scope="module")
def sums(ensemble: Ensemble) -> np.ndarray:
    return np.abs(GENERATOR.normal(size=(300, 3 * WIDTH)))


def test_predictions_are_convex(ensemble: Ensemble, sums: np.ndarray) -> None:
    """Half way between two devices costs no more than the mean of the two."""
    left, right = sums[:150], sums[150:]
    halves = (ensemble.stage_ms(left) + ensemble.stage_ms(right)) / 2
    assert (ensemble.stage_ms((left + right) / 2) <= halves + 1e-12).all()


def test_a_shard_more_never_costs_less(ensemble: Ensemble, sums: np.ndarray) -> None:
    """Whatever its features are."""
    more = ensemble.represent(GENERATOR.normal(0, 3, (len(sums), FEATURES)))
    assert (ensemble.stage_ms(sums + more) >= ensemble.stage_ms(sums)).all()


def test_a_tangent_is_a_lower_bound_everywhere(ensemble: Ensemble, sums: np.ndarray) -> None:
    """And gives the same growth near where it was taken."""
    at = sums[0]
    slopes, here = ensemble.slopes(at), ensemble.stage_ms(at[None])[0]
    tangent = here + (sums - at) @ slopes.T
    assert (tangent <= ensemble.stage_ms(sums) + 1e-12).all()
    near = at * (1 + 1e-9)
    growth = ensemble.stage_ms(near[None])[0] - here
    assert growth == pytest.approx(slopes @ (near - at), rel=1e-3)


def test_many_devices_are_predicted_at_once(ensemble: Ensemble) -> None:
    """At least 100,000 a second from their sums, or a search would wait for it."""
    many = GENERATOR.uniform(size=(50_000, 3 * WIDTH))
    began = time.perf_counter()
    ensemble.stage_ms(many)
    assert time.perf_counter() - began < 0.5


def test_dreamshard_is_the_published_network() -> None:
    """The same numbers as torch's layers: sums of ReLU'd tables, heads, the maximum of devices."""
    torch = pytest.importorskip("torch")
    sizes = [(21, 128), (128, 32), *((32, 64), (64, 1)) * 4]
    layers = [torch.nn.Linear(*size) for size in sizes]
    ours = [
        Linear(weights=layer.weight.detach().numpy(), biases=layer.bias.detach().numpy())
        for layer in layers
    ]
    pairs = [tuple(ours[i : i + 2]) for i in range(0, len(ours), 2)]
    network = DreamShardNetwork(
        table=pairs[0], forward=pairs[1], backward=pairs[2], communication=pairs[3],
        overall=pairs[4],
    )  # fmt: skip
    tables = torch.randn(5, 21)
    latent = torch.relu(layers[1](torch.relu(layers[0](tables))))
    devices = torch.stack([latent[:2].sum(0), latent[2:].sum(0)])
    heads = [torch.nn.Sequential(a, torch.nn.ReLU(), b) for a, b in zip(*[iter(layers[2:])] * 2)]  # noqa: B905
    sums = np.stack([part.sum(axis=0) for part in np.split(network.represent(tables.numpy()), [2])])
    expected = torch.cat([head(devices) for head in heads[:3]], dim=1).detach().numpy()
    assert network.stage_ms(sums) == pytest.approx(expected, abs=1e-4)
    step = heads[3](devices.max(dim=0).values).item()
    assert network.step_ms(sums[None])[0] == pytest.approx(step, abs=1e-4)


def test_what_breaks_the_promises_is_refused() -> None:
    """A head that falls, and layers whose sizes do not match."""
    with pytest.raises(ValidationError, match="negative"):
        ConvexHead(weights=[[-1.0]], biases=[0.0])
    with pytest.raises(ValidationError, match="2 biases for 1 outputs"):
        Linear(weights=[[1.0]], biases=[0.0, 0.0])
    with pytest.raises(ValidationError, match="do not match"):
        SetNetwork(**{**dict(_member()), "straight": _linear(WIDTH + 1, FEATURES)})
