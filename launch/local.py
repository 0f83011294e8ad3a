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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from planner import UserError
from shardemb.failure import FAILURE_FILE, Failure, directory_note, working_mark
from shardemb.run_directory import Created, close_failed

POLL_SECONDS = 0.05
# After one worker has ended: time for the others to end or report, before they are killed.
GRACE_SECONDS = 1.0
LOG_TAIL_LINES = 15
_STDERR = 2  # the descriptor: sys.stderr has none in a notebook
# Of this process, where such a signal ends it; the shell's numbers.
_EXIT_CODES = {128 + signum: signum for signum in (signal.SIGTERM, signal.SIGHUP)}


class WorkerError(UserError):
    """A worker ended before its work was done."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_workers(arguments: Sequence[str], nproc: int) -> None:
    """Run `python ARGUMENTS` as ranks 0 to `nproc` - 1; return when all have ended well.

    Rank 0 shows its progress on stderr. When a worker fails the others are ended within seconds
    and WorkerError carries the failure that came first, which the run directory keeps. Workers end
    with this process, whatever ends it.
    """
    with tempfile.TemporaryDirectory(prefix="shardemb-") as scratch, _signals_as_exit():
        workers: list[_Worker] = []
        try:
            port = _free_port()
            for rank in range(nproc):
                workers.append(_Worker(arguments, rank, nproc, port, Path(scratch)))
            _wait(workers)
        except BaseException as error:
            _end(workers)
            _close_directory(workers, error)
            raise
        finally:
            _end(workers)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.process.wait()


def _close_directory(workers: list[_Worker], error: BaseException) -> None:
    for worker in workers:
        note = directory_note(worker.failure_file)
        if note.exists():
            close_failed(Created(**json.loads(note.read_text())), _message(error))


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "ended by SIGINT"
    if isinstance(error, SystemExit) and error.code in _EXIT_CODES:
        return f"ended by {_EXIT_CODES[error.code].name}"
    return str(error) or repr(error)


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
                stdout=_STDERR if rank == 0 else log,
                stderr=_STDERR if rank == 0 else log,
                start_new_session=True,  # Ctrl-C comes to us alone, and we end the workers
                preexec_fn=partial(_end_with_parent, os.getpid(), _libc()),
            )

    def failure(self) -> Failure | None:
        """Why this worker ends; None while all is well. One that has told why may still run."""
        if self.failure_file.exists():
            return Failure(**json.loads(self.failure_file.read_text()))
        code = self.process.poll()
        if code is None or (code == 0 and not self._is_early()):
            return None
        return Failure(1, self._last_words(code), time.time())

    def _is_early(self) -> bool:
        """Whether this worker, which has ended, did so amid its work, as os._exit does."""
        return working_mark(self.failure_file).exists()

    def _last_words(self, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"the worker of rank {self.rank} was killed by {name}"
            if name == "SIGKILL":
                reason += "; if nobody did that, this machine ran out of memory"
        else:
            reason = f"the worker of rank {self.rank} ended with exit code {code}"
            if code == 0:
                reason += " before the run was done: something in it called os._exit"
        tail = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"{reason}; its log ends:", *tail]) if tail else reason

    def kill(self) -> None:
        """Kill the worker and what it has started, which is in its session."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


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
        raise WorkerError(first.message, first.exit_code)


def _failures(workers: list[_Worker]) -> list[Failure]:
    return [failure for worker in workers if (failure := worker.failure())]


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent(parent: int, libc: ctypes.CDLL | None) -> None:
    """Linux: have the kernel kill this worker when its launcher dies, even by SIGKILL."""
    if libc is None:
        return
    pr_set_pdeathsig = 1
    libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that workers are ended.

    A handler of the caller's own stays, and so does nohup's. Threads other than the main one
    get no signals.
    """

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    is_main = threading.current_thread() is threading.main_thread()
    ending = tuple(_EXIT_CODES.values()) if is_main else ()
    replaced = [s for s in ending if signal.getsignal(s) is signal.SIG_DFL]
    for signum in replaced:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum in replaced:
            signal.signal(signum, signal.SIG_DFL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
