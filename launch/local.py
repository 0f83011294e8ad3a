"""Workers on this machine: start them, show the first failure, leave none behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from planner import UserError
from shardemb.failure import FAILURE_FILE, Failure

POLL_SECONDS = 0.05
# After one worker has ended: time for the others to end or report, before they are killed.
GRACE_SECONDS = 1.0
LOG_TAIL_LINES = 15


class WorkerError(UserError):
    """A worker ended before its work was done."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_workers(arguments: Sequence[str], nproc: int) -> None:
    """Run `python ARGUMENTS` as ranks 0 to `nproc` - 1; return when all have ended well.

    Rank 0 shows its progress on stderr. When a worker fails the others are ended within seconds
    and WorkerError carries the failure that came first. Workers end with this process, whatever
    ends it.
    """
    with tempfile.TemporaryDirectory(prefix="shardemb-") as scratch, _sigterm_as_exit():
        workers = []
        try:
            port = _free_port()
            for rank in range(nproc):
                workers.append(_Worker(arguments, rank, nproc, port, Path(scratch)))
            _wait(workers)
        finally:
            for worker in workers:
                worker.kill()


class _Worker:
    def __init__(
        self, arguments: Sequence[str], rank: int, nproc: int, port: int, scratch: Path
    ) -> None:
        self.rank = rank
        self.log = scratch / f"rank_{rank}.log"
        self.failure_file = scratch / f"rank_{rank}.json"
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            FAILURE_FILE: str(self.failure_file),
        }
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if rank == 0 else log,
                stderr=None if rank == 0 else log,
                start_new_session=True,  # Ctrl-C comes to us alone, and we end the workers
                preexec_fn=_end_with_parent,
            )

    def failure(self) -> Failure | None:
        """Why this worker ended; None while it runs, or if it ended well."""
        code = self.process.poll()
        if code in (None, 0):
            return None
        if self.failure_file.exists():
            return Failure(**json.loads(self.failure_file.read_text()))
        return Failure(self.rank, 1, self._last_words(code or 0), time.time())

    def _last_words(self, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"was killed by {name}"
            if name == "SIGKILL":
                reason += "; if nobody did that, the machine ran out of memory"
        else:
            reason = f"ended with exit code {code}"
        tail = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([reason, *tail])

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _wait(workers: list[_Worker]) -> None:
    while any(worker.process.poll() is None for worker in workers):
        if any(worker.failure() for worker in workers):
            break
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    failures = _failures(workers)
    # An echo came first: wait for the rank that caused it.
    while all(f.is_echo for f in failures) and failures and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        failures = _failures(workers)
    if failures:
        first = min(failures, key=lambda failure: (failure.is_echo, failure.time))
        where = f"worker of rank {first.rank}: " if len(workers) > 1 else ""
        raise WorkerError(where + first.message, first.exit_code)


def _failures(workers: list[_Worker]) -> list[Failure]:
    return [failure for worker in workers if (failure := worker.failure())]


def _end_with_parent() -> None:
    """Linux: have the kernel kill this worker when its launcher dies, even by SIGKILL."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """A SIGTERM unwinds like Ctrl-C, so that workers are ended."""

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
