"""DreamShard's placement policy: a network that scores devices for the next shard; plain numpy."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from planner.cost.features import DREAMSHARD_FEATURES
from planner.cost.networks import Layers, Part, Vector, relu, through
from planner.shards import Floats

COSTS = 6  # of a device: forward, backward and links with the shard, and what these add to a step


class PlacementPolicy(Part):
    """As published (Zha et al., NeurIPS 2022), but for what it is told of a device.

    A table net of its own, 21-128-32, summed over the device's shards; beside it a cost net, -64-32
    over the device's predicted costs; both together make one score, linearly. All inputs are shares
    of an even device, which has a part of everything, so that batch sizes and numbers of tables or
    devices never seen in training look alike. Published are a device's three costs before the table
    is placed; here they are those with it, and beside them by how much each exceeds that of the
    slowest device, so that a device is scored in view of the others. An empty device is nothing at
    all, where a table of zeros was published.
    """

    mean: Vector = Field(description="[features], of the tables that it was trained with")
    scale: Vector = Field(description="[features]")
    table: Layers
    cost: Layers
    head: Vector = Field(description="[both nets' widths]; a bias would change no choice")

    @model_validator(mode="after")
    def _fits(self) -> PlacementPolicy:
        features = {len(self.mean), len(self.scale), self.table[0].weights.shape[1]}
        widths = len(self.table[-1].biases) + len(self.cost[-1].biases)
        costs = self.cost[0].weights.shape[1]
        if (features, costs) != ({DREAMSHARD_FEATURES}, COSTS):
            raise ValueError(
                f"must be of the {DREAMSHARD_FEATURES} features and {COSTS} costs of this version"
            )
        if len(self.head) != widths:
            raise ValueError("the sizes of its layers do not match")
        return self

    def worth(self, features: Floats) -> Floats:
        """[shards]: what each adds to the score of its device, from DreamShard's features.

        The head is linear, so its part of the summed table net is a sum of numbers.
        """
        latent = relu(through(self.table, (features - self.mean) / self.scale))
        return np.asarray(latent @ self.head[: latent.shape[-1]])

    def score(self, worth: Floats, costs: Floats) -> Floats:
        """[...]: of devices, from the `worth` [...] of their shards and `costs` [..., COSTS]."""
        latent = relu(through(self.cost, costs))
        return np.asarray(worth + latent @ self.head[-latent.shape[-1] :])
