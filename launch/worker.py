"""One worker: a process that reports why it ends, and its last words where it does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launch.forking import Template
from shardemb.failure import (
    REPORT_FOLDER,
    Failure,
    directory_note,
    failure_file,
    working_mark,
)
from shardemb.run_directory import Created, close_failed
from shardemb.supervision import heartbeat_file, read_heartbeat

LOG_TAIL_LINES = 15


class Worker:
    """`python ARGUMENTS` as one rank of this host, which ends with this process.

    What it prints goes to `log`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        place: Mapping[str, int | str],
        folder: Path,
        template: Template,
    ) -> None:
        self.rank, self.local_rank = int(place["RANK"]), int(place["LOCAL_RANK"])
        self.log = folder / f"rank_{self.local_rank}.log"
        self.failure_file = failure_file(folder, self.local_rank)
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}}
        environment[REPORT_FOLDER] = str(folder)
        environment.setdefault("OMP_NUM_THREADS", str(threads(int(place["LOCAL_WORLD_SIZE"]))))
        environment.setdefault("PYTHONUNBUFFERED", "1")  # or a killed worker's last lines are lost
        self.process = template.start(arguments, environment, self.log)

    def failure(self) -> Failure | None:
        """Why this worker ends; None while all is well. One that has told why may still run."""
        code = self.process.poll()
        if self.failure_file.exists():
            return Failure(**json.loads(self.failure_file.read_text()))
        # It has ended amid its work, as os._exit does.
        is_early = working_mark(self.failure_file).exists()
        if code is None or (code == 0 and not is_early):
            return None
        return Failure(1, _last_words(self.rank, code, self.log), time.time())

    def kill(self) -> None:
        """Kill the worker and what it has started, which is in its session."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.killpg(self.process.pid, signal.SIGKILL)


def failure_of_silence(
    rank: int, folder: Path, local_rank: int, hang_seconds: float
) -> Failure | None:
    """Of a process that runs, and has not been given the processor for so long."""
    beat = read_heartbeat(heartbeat_file(folder, local_rank))
    if beat is None or beat[1] < hang_seconds:
        return None
    message = (
        f"the worker of rank {rank} on {socket.gethostname()} has not run for "
        f"launch.hang_seconds ({hang_seconds:g})"
    )
    return Failure(1, message, time.time())


def last_step(folder: Path, local_ranks: Iterable[int]) -> int:
    """The last that any worker has trained."""
    beats = (read_heartbeat(heartbeat_file(folder, local_rank)) for local_rank in local_ranks)
    return max((beat[0] for beat in beats if beat), default=0)


def forget_reports(folder: Path, local_ranks: Iterable[int]) -> None:
    """Before workers are started again; what they said of the run directory stays true."""
    for local_rank in local_ranks:
        report = failure_file(folder, local_rank)
        for old in (report, working_mark(report), heartbeat_file(folder, local_rank)):
            old.unlink(missing_ok=True)


def first_cause(failures: Sequence[Failure]) -> Failure:
    """Of at least one: the first that is no echo of another, where there is such a one."""
    return min(failures, key=lambda failure: (failure.is_echo, failure.time))


def close_directory(folder: Path, message: str) -> None:
    """End the run directory that a worker reporting in `folder` has made: the run has failed."""
    for note in folder.glob(directory_note(failure_file(folder, "*")).name):
        close_failed(Created(**json.loads(note.read_text())), message)


def _last_words(rank: int, code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"the worker of rank {rank} was killed by {name}"
        if name == "SIGKILL":
            reason += "; if nobody did that, this machine ran out of memory"
    else:
        reason = f"the worker of rank {rank} ended with exit code {code}"
        if code == 0:
            reason += " before the run was done: something in it called os._exit"
    text = log.read_text(errors="replace") if log.exists() else ""
    tail = text.splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"{reason}; its log ends:", *tail]) if tail else reason


def threads(workers: int) -> int:
    """A worker's share of this host's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // workers)
