"""A certified lower bound on the objective, over all plans of the option set.

A plan's largest compute and largest communication lie somewhere: the plane of the two is cut into
boxes, and in each the relaxation knows that no item is larger than the box allows and that the
maxima are at least where it begins. The smallest of the boxes' bounds holds for every plan. The
search's plan only says where to stop looking: boxes that begin above it need no better bound.

Memory counts as everywhere in the planner: all row shards of a table as its largest.
"""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np

from planner.search.relaxation import Relaxation
from planner.shards import Floats

MOST_BOXES = 40
MOST_WORK = 1_000_000  # boxes times options: relaxations of large problems take seconds
SMALLEST_GAIN = 2e-4  # of the bound: less is not worth more boxes
PATIENCE = 4  # boxes that may pass without such a gain


def lower_bound(relaxation: Relaxation, incumbent: float) -> float:
    """The bound in ms; `incumbent` is the objective of a plan, which it does not exceed.

    0 where the solver gave up, so that nothing could be proven.
    """
    groups = len(relaxation.goal.groups)
    root = relaxation.solve(np.full(groups, incumbent), np.zeros(groups))
    if root is None:
        return 0.0
    likely = relaxation.group_sums(root.maxima)
    worthwhile = min(incumbent, _attainable(relaxation, likely)) * (1 - SMALLEST_GAIN)
    tie = count()
    floor = root.bound if groups == 1 else 0.0
    boxes = [(root.bound, next(tie), np.full(groups, floor), np.full(groups, incumbent))]
    history = [root.bound] * PATIENCE
    most = min(MOST_BOXES, MOST_WORK // len(root.chosen))
    while boxes and boxes[0][0] < worthwhile and len(history) < PATIENCE + most:
        bound, _, floors, caps = heapq.heappop(boxes)
        for part in _halves(floors, caps, np.maximum(likely, incumbent * 1e-6)):
            fractions = relaxation.solve(part[1], part[0])
            if fractions is not None:
                heapq.heappush(boxes, (max(bound, fractions.bound), next(tie), *part))
            elif not relaxation.excludes(part[1]):  # the solver's word is no proof
                heapq.heappush(boxes, (bound, next(tie), *part))
        history.append(boxes[0][0] if boxes else incumbent)
        stands_still = history[-1] <= history[-PATIENCE] * (1 + SMALLEST_GAIN)
        if stands_still and len(history) > 2 * PATIENCE:
            break
    return min(boxes[0][0], incumbent) if boxes else incumbent


def _attainable(relaxation: Relaxation, maxima: Floats) -> float:
    """More than this the boxes cannot prove: those around these maxima have such fractions."""
    fractions = relaxation.solve(maxima * (1 + 1e-9), maxima)
    return fractions.bound if fractions else np.inf


def _halves(floors: Floats, caps: Floats, scale: Floats) -> list[tuple[Floats, Floats]]:
    """The box cut in two across its longest side."""
    side = int(((caps - floors) / scale).argmax())
    middle = (floors[side] + caps[side]) / 2
    lower_caps, upper_floors = caps.copy(), floors.copy()
    lower_caps[side] = upper_floors[side] = middle
    return [(floors, lower_caps), (upper_floors, caps)]
