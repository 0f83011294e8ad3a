"""Random tasks for a placement policy to be trained with, and episodes on them. Imports no torch.

Tables, batches and optimizers are drawn as those that profiles measure; numbers of tables and of
devices vary, and so does whether the devices are those of one host. A batch of tasks has one size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from planner import Topology
from planner.cost.features import dreamshard_features, whole_tables
from planner.cost.learned import LearnedCost
from planner.cost.profile import Profile
from planner.hardware import preset
from planner.search.episodes import Episodes, Items
from planner.search.policy import PlacementPolicy
from planner.shards import Floats, Ints, ShardColumns, TableColumns
from shardemb.profiler.workloads import (
    BATCH_SIZES,
    DTYPES,
    LIMITS,
    OPTIMIZERS,
    draw_table,
    log_int,
)

DEVICES, TABLES_A_DEVICE, MOST_TABLES = (2, 16), (1.5, 12.0), 64
TWO_HOSTS_SHARE = 0.3  # of the tasks whose devices can be halved


@dataclass(frozen=True)
class PlacementTask:
    """Tables to place whole, in descending order of predicted cost; memory is no matter."""

    shards: ShardColumns
    topology: Topology
    model: LearnedCost
    costs: Floats  # [tables, 4] as LearnedCost.stage_costs has them

    @cached_property
    def features(self) -> Floats:
        """[tables, DREAMSHARD_FEATURES]"""
        return dreamshard_features(self.shards)

    def items(self, policy: PlacementPolicy) -> Items:
        """One a table."""
        return replace(self._items, worth=policy.worth(self.features))

    @cached_property
    def _items(self) -> Items:
        tables = len(self.shards)
        unit, worth = np.arange(tables), np.zeros(tables)
        return Items.of(self.shards, unit, self.costs, worth, self.model, self.topology)


class Played(NamedTuple):
    """What was seen and done in episodes."""

    devices: Ints  # [episodes, tables]: of each table
    costs: Floats  # [episodes, tables, devices, COSTS], as Episodes.look has them
    step: Floats  # [episodes]: predicted, over what an even device takes


def draw_tasks(profile: Profile, generator: np.random.Generator, count: int) -> list[PlacementTask]:
    """Of one number of tables and one topology."""
    devices = log_int(generator, *DEVICES)
    tables = min(int(devices * generator.uniform(*TABLES_A_DEVICE)) + 1, MOST_TABLES)
    hosts = 2 if devices % 2 == 0 and generator.uniform() < TWO_HOSTS_SHARE else 1
    # Between hosts, links are the analytic model's: any GPU stands for all.
    kind = "cpu" if profile.environment.device_type == "cpu" else "H100"
    topology = Topology(
        world_size=devices, local_world_size=devices // hosts, hardware=preset(kind)
    )
    return [_draw_task(profile, generator, topology, tables) for _ in range(count)]


def _draw_task(
    profile: Profile, generator: np.random.Generator, topology: Topology, count: int
) -> PlacementTask:
    rows = log_int(generator, *BATCH_SIZES)
    dtype = DTYPES[int(generator.integers(len(DTYPES)))]
    optimizer = OPTIMIZERS[int(generator.integers(len(OPTIMIZERS)))]
    limits = LIMITS[profile.environment.device_type]
    tables = [draw_table(generator, f"t{i}", rows, dtype, optimizer, limits) for i in range(count)]
    # What a step takes around kernels and collectives is alike wherever a whole table is.
    kernels = profile.model_copy(update={"plans": ()})
    model = LearnedCost(kernels, max(rows // topology.world_size, 1))
    shards = whole_tables(TableColumns.of(tables))
    costs = model.stage_costs(shards, topology)
    order = np.argsort(-costs.sum(axis=1), kind="stable")
    return PlacementTask(shards.select(order), topology, model, costs[order])


def play(
    tasks: list[PlacementTask],
    policy: PlacementPolicy,
    episodes: int,
    generator: np.random.Generator | None,
) -> Played:
    """So many `episodes` of each task, one task after the other: draws by the policy, or without a
    generator the likeliest devices."""
    first = tasks[0]
    count, world = len(first.shards), first.topology.world_size
    items = [own for task in tasks for own in [task.items(policy)] * episodes]
    state = Episodes(first.model.profile.compute, items, np.ones(count, dtype=np.int64), world)
    chosen, seen = [], []
    for table in range(count):
        costs = state.look(table)
        scores = policy.score(state.worth, costs)
        if generator is not None:
            scores += generator.gumbel(size=scores.shape)  # the highest are draws by softmax
        chosen.append(scores.argmax(axis=1))
        seen.append(costs)
        state.put(table, chosen[-1][:, None])
    devices = np.stack(chosen, axis=1)
    links = [
        task.model.links_ms(task.shards, task.costs, task.topology, own)
        for task, own in zip(tasks, np.split(devices, len(tasks)), strict=True)
    ]
    step_ms = state.compute_ms + np.concatenate(links).sum(axis=1)
    return Played(devices, np.stack(seen, axis=1), step_ms / state.even_ms)
