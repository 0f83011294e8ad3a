"""What cost models predict: the stages of a step."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from planner.shards import Floats, ShardColumns
from planner.topology import Topology


class StageCost(NamedTuple):
    """Milliseconds of each stage of a step; the order of the columns that cost models give."""

    forward_compute_ms: float
    forward_comm_ms: float
    backward_compute_ms: float
    backward_comm_ms: float

    @property
    def total_ms(self) -> float:
        return sum(self)


STAGES = StageCost._fields
COMPUTE, LINKS = [0, 2], [1, 3]  # the columns of kernels, and of collectives


class CostModel(Protocol):
    """Predicts what shards cost."""

    @property
    def name(self) -> str: ...

    def stage_costs(self, shards: ShardColumns, topology: Topology) -> Floats:
        """[shards, 4]: the milliseconds that each shard adds to the stages of its device.

        All row shards of a table must cost what its largest does: bound and search know no others.
        """
        ...
