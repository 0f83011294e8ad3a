"""What Linux can do for processes: end with the one that started them, and have a name."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def libc() -> ctypes.CDLL | None:
    """Loaded before a fork, where it is needed after."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int, library: ctypes.CDLL | None) -> None:
    """Linux: have the kernel kill this process, a child of `parent`, when that dies."""
    if library is None:
        return
    pr_set_pdeathsig = 1
    library.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def name_process(name: str, library: ctypes.CDLL | None) -> None:
    """Linux: for `ps` and `top`, of which they show 15 letters."""
    if library is not None:
        pr_set_name = 15
        library.prctl(pr_set_name, name.encode())
