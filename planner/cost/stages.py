"""The stages of a step that a shard takes part in."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from planner.geometry import Block, ShardingType
from planner.tables import TableSpec
from planner.topology import Topology


class StageCost(NamedTuple):
    """Milliseconds that one shard adds to each stage of its device's step."""

    forward_compute_ms: float
    forward_comm_ms: float
    backward_compute_ms: float
    backward_comm_ms: float

    @property
    def total_ms(self) -> float:
        return sum(self)


class CostModel(Protocol):
    """Predicts what a shard costs."""

    def shard_cost(
        self, table: TableSpec, sharding_type: ShardingType, block: Block, topology: Topology
    ) -> StageCost: ...
