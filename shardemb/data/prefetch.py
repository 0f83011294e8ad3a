"""An iterator run ahead in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], most: int) -> Generator[T, None, None]:
    """The same items in the same order; up to `most` of them are ready before they are asked for.

    An exception of `items` is raised where the item would have come. The thread starts with the
    first item asked for, and ends with the iterator returned, also where that is closed early.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(most)
    closed = threading.Event()

    def put(entry: tuple[T] | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:
            put(error)
        finally:
            close = getattr(items, "close", None)
            if close:
                close()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            entry = ready.get()
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        closed.set()
        thread.join()
