"""What a worker and a launcher that starts workers again tell each other while training goes on.

The launcher names the run in RUN_ID. The worker keeps a file beside its reports: its contents are
the last step, its age is how long the process has not run. SIGTERM asks for a planned stop.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from planner import UserError
from shardemb.failure import REPORT_FOLDER

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

RUN_ID = "SHARDEMB_RUN_ID"
BEAT_SECONDS = 1.0


class StoppedError(UserError):
    """Training has stopped because it was asked to, with a checkpoint to go on from."""

    exit_code = 128 + signal.SIGTERM


def heartbeat_file(folder: Path, local_rank: int | str) -> Path:
    return folder / f"rank_{local_rank}.step"


def read_heartbeat(file: Path) -> tuple[int, float] | None:
    """The worker's last step, and for how many seconds it has not run; None before it runs."""
    try:
        return int(file.read_text() or 0), time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None


class Supervision:
    """A worker's side. Make one early, in the main thread: what hangs while it imports counts."""

    def __init__(self) -> None:
        path = heartbeat_file(Path(os.environ[REPORT_FOLDER]), os.environ["LOCAL_RANK"])
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY)
        self._launcher = os.getppid()
        self._is_asked = False
        self._group: dist.ProcessGroup | None = None
        self._voting: tuple[dist.Work, torch.Tensor] | None = None
        self.has_stopped = False
        signal.signal(signal.SIGTERM, self._ask)
        threading.Thread(target=self._beat, daemon=True).start()

    @staticmethod
    def wanted() -> bool:
        """Whether a launcher supervises this worker."""
        return RUN_ID in os.environ

    def _ask(self, signum: int, frame: object) -> None:
        self._is_asked = True

    def _beat(self) -> None:
        while os.getppid() == self._launcher:
            os.utime(self._file)
            time.sleep(BEAT_SECONDS)
        os._exit(1)  # nobody is left who would end this process

    def tell(self, step: int) -> None:
        """What is trained so far."""
        os.pwrite(self._file, f"{step:<20}".encode(), 0)

    def stops_after(self, step: int) -> bool:
        """Whether all ranks stop now, of which any may have been asked; a collective.

        What is agreed on is a step old, so that no step waits for it.
        """
        import torch
        import torch.distributed as dist

        self.tell(step)
        if self._group is None:  # not training's: its collectives come in another order
            self._group = dist.new_group(backend="gloo")
        before, asked = self._voting, torch.tensor([int(self._is_asked)])
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._voting = work, asked
        if before:
            before[0].wait()
            self.has_stopped = bool(before[1].item())
        return self.has_stopped
