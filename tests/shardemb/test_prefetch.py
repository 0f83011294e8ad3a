"""The same items in the same order, a few of them ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shardemb.data.prefetch import prefetch


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass in 5 s")


def test_all_items_in_order() -> None:
    """None among them; the thread is gone at the end."""
    items = [0, None, "a", ValueError("an item, not raised")]
    assert list(prefetch(iter(items), 2)) == items
    assert not _threads()


def test_a_few_are_made_before_they_are_asked_for() -> None:
    """As many as wait, and the one that finds no place; no more."""
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    ahead = prefetch(items(), 3)
    assert next(ahead) == 0
    _wait_until(lambda: len(made) == 5)
    time.sleep(0.2)
    assert len(made) == 5
    assert list(ahead) == list(range(1, 100))


def test_an_error_comes_where_the_item_would_have() -> None:
    """What was made before it is not lost."""

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("third")

    ahead = prefetch(items(), 5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(ahead)
    assert not _threads()


def test_closing_early_ends_the_thread_and_the_items() -> None:
    """Also while it waits for a place; files that the items keep open are closed."""
    closed = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    ahead = prefetch(items(), 2)
    next(ahead)
    ahead.close()
    assert closed == [True] and not _threads()
