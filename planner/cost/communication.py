"""The time of a collective from the bytes of each rank: the same however ranks are numbered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from planner.cost.measurements import Collective
from planner.cost.networks import ConvexHead, Part
from planner.shards import Floats


def rank_loads(kind: Collective, sent_bytes: Sequence[Floats] | Floats) -> Floats:
    """[calls, 3]: the most that a rank sends, the most that one receives, and the mean.

    `sent_bytes` [calls, ranks] are as in CollectiveSample. Rings pass all but a rank's own part
    on, once to reduce and scatter or to gather, twice to reduce for all (nccl-tests,
    doc/PERFORMANCE.md).
    """
    given = np.asarray(sent_bytes, dtype=np.float64)
    ranks = given.shape[1]
    if kind == "all_to_all":
        sent, received = given * (ranks - 1), given.sum(axis=1, keepdims=True) - given
    else:
        passes = 2 if kind == "all_reduce" else 1
        sent = received = given * passes * (ranks - 1) / ranks
    return np.stack([sent.max(axis=1), received.max(axis=1), sent.mean(axis=1)], axis=1)


class CollectiveTimes(Part):
    """Of one kind of collective: a latency, then ever more ms for a byte of the busiest rank and
    of the mean rank, as caches and links fill."""

    head: ConvexHead
    margin: float = Field(ge=0, description="half of the interval, in logarithms")
    world_size: int = Field(gt=1, description="ranks that it was measured with")
    measured: int = Field(gt=0, description="how many measurements")

    def ms(self, loads: Floats) -> Floats:
        """[calls] from rank_loads."""
        return self.head.largest(loads)

    def ms_per_byte(self, load: Floats) -> Floats:
        """[calls]: what a byte more costs that all ranks send, where each sends `load` [calls]."""
        even = np.repeat(load[:, None], 3, axis=1)
        return np.asarray(self.head.weights[self.head(even).argmax(axis=1)].sum(axis=1))
