"""DreamShard's estimated process: items come one after the other, and a profile says at each step
what every device would take with the next one. No hardware is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.features import ShardWork, sum_by
from planner.cost.learned import LearnedCost, is_measured
from planner.cost.profile import ComputeTimes
from planner.cost.stages import COMPUTE, LINKS
from planner.shards import Bools, Floats, Ints, ShardColumns
from planner.topology import Topology


@dataclass(frozen=True)
class Items:
    """What each item adds to each device that it is put on. An item is a shard, or the shards of
    tables that stay together."""

    kernels: Floats  # [items, width]: to the sums of the profile's network
    others_ms: Floats  # [items, 3]: to forward and backward in other kernels, and to links
    worth: Floats  # [items]: to the policy's score

    @classmethod
    def of(
        cls,
        shards: ShardColumns,
        unit: Ints,
        costs: Floats,
        worth: Floats,
        model: LearnedCost,
        topology: Topology,
    ) -> Items:
        """`unit` [shards] is the item that each is of; `costs` [shards, 4] and `worth` [shards] are
        LearnedCost.stage_costs and PlacementPolicy.worth of them."""
        count, measured = int(unit.max()) + 1, is_measured(shards)[:, None]
        work = ShardWork.of(shards, topology, model.batch_size)
        kernels = model.profile.compute.network.represent(work.features) * measured
        others = np.column_stack([costs[:, COMPUTE] * ~measured, costs[:, LINKS].sum(axis=1)])
        return cls(
            sum_by(kernels, unit, count),
            sum_by(others, unit, count),
            sum_by(worth[:, None], unit, count)[:, 0],
        )


class Episodes:
    """Devices of some episodes side by side, each of a task of its own with as many items.

    All that a policy sees is in shares of an even device: one that has its part of all items.
    """

    def __init__(
        self, compute: ComputeTimes, tasks: list[Items], copies: Ints, devices: int
    ) -> None:
        """`copies` [items]: on how many devices each item goes."""
        self.compute = compute
        self.kernels = np.stack([items.kernels for items in tasks])
        self.others_ms = np.stack([items.others_ms for items in tasks])
        even_worth = copies.sum() / devices
        self.worths = np.stack([items.worth for items in tasks]) / even_worth
        shape, part = (len(tasks), devices), copies / devices
        even = self._costs(
            np.einsum("eiw,i->ew", self.kernels, part), np.einsum("eis,i->es", self.others_ms, part)
        )
        self.even_ms = even.sum(axis=1)
        self.sums = np.zeros((*shape, self.kernels.shape[2]))
        self.others = np.zeros((*shape, self.others_ms.shape[2]))
        self.costs = np.zeros((*shape, self.others_ms.shape[2]))  # forward, backward, links; ms
        self.worth = np.zeros(shape)

    def look(self, item: int) -> Floats:
        """[episodes, devices, COSTS]: what each device would take with the item, and by how much
        that exceeds the slowest device."""
        self._after = self._costs(
            self.sums + self.kernels[:, item, None], self.others + self.others_ms[:, item, None]
        )
        excess = np.maximum(self._after - self.costs.max(axis=1, keepdims=True), 0.0)
        seen = np.concatenate([self._after, excess], axis=2)
        return np.asarray(seen / self.even_ms[:, None, None])

    def put(self, item: int, devices: Ints) -> None:
        """The item that was looked at on `devices` [episodes, copies]."""
        at = np.arange(len(devices))[:, None], devices
        self.sums[at] += self.kernels[:, item, None]
        self.others[at] += self.others_ms[:, item, None]
        self.worth[at] += self.worths[:, item, None]
        self.costs[at] = self._after[at]

    def keep(self, chosen: Bools) -> None:
        """Go on with these episodes only."""
        for name in ("kernels", "others_ms", "worths", "even_ms", "sums", "others", "costs"):
            setattr(self, name, getattr(self, name)[chosen])
        self.worth, self._after = self.worth[chosen], self._after[chosen]

    @property
    def compute_ms(self) -> Floats:
        """[episodes]: forward and backward of the slowest devices."""
        return np.asarray(self.costs[:, :, :2].max(axis=1).sum(axis=1))

    def _costs(self, sums: Floats, others: Floats) -> Floats:
        """[..., 3] from [..., width] and [..., 3]."""
        ms = self.compute.stage_ms(sums.reshape(-1, sums.shape[-1]))
        kernels = ms.reshape(*sums.shape[:-1], 2)
        return np.concatenate([others[..., :2] + kernels, others[..., 2:]], axis=-1)
