"""Networks that predict the time of a set of shards from the sum of what each adds; plain numpy."""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from planner.shards import Floats


def _array(dimensions: int) -> Any:
    """An array of floats that a JSON file holds as nested lists."""

    def read(value: Any) -> Floats:
        array = np.array(value, dtype=np.float64)
        if array.ndim != dimensions or not np.isfinite(array).all():
            raise ValueError(f"must be finite numbers in {dimensions} dimensions")
        return array

    return BeforeValidator(read), PlainSerializer(_to_lists)


def _to_lists(array: npt.NDArray[Any]) -> Any:
    """In the precision that networks are fitted in: seven digits."""
    return np.array([float(f"{x:.7g}") for x in array.ravel()]).reshape(array.shape).tolist()


_READ_VECTOR, _WRITE_VECTOR = _array(1)
_READ_MATRIX, _WRITE_MATRIX = _array(2)
Vector = Annotated[Floats, _READ_VECTOR, _WRITE_VECTOR]
Matrix = Annotated[Floats, _READ_MATRIX, _WRITE_MATRIX]


class Part(BaseModel):
    """A part of a fitted model, as its file holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Linear(Part):
    """A linear layer."""

    weights: Matrix = Field(description="[outputs, inputs]")
    biases: Vector = Field(description="[outputs]")

    @model_validator(mode="after")
    def _fits(self) -> Linear:
        if len(self.biases) != len(self.weights):
            raise ValueError(f"{len(self.biases)} biases for {len(self.weights)} outputs")
        return self

    def __call__(self, values: Floats) -> Floats:
        return np.asarray(values @ self.weights.T + self.biases)


Layers = Annotated[tuple[Linear, ...], Field(min_length=1)]


def relu(values: Floats) -> Floats:
    return np.maximum(values, 0.0)


def through(layers: tuple[Linear, ...], values: Floats) -> Floats:
    """Linear layers with ReLU between them."""
    for layer in layers[:-1]:
        values = relu(layer(values))
    return layers[-1](values)


class ConvexHead(Linear):
    """The largest of some affine functions, none of which falls in any input: ms from sums.

    Convex, so each affine piece is a lower bound everywhere; and rising, so a shard more never
    costs less.
    """

    @model_validator(mode="after")
    def _rises(self) -> ConvexHead:
        if min(self.weights.min(initial=0), self.biases.min(initial=0)) < 0:
            raise ValueError("weights and biases must not be negative")
        return self

    def largest(self, sums: Floats) -> Floats:
        """[sets] from [sets, inputs]."""
        pieces = self.weights @ sums.T + self.biases[:, None]
        return np.asarray(pieces.max(axis=0))  # over the first axis: several times as fast

    def slope(self, sums: Floats) -> Floats:
        """[inputs]: that of the piece which decides at `sums` [inputs]."""
        return np.asarray(self.weights[int(self(sums).argmax())])


class SetNetwork(Part):
    """Ours: shards -> what each adds, by a power law that a network bends -> convex heads.

    The sum over the shards of a device is kept and changed shard by shard; the heads make of it
    the milliseconds of forward and backward.
    """

    mean: Vector = Field(description="[features], of all that was measured")
    scale: Vector = Field(description="[features]")
    bent: Layers
    straight: Linear
    forward: ConvexHead
    backward: ConvexHead

    @model_validator(mode="after")
    def _fits(self) -> SetNetwork:
        features, width = len(self.mean), len(self.straight.biases)
        inputs = (len(self.scale), self.bent[0].weights.shape[1], self.straight.weights.shape[1])
        sums = (
            len(self.bent[-1].biases),
            self.forward.weights.shape[1],
            self.backward.weights.shape[1],
        )
        if {features} != set(inputs) or {width} != set(sums):
            raise ValueError("the sizes of its layers do not match")
        return self

    def represent(self, features: Floats) -> Floats:
        """[shards, width]: what each adds to the sum of its device; all positive."""
        normal = (features - self.mean) / self.scale
        return np.exp(through(self.bent, normal) + self.straight(normal))


class Ensemble(Part):
    """Some networks that differ in their random start only: their mean, which errs less."""

    members: tuple[SetNetwork, ...] = Field(min_length=1)

    @property
    def _cuts(self) -> list[int]:
        return list(accumulate(len(m.straight.biases) for m in self.members))[:-1]

    def represent(self, features: Floats) -> Floats:
        """[shards, width of all members] from [shards, features]; add them up over a device."""
        return np.concatenate([member.represent(features) for member in self.members], axis=1)

    def stage_ms(self, sums: Floats) -> Floats:
        """[sets, 2]: forward and backward compute, from [sets, width]."""
        parts = zip(self.members, np.split(sums, self._cuts, axis=1), strict=True)
        each = [(m.forward.largest(part), m.backward.largest(part)) for m, part in parts]
        return np.asarray(np.mean(each, axis=0).T)

    def slopes(self, sums: Floats) -> Floats:
        """[2, width]: what forward and backward grow by where a device is at `sums` [width]."""
        parts = list(zip(self.members, np.split(sums, self._cuts), strict=True))
        forward = np.concatenate([m.forward.slope(part) for m, part in parts])
        backward = np.concatenate([m.backward.slope(part) for m, part in parts])
        return np.stack([forward, backward]) / len(self.members)


class DreamShardNetwork(Part):
    """The cost network of DreamShard (Zha et al., NeurIPS 2022), as published.

    A table net 21-128-32 with ReLU after both layers, summed over a device; heads 32-64-1 for
    forward, backward and communication; for the step the elementwise maximum over the devices and
    64-1. A device without tables is one table of zeros.
    """

    table: Layers
    forward: Layers
    backward: Layers
    communication: Layers
    overall: Layers

    def represent(self, features: Floats) -> Floats:
        """[tables, 32] from [tables, 21]."""
        return relu(through(self.table, features))

    def stage_ms(self, sums: Floats) -> Floats:
        """[devices, 3]: forward, backward and communication, from [devices, 32]."""
        heads = (self.forward, self.backward, self.communication)
        return np.concatenate([through(head, sums) for head in heads], axis=1)

    def step_ms(self, sums: Floats) -> Floats:
        """[plans]: the whole step, from [plans, devices, 32]."""
        return np.asarray(through(self.overall, sums.max(axis=1))[:, 0])
