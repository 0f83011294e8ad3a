"""Which rows make up which step: the same on every machine and for every number of ranks.

The rows of an epoch are cut into lanes, and a step takes its share from each. A rank has a range
of the step's rows, so it decodes the row groups of its own lanes only, while what a step is trained
on depends on the data, the seed and the global batch size alone.

Row groups come in a random order, and so do the rows of each: a lane is read from its start to its
end, so where an epoch stands is said by the number of steps. Nothing here reads data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Up to so many ranks train on the same steps; more have more lanes, and steps of their own.
LANES = 16


@dataclass(frozen=True)
class Window:
    """Rows that are decoded and shuffled together: a row group, or a piece of a huge one."""

    number: int  # in the order of the files
    file: str
    row_group: int
    start: int  # its first row, within the row group
    rows: int
    first_row: int  # its first row, within the file
    is_whole: bool  # the whole row group
    bytes: int  # decoded, about


@dataclass(frozen=True)
class Part:
    """The rows `start` to `stop` of a window, in the order of the epoch."""

    window: Window
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """Steps that were dealt in one way; what is read of an epoch is a list of them."""

    global_batch_size: int
    num_lanes: int
    steps: int


@dataclass(frozen=True)
class Share:
    """What a rank takes of a lane: of every `size` rows those from `start` to `stop`, for the
    rows of its batch from `place` on."""

    lane: int
    size: int
    start: int
    stop: int
    place: int


class Schedule:
    """How the rows of `parts` are dealt to steps and ranks."""

    def __init__(self, parts: Sequence[Part], global_batch_size: int, num_lanes: int) -> None:
        self.parts = list(parts)
        self.global_batch_size, self.num_lanes = global_batch_size, num_lanes
        self._ends = np.concatenate([[0], np.cumsum([part.rows for part in parts], dtype=np.int64)])
        self.num_rows = int(self._ends[-1])
        self._slots = np.arange(num_lanes + 1) * global_batch_size // num_lanes
        self._lanes = self._slots * self.num_rows // global_batch_size
        self._lane_rows, self._shares = np.diff(self._lanes), np.diff(self._slots)
        self.steps = int(np.max(-(-self._lane_rows // self._shares), initial=0))

    def rows_of_step(self, step: int) -> int:
        """Rows of data in a step, over all ranks."""
        left = np.maximum(self._lane_rows - step * self._shares, 0)
        return int(np.minimum(left, self._shares).sum())

    def shares_of_rank(self, rank: int, batch_size: int) -> list[Share]:
        """What makes up the rank's part of each step, in the order of its rows."""
        first, last = rank * batch_size, (rank + 1) * batch_size
        shares = []
        for lane, (low, high) in enumerate(zip(self._slots, self._slots[1:], strict=False)):
            start, stop = max(first, int(low)), min(last, int(high))
            if start < stop:
                size = int(high - low)
                shares.append(Share(lane, size, start - int(low), stop - int(low), start - first))
        return shares

    def lane(self, number: int, steps: int = 0) -> list[Part]:
        """What a lane reads, one after the other, after its first `steps` steps."""
        first, last = (int(end) for end in self._lanes[number : number + 2])
        return list(self._between(min(first + steps * int(self._shares[number]), last), last))

    def parts_of_step(self, step: int) -> list[Part]:
        """Where the rows of a step are, over all ranks."""
        parts: list[Part] = []
        for lane, share in enumerate(self._shares):
            start, end = (int(place) for place in self._lanes[lane : lane + 2])
            first = min(start + step * int(share), end)
            parts += self._between(first, min(first + int(share), end))
        return parts

    def _between(self, first: int, last: int) -> Iterator[Part]:
        if first == last:
            return
        begin = int(np.searchsorted(self._ends, first, side="right")) - 1
        for index in range(begin, len(self.parts)):
            offset = int(self._ends[index])
            if offset >= last:
                return
            part = self.parts[index]
            stop = min(last - offset, part.rows)
            yield Part(part.window, part.start + max(first - offset, 0), part.start + stop)

    def remaining(self, steps: int) -> list[Part]:
        """What is left to read after `steps` steps."""
        return [part for lane in range(self.num_lanes) for part in self.lane(lane, steps)]


def count_lanes(windows: int, global_batch_size: int, world_size: int) -> int:
    """Few enough that hardly a row group is in two of them, enough that ranks share none."""
    return max(1, min(LANES * -(-world_size // LANES), windows, global_batch_size))


def epoch_parts(windows: Sequence[Window], seed: int | None, epoch: int) -> list[Part]:
    """All rows of an epoch; with a seed the row groups come in a random order."""
    order: NDArray[np.int64] = np.arange(len(windows))
    if seed is not None:
        # The pieces of a huge row group stay together: it is decoded from its start.
        starts = np.flatnonzero([window.start == 0 for window in windows])
        groups = np.split(order, starts[1:])
        np.random.default_rng([seed, epoch]).shuffle(groups)
        order = np.concatenate(groups)
    return [Part(windows[i], 0, windows[i].rows) for i in order]


def rows_in_order(part: Part, seed: int | None, epoch: int) -> NDArray[np.int64] | slice:
    """Which rows of the window the part has, in the order in which they are read."""
    if seed is None:
        return slice(part.start, part.stop)
    generator = np.random.default_rng([seed, epoch, part.window.number])
    return generator.permutation(part.window.rows)[part.start : part.stop]
