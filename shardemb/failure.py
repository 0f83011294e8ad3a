"""How a worker tells why it ends: one message for a user's mistake, a traceback for ours."""

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

from planner import UserError

# Set by `shardemb`, which starts workers and shows the failure that came first.
FAILURE_FILE = "SHARDEMB_FAILURE_FILE"

# What gloo and nccl say on the ranks that did not fail themselves.
_PEER_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("ncclRemoteError", "NCCL communicator was aborted"),
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Failure:
    """Why a rank ended. `is_echo`: another rank's end was noticed, which is not the cause."""

    exit_code: int
    message: str
    time: float
    is_echo: bool = False


@dataclass
class Outcome:
    exit_code: int = 0


@contextmanager
def report_failures() -> Iterator[Outcome]:
    """Report what the block raises to the launcher, or to stderr where there is none.

    A library's error about a full disk is the user's to mend, like a UserError.
    """
    outcome = Outcome()
    try:
        yield outcome
    except UserError as error:
        outcome.exit_code = error.exit_code
        _report(error.exit_code, str(error))
    except Exception as error:
        outcome.exit_code = 1
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            where = f" ({error.filename})" if error.filename else ""
            _report(1, f"{error.strerror}{where}: make room, or choose another output=DIR")
            return
        is_echo = any(sign in str(error) for sign in _PEER_LOST)
        _report(1, f"in the worker of rank {_rank()}\n{traceback.format_exc()}", is_echo)


def has_launcher() -> bool:
    """Whether `shardemb` started this worker, and tells the user how it ended."""
    return FAILURE_FILE in os.environ


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _report(exit_code: int, message: str, is_echo: bool = False) -> None:
    failure = Failure(exit_code, message, time.time(), is_echo)
    target = os.environ.get(FAILURE_FILE)
    if target:
        partial = Path(target + ".partial")
        partial.write_text(json.dumps(vars(failure)))
        partial.rename(target)
    else:
        print(f"error (rank {_rank()}): {message}", file=sys.stderr)
