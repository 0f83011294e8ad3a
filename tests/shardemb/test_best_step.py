"""Early stopping counts evaluations without a better one."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from shardemb.best_step import BestStep

Best = Literal["max", "min"]


@pytest.mark.parametrize("best", ["max", "min"])
def test_patience(best: Best) -> None:
    """By hand: better, equal, better by less than min_delta, NaN, better; then three that are
    worse stop it."""
    sign = 1 if best == "max" else -1
    stopper = BestStep("m", best, patience=3, min_delta=0.1)
    found = [stopper.add(step, sign * value) for step, value in enumerate([0.5, 0.5, 0.55])]
    assert found == [True, False, False]
    assert not stopper.should_stop
    assert not stopper.add(3, math.nan)
    assert stopper.should_stop
    assert stopper.add(4, sign * 0.8)
    assert not stopper.should_stop
    for step in (5, 6, 7):
        assert not stopper.add(step, sign * 0.85)
    assert stopper.should_stop
    assert (stopper.step, stopper.value) == (4, sign * 0.8)


def test_without_patience_it_never_stops() -> None:
    stopper = BestStep("m", "min")
    stopper.add(1, 0.0)
    for step in range(2, 50):
        stopper.add(step, 1.0)
    assert not stopper.should_stop
    assert stopper.step == 1


def test_a_state_goes_on_where_it_was_taken() -> None:
    """With the same metric; with another, whose values mean something else, anew."""
    first = BestStep("auc", "max", patience=2)
    first.add(10, 0.7)
    first.add(20, 0.6)
    second = BestStep("auc", "max", patience=2)
    second.resume(first.state())
    assert not second.should_stop and not second.add(30, 0.65) and second.should_stop
    assert second.step == 10
    other = BestStep("logloss", "min", patience=2)
    other.resume(first.state())
    assert other.step is None and other.add(30, 9.0)
