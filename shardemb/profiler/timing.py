"""Repeated timings of one piece of work, and what they come to."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# A repetition is an outlier beyond so many scaled median absolute deviations from the median
# (Iglewicz and Hoaglin, How to detect and handle outliers, 1993).
OUTLIER_DEVIATIONS = 3.5
WARM_UP = 2
FEWEST, MOST, ENOUGH_MS = 5, 31, 60.0  # repetitions: the fewest, then more until one of the two
MAD_SCALE = 1.4826  # makes it a standard deviation where errors are normal
# Of the median of n errors that are normal: so many standard deviations over the root of n.
MEDIAN_ERROR = 1.2533
NOISY = 0.1  # a median that may be off by more is marked, and left out of fits


class Timing(NamedTuple):
    """`spread` is the scaled median absolute deviation over the median, `outliers` a count."""

    median_ms: float
    spread: float
    outliers: int
    repetitions: int

    @property
    def error(self) -> float:
        """Of the median, as a share of it."""
        return MEDIAN_ERROR * self.spread / math.sqrt(self.repetitions)


def is_enough(times_ms: Sequence[float]) -> bool:
    """Whether a median of these is worth no more repetitions: long ones scatter less."""
    count = len(times_ms)
    return count >= MOST or (count >= FEWEST and sum(times_ms) >= ENOUGH_MS)


def summarize(times_ms: Sequence[float]) -> Timing:
    """The median of repetitions, and how far they scatter around it."""
    median = statistics.median(times_ms)
    deviation = MAD_SCALE * statistics.median(abs(ms - median) for ms in times_ms)
    beyond = [ms for ms in times_ms if abs(ms - median) > OUTLIER_DEVIATIONS * deviation]
    return Timing(median, deviation / median, len(beyond), len(times_ms))


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the milliseconds until the device has done it."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)
    began = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - began) * 1000
