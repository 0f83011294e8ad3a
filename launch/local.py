"""Workers on this machine: start them, show the first failure, leave none behind."""

from __future__ import annotations

import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.endpoint import network_environment
from launch.forking import Template
from launch.logs import WorkerLogs, terminal_environment
from launch.ports import PortWarning
from launch.recovery import WorkerError
from launch.worker import Worker, close_directory, first_cause
from shardemb.failure import Failure

POLL_SECONDS = 0.05
# After one worker has ended: time for the others to end or report, before they are killed.
GRACE_SECONDS = 1.0
# Of this process, where such a signal ends it; the shell's numbers.
_EXIT_CODES = {128 + signum: signum for signum in (signal.SIGTERM, signal.SIGHUP)}


def run_workers(arguments: Sequence[str], nproc: int) -> None:
    """Run `python ARGUMENTS` as ranks 0 to `nproc` - 1; return when all have ended well.

    Rank 0 shows its progress on stderr; a run directory keeps the logs of all. When a worker fails
    the others are ended within seconds and WorkerError carries the failure that came first, which
    the run directory keeps. Workers end with this process, whatever ends it.
    """
    with tempfile.TemporaryDirectory(prefix="shardemb-") as scratch, _signals_as_exit():
        workers: list[Worker] = []
        template, logs = Template(Path(scratch) / "template.log"), WorkerLogs(Path(scratch))
        try:
            port = _free_port()
            for rank in range(nproc):
                place = {**_place(rank, nproc, port), **terminal_environment()}
                workers.append(Worker(arguments, place, Path(scratch), template))
            logs.begin({worker.rank: worker.log for worker in workers})
            _wait(workers, logs)
        except BaseException as error:
            _end(workers)
            logs.show()
            close_directory(Path(scratch), message_of(error))
            raise
        finally:
            _end(workers)
            template.close()


def _place(rank: int, nproc: int, port: int) -> dict[str, int | str]:
    return {
        "RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **network_environment("127.0.0.1"),
    }


def _end(workers: list[Worker]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.process.wait()


def message_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "ended by SIGINT"
    if isinstance(error, SystemExit) and error.code in _EXIT_CODES:
        return f"ended by {_EXIT_CODES[error.code].name}"
    return str(error) or repr(error)


def _wait(workers: list[Worker], logs: WorkerLogs) -> None:
    ports = PortWarning()
    while any(worker.process.poll() is None for worker in workers):
        if any(worker.failure() for worker in workers):
            break
        logs.show()
        if logs.has_begun:
            ports.say(worker.process.pid for worker in workers)
        time.sleep(POLL_SECONDS)
    logs.show()
    deadline = time.monotonic() + GRACE_SECONDS
    failures = _failures(workers, logs)
    # An echo came first: wait for the rank that caused it.
    while all(f.is_echo for f in failures) and failures and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        failures = _failures(workers, logs)
    if failures:
        cause = first_cause(failures)
        raise WorkerError(cause.message, cause.exit_code, cause.log)


def _failures(workers: list[Worker], logs: WorkerLogs) -> list[Failure]:
    return [logs.named(found, w.rank) for w in workers if (found := w.failure())]


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
