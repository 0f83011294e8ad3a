"""How a worker tells why it ends: one message for a user's mistake, a traceback for ours.

What `shardemb`, which starts workers and shows the failure that came first, is told lies in the
folder that it names in REPORT_FOLDER.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner import UserError
from planner.files import replace_file

REPORT_FOLDER = "SHARDEMB_REPORT_FOLDER"

# What gloo and nccl say on the ranks that did not fail themselves.
_PEER_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("ncclRemoteError", "NCCL communicator was aborted"),
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Failure:
    """Why a rank ended. `is_echo`: another rank's end was noticed, which is not the cause.
    `is_final`: workers that are started again would end the same way. `log`: where to read on."""

    exit_code: int
    message: str
    time: float
    is_echo: bool = False
    is_final: bool = False
    log: str | None = None


@dataclass
class Outcome:
    exit_code: int = 0


@contextmanager
def report_failures() -> Iterator[Outcome]:
    """Report what the block raises to the launcher, or to stderr where there is none.

    `sys.exit` in the block is a failure too, whatever its code: its work was not done.
    """
    outcome = Outcome()
    mark = working_mark(_failure_file()) if has_launcher() else None
    if mark:
        mark.touch()
    try:
        yield outcome
    except (Exception, SystemExit) as error:
        failure = failure_of(error)
        outcome.exit_code = failure.exit_code
        _report(failure)
    if mark:  # os._exit in the block does not come here: the mark stays, and tells
        mark.unlink()


def failure_of(error: BaseException) -> Failure:
    """What to report of `error`, raised on this rank.

    A library's error about a full disk is the user's to mend, like a UserError.
    """
    if isinstance(error, UserError):
        return Failure(error.exit_code, str(error), time.time(), is_final=True)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{where}: make room, or choose another output=DIR"
        return Failure(1, message, time.time(), is_final=True)
    reason = f"in the worker of rank {_rank()}"
    if isinstance(error, SystemExit):
        reason += f": sys.exit({error.code!r}) before the run was done"
    is_echo = any(sign in str(error) for sign in _PEER_LOST)
    if is_echo:
        reason += ": another rank ended before this one"
    shown = "".join(traceback.format_exception(error))
    return Failure(1, f"{reason}\n{shown}", time.time(), is_echo)


def has_launcher() -> bool:
    """Whether `shardemb` started this worker, and tells the user how it ended."""
    return REPORT_FOLDER in os.environ


def failure_file(folder: Path, local_rank: int | str) -> Path:
    """Where a worker reports its Failure."""
    return folder / f"rank_{local_rank}.json"


def working_mark(failure_file: Path) -> Path:
    """A file that is there while the block of `report_failures` runs."""
    return failure_file.with_suffix(".working")


def directory_note(failure_file: Path) -> Path:
    """A file about the run directory that the worker has created."""
    return failure_file.with_suffix(".directory")


def note_directory(fields: dict[str, Any]) -> None:
    """Tell the launcher, which is to say there why the run failed, about the run directory."""
    replace_file(directory_note(_failure_file()), json.dumps(fields))


def _failure_file() -> Path:
    return failure_file(Path(os.environ[REPORT_FOLDER]), os.environ["LOCAL_RANK"])


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _report(failure: Failure) -> None:
    if has_launcher():
        replace_file(_failure_file(), json.dumps(vars(failure)))
    else:
        print(f"error (rank {_rank()}): {failure.message}", file=sys.stderr)
