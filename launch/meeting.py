"""Where the launchers of a run meet: a key-value store at the rendezvous endpoint.

The launcher that the endpoint's address belongs to serves it (torch's TCPStore), on that address
alone. Every launcher says there each second that it lives.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from launch.endpoint import Endpoint, listen, reach
from planner import UserError
from shardemb.failure import Failure

_STORE_SECONDS = 10.0  # for one answer, and for those of others at the end
_BEAT_SECONDS = 1.0


class Meeting:
    """This launcher's part; `index` counts launchers as they came, the server is the first."""

    def __init__(self, endpoint: Endpoint, wait_seconds: float) -> None:
        self.endpoint, self.host = endpoint, socket.gethostname()
        listener = listen(endpoint)
        self.is_server = listener is not None
        self.address = endpoint.address if listener else reach(endpoint, wait_seconds)
        self.store = self._connect(listener)
        if listener:
            self.index = self.store.add("launchers", 1) - 1
            self.store.set("run_id", uuid.uuid4().hex)
        self.run_id = self.store.get("run_id").decode()  # others come after the server
        if not listener:
            self.index = self.store.add("launchers", 1) - 1
        self._lost: dict[str, float] = {}  # hosts, and for how many seconds they have been silent
        self._left = threading.Event()

    def _connect(self, listener: socket.socket | None = None) -> TCPStore:
        """In a thread: to a server that is no store, TCPStore waits longer than it is told to."""
        made: Future[TCPStore] = Future()

        def connect() -> None:
            try:
                made.set_result(self._store(listener))
            except (DistError, RuntimeError) as error:
                made.set_exception(error)

        threading.Thread(target=connect, daemon=True).start()
        try:
            return made.result(_STORE_SECONDS)
        except (DistError, RuntimeError, FutureTimeoutError) as error:
            raise UserError(
                f"--rdzv-endpoint {self.endpoint}: the port is in use by another program; choose "
                "another"
            ) from error

    def _store(self, listener: socket.socket | None) -> TCPStore:
        return TCPStore(
            self.endpoint.address,
            self.endpoint.port,
            is_master=listener is not None,
            timeout=timedelta(seconds=_STORE_SECONDS),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )

    def gather(self, topic: str, value: Any, count: int, wait_seconds: float) -> list[Any]:
        """What the first `count` launchers say of a topic, in their order; JSON."""
        self.store.set(f"{topic}/{self.index}", json.dumps(value))
        deadline = time.monotonic() + wait_seconds
        keys = [f"{topic}/{index}" for index in range(count)]
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                here = sum(self.store.check([key]) for key in keys)
                raise UserError(
                    f"only {here} of {count} hosts came to {self.endpoint} within "
                    f"{wait_seconds:g} s; start the launcher on the others, or give --nnodes {here}"
                )
            time.sleep(0.1)
        return [json.loads(self.store.get(key)) for key in keys]

    def begin_to_watch(self, silent_seconds: float, on_cut_off: Callable[[], None]) -> None:
        """Over a connection of its own: one that waits for an answer lets nobody else ask.

        `on_cut_off` is called in a thread when the store has not answered for so long: TCPStore
        itself would wait for minutes.
        """
        store, self._answered = self._connect(), time.monotonic()
        threading.Thread(target=self._beat, args=[store], daemon=True).start()
        watch = [silent_seconds, on_cut_off]
        threading.Thread(target=self._watch, args=watch, daemon=True).start()

    def _watch(self, silent_seconds: float, on_cut_off: Callable[[], None]) -> None:
        while not self._left.wait(_BEAT_SECONDS):
            if time.monotonic() - self._answered > silent_seconds:
                on_cut_off()
                return

    def lost_hosts(self, silent_seconds: float) -> list[str]:
        """Hosts whose launchers have said nothing for so long, and have not left."""
        return [host for host, silent in self._lost.items() if silent > silent_seconds]

    def _beat(self, store: TCPStore) -> None:
        beats = 0
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._left.is_set():
            beats += 1
            try:
                store.set(f"alive/{self.index}", json.dumps([self.host, beats]))
                for index in range(store.add("launchers", 0)):
                    key = f"alive/{index}"
                    if index == self.index or not store.check([key]):
                        continue
                    beat, now = store.get(key), time.monotonic()
                    if index not in seen or seen[index][0] != beat:
                        seen[index] = beat, now
                    if store.check([f"left/{index}"]):
                        seen[index] = beat, now
                    host = json.loads(beat)[0]
                    self._lost[host] = now - seen[index][1]
            except (DistError, RuntimeError):
                return  # nothing answers any more
            self._answered = time.monotonic()
            self._left.wait(_BEAT_SECONDS)

    def stop(self, failure: Failure) -> None:
        """Tell the other launchers why the run ends; the first reason stands."""
        self.store.compare_set("stop", "", json.dumps(asdict(failure)))

    def stopped(self) -> Failure | None:
        """What another launcher has told."""
        if not self.store.check(["stop"]):
            return None
        return Failure(**json.loads(self.store.get("stop")))

    def leave(self) -> None:
        """The server stays until the others have left or are lost: they may have a question."""
        self._left.set()
        try:
            self.store.set(f"left/{self.index}", "")
            deadline = time.monotonic() + _STORE_SECONDS
            others = self.store.add("launchers", 0) if self.is_server else 0
            while not all(self.store.check([f"left/{i}"]) for i in range(others)):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
        except (DistError, RuntimeError):
            return  # the server is gone
