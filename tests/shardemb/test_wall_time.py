"""Where the seconds of a run go: by a clock of its own, so that each number is known."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from shardemb.metrics.stragglers import slowest
from shardemb.metrics.wall_time import PARTS, WallTime, split_training


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(time, "time", lambda: made.now)
    return made


def test_each_second_is_of_one_part(clock: Clock) -> None:
    """Also where one part is within another; what is left is `other`, and the sum is the wall."""
    wall_time = WallTime(since=990.0)
    clock.tick(1)
    wall_time.started()
    with wall_time.part("training"):
        clock.tick(4)
        with wall_time.part("checkpoints"):
            clock.tick(2)
        clock.tick(8)
    clock.tick(16)
    found = wall_time.seconds()
    assert found == {
        **dict.fromkeys(PARTS, 0.0),
        **{"start": 11, "training": 12, "checkpoints": 2, "other": 16, "wall": 41},
    }


def test_recovery(clock: Clock) -> None:
    """All from the last report before the failure until its step is reached again, whatever was
    done then; what came before the report stays as it was."""
    wall_time = WallTime()
    before = {**dict.fromkeys(PARTS, 1.0), "wall": 7.0}
    wall_time.go_on(step=6, then=clock.now - 30, seconds=before, restarts=0)
    wall_time.started()
    for step in (5, 6, 7):
        with wall_time.part("training"):
            clock.tick(3)
        wall_time.reached(step)
    found = wall_time.seconds()
    assert found["recovery"] == 1 + 30 + 2 * 3
    assert found["training"] == 1 + 3
    assert found["wall"] == 7 + 30 + 9
    assert wall_time.restarts == 1


def test_the_share_of_communication() -> None:
    """It splits training; what was not measured is not made up."""
    seconds = {"wall": 10.0, "start": 2.0, "training": 8.0}
    parts = split_training(seconds, 0.25)
    assert parts == {**seconds, "compute": 6.0, "communication": 2.0}
    assert split_training(seconds, None) == {**seconds, "compute": None, "communication": None}


def test_the_slowest_rank_waits_least() -> None:
    """The transfer itself takes 2 ms on every rank; rank 1 comes 12 ms late."""
    step_ms = np.full(3, 40.0)
    found = slowest(np.array([14.0, 2.0, 14.0]), step_ms, ["a", "b", "c"])
    assert found is not None
    assert str(found) == (
        "rank 1 (host b) is the slowest: the others wait 12 ms of 40 ms a step for it"
    )
    assert slowest(np.array([5.0, 2.0, 5.0]), step_ms, ["a", "b", "c"]) is None
