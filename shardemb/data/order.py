"""Which rows make up which step: the same on every machine and for every number of ranks.

The rows of an epoch are cut into lanes of equal length, and a step takes its share from each.
A rank reads some of the lanes, so it decodes its own row groups only, while what a step is
trained on depends on the data, the seed and the global batch size alone, as long as the number
of ranks divides the number of lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Any number of ranks that divides the lanes sees the same steps. There are fewer lanes where row
# groups are few or huge; ranks beyond them get a lane each, and steps of their own.
LANES = 16
# The row groups that are open at a time have at most about so many rows.
OPEN_ROWS = 1 << 20
# Rows over all ranks that are shuffled together: a few thousand from each lane.
SHUFFLE_ROWS = 1 << 16


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file; `first_row` is its first row's number within the file."""

    file: Path
    index: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a row group."""

    group: RowGroup
    start: int
    stop: int


class Schedule:
    """How the rows of `groups` are dealt to steps and ranks; no data is read for it."""

    def __init__(self, groups: Sequence[RowGroup], batch_size: int, world_size: int) -> None:
        self.groups = list(groups)
        self.global_batch_size = batch_size * world_size
        self.num_rows = sum(group.rows for group in groups)
        self.num_lanes = self._count_lanes(world_size)
        self.lanes_per_rank = self.num_lanes // world_size
        self._lane_rows = np.diff(self._cut(self.num_rows))
        self.shares = np.diff(self._cut(self.global_batch_size))  # rows a step, of each lane
        self.steps = int(np.max(-(-self._lane_rows // self.shares)))
        self.steps_per_chunk = max(1, SHUFFLE_ROWS // self.global_batch_size)

    def _count_lanes(self, world_size: int) -> int:
        most = min(len(self.groups), OPEN_ROWS // max(group.rows for group in self.groups))
        lanes = LANES
        # Equal shares, and few row groups that two lanes have to decode.
        while lanes > 1 and (lanes > most or self.global_batch_size % lanes):
            lanes //= 2
        return lanes if lanes % world_size == 0 else world_size

    def _cut(self, total: int) -> NDArray[np.int64]:
        """Ends of `num_lanes` nearly equal parts of `total`."""
        return np.arange(self.num_lanes + 1) * total // self.num_lanes

    def rows_of_step(self, step: int) -> int:
        """Rows of data in a step, over all ranks."""
        left = np.maximum(self._lane_rows - step * self.shares, 0)
        return int(np.minimum(left, self.shares).sum())

    def lanes_of_rank(self, rank: int) -> range:
        return range(rank * self.lanes_per_rank, (rank + 1) * self.lanes_per_rank)

    def parts_of_lane(self, lane: int, order: NDArray[np.int64]) -> list[Part]:
        """What a lane reads, one after the other, when the row groups come in this order."""
        first, last = (int(end) for end in self._cut(self.num_rows)[lane : lane + 2])
        parts, position = [], 0
        for index in order:
            group = self.groups[index]
            start, stop = max(first - position, 0), min(last - position, group.rows)
            if start < stop:
                parts.append(Part(group, start, stop))
            position += group.rows
        return parts
