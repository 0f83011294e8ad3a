"""Work spread over processes, its results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

import pyarrow as pa

from planner.errors import RequestError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_WAITING_PER_PROCESS = 2  # keeps all busy, and what waits small


class Workers:
    """`processes` of them; one means this process itself."""

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise RequestError(f"processes is {processes}: it must be 1 or more")
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._processes > 1:
            # A fork would copy the locks of Arrow's threads as they happen to be.
            self._executor = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(max(1, pa.cpu_count() // self._processes),),
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Each item and its result; an error comes when its item's turn has come."""
        if self._executor is None:
            yield from ((item, function(item)) for item in items)
            return
        try:
            yield from self._map(self._executor, function, items)
        except BrokenProcessPool as error:
            raise UserError(
                "a process was ended from outside, perhaps because memory ran out: use fewer"
            ) from error

    def _map(
        self,
        executor: ProcessPoolExecutor,
        function: Callable[[Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[Item, Result]]:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            waiting.append((item, executor.submit(function, item)))
            if len(waiting) > _WAITING_PER_PROCESS * self._processes:
                first, result = waiting.popleft()
                yield first, result.result()
        for last, result in waiting:
            yield last, result.result()


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us to stop
    pa.set_cpu_count(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its children; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
