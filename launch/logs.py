"""What workers print: kept in the run directory, a file for each rank; the first's is shown.

Workers print into files of their launcher's scratch folder, for the run directory comes into being
later, or never; the launcher copies what is new whenever it looks after them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardemb.failure import Failure
from shardemb.metrics.terminal import TERMINAL
from shardemb.run_directory import begun_directory

_STDERR = 2  # the descriptor: sys.stderr has none in a notebook
_CLEAR_LINE = b"\r\x1b[2K"  # of a progress bar, which draws itself again below


def terminal_environment() -> dict[str, str]:
    """For the rank that draws a progress bar: on this process's terminal, if it has one."""
    return {TERMINAL: os.ttyname(_STDERR)} if os.isatty(_STDERR) else {}


class WorkerLogs:
    """Those of one host's workers, which report in `reports`; kept where they write a run."""

    def __init__(self, reports: Path, output: Path | None = None, run_id: str | None = None):
        self._reports, self._output, self._run_id = reports, output, run_id
        self._sources: list[_Source] = []
        self._directory: Path | None = None
        self._kept: dict[int, Path] = {}  # by rank
        self._attempts = 0

    @property
    def has_begun(self) -> bool:
        """Whether there is a run directory: training has reported its first step."""
        return self._directory is not None

    def begin(self, files: Mapping[int, Path]) -> None:
        """New workers print into these, by rank; the first rank's is shown.

        What earlier ones have printed is to be copied before.
        """
        self._attempts += 1
        mark = f"attempt {self._attempts}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self._sources = [_Source(r, path, self._mark(r, mark)) for r, path in files.items()]

    def _mark(self, rank: int, what: str) -> bytes:
        return f"--- rank {rank} on {socket.gethostname()}, {what}\n".encode()

    def copy(self) -> str:
        """Keep what is new; what the first rank has printed, whole lines of it."""
        self._directory = self._directory or begun_directory(
            self._reports, self._output, self._run_id
        )
        if self._directory:
            for source in self._sources:
                self._keep(source, self._directory / "logs")
        if not self._sources:
            return ""
        first = self._sources[0]
        return _prefixed(first.lines(), first.rank)

    def show(self) -> None:
        """Copy, and show on stderr."""
        text = self.copy().encode()
        if text:
            os.write(_STDERR, (_CLEAR_LINE if os.isatty(_STDERR) else b"") + text)

    def named(self, failure: Failure, rank: int) -> Failure:
        """With the log of the rank that failed; what is a user's mistake needs none."""
        kept = self._kept.get(rank)
        return failure if failure.is_final or not kept else replace(failure, log=str(kept))

    def _keep(self, source: _Source, folder: Path) -> None:
        with suppress(OSError):  # a full disk is told by what the run itself writes
            new = source.mark + source.unread(source.kept)
            if not new:
                return
            folder.mkdir(exist_ok=True)
            path = self._kept.setdefault(source.rank, folder / f"rank_{source.rank}.log")
            with path.open("ab", buffering=0) as file:
                source.kept += file.write(new) - len(source.mark)
            source.mark = b""


@dataclass
class _Source:
    """One file that a worker prints into."""

    rank: int
    path: Path
    mark: bytes  # written before what it prints
    kept: int = field(default=0, init=False)  # bytes
    shown: int = field(default=0, init=False)

    def unread(self, position: int) -> bytes:
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(position)
            return file.read()
        return b""

    def lines(self) -> str:
        """Not shown before."""
        new = self.unread(self.shown)
        whole = new[: new.rfind(b"\n") + 1]
        self.shown += len(whole)
        return whole.decode(errors="replace")


def _prefixed(text: str, rank: int) -> str:
    """Each line, unless it is of rank 0, which speaks for the run."""
    return "".join(f"[rank {rank}] {line}" if rank else line for line in text.splitlines(True))
