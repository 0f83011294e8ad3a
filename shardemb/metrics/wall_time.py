"""Where the seconds of a run go, from its launch on; each second is counted once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LAUNCHED = "SHARDEMB_LAUNCHED"  # unix time, of the launcher
# `start`: imports, meeting, planning, sharding. `recovery`: from the last report before a failure
# until its step is reached again. `other`: what is none of these.
PARTS = ("start", "training", "data_wait", "evaluation", "checkpoints", "recovery", "other")


class WallTime:
    """A stopwatch of one rank that always runs, for one part after the other."""

    def __init__(self, since: float | None = None) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "start", time.time() if since is None else since
        self._recovers_until: int | None = None  # a step
        self.restarts = 0  # after failures, once the run had reported a step

    @classmethod
    def of_launch(cls) -> WallTime:
        """From when the launcher was started, or else from now."""
        now = time.time()
        return cls(min(float(os.environ.get(LAUNCHED, now)), now))  # another host's clock may lead

    def go_on(self, step: int, then: float, seconds: Mapping[str, float], restarts: int) -> None:
        """Workers before these spent `seconds` until, at `then`, they last reported, after `step`.

        What has passed since is recovery, and so are the steps up to that one, trained anew.
        """
        self._seconds = {part: seconds[part] for part in PARTS}
        self._since, self._recovers_until, self.restarts = then, step, restarts + 1

    def reached(self, step: int) -> None:
        """Training has: what is lost is made up for after the step that was last reported."""
        if self._recovers_until is not None and step >= self._recovers_until:
            self._lap()
            self._recovers_until = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What the block takes is of part `name`, and not of the block around it."""
        self._lap()
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._lap()
            self._part = outer

    def started(self) -> None:
        """The start is over."""
        self._lap()
        self._part = "other"

    def seconds(self) -> dict[str, float]:
        """Of each part until now; `wall` is their sum."""
        self._lap()
        return {"wall": sum(self._seconds.values()), **self._seconds}

    def _lap(self) -> None:
        now, recovers = time.time(), self._recovers_until is not None
        self._seconds["recovery" if recovers else self._part] += now - self._since
        self._since = now


def split_training(seconds: Mapping[str, float], share: float | None) -> dict[str, float | None]:
    """`training` as `compute` and `communication`, whose `share` was measured in some steps.

    Both are None where it was not.
    """
    parts: dict[str, float | None] = {}
    for part, spent in seconds.items():
        if part == "training":
            parts["compute"] = None if share is None else spent * (1 - share)
            parts["communication"] = None if share is None else spent * share
        parts[part] = spent
    return parts
