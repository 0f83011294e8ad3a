"""Whether workers that have failed are started again."""

from __future__ import annotations

from pathlib import Path

from planner import UserError
from shardemb.failure import Failure


class WorkerError(UserError):
    """A worker ended before its work was done. Its log is named as long as it is there."""

    def __init__(self, message: str, exit_code: int, log: str | None = None) -> None:
        super().__init__(message)
        self.message, self.exit_code, self.log = message, exit_code, log

    def __str__(self) -> str:
        is_kept = self.log is not None and Path(self.log).exists()
        return f"{self.message.rstrip()}\nits whole log: {self.log}" if is_kept else self.message


class Recovery:
    """Counts the failures of one run."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts, self.restarts = max_restarts, 0
        self._last: tuple[int, str] | None = None

    def allow(self, failure: Failure, step: int) -> None:
        """Return where workers that failed after `step` may be started again; else WorkerError."""
        if failure.is_final:
            raise WorkerError(failure.message, failure.exit_code, failure.log)
        this = step, failure.message.splitlines()[0]
        if this == self._last:
            raise WorkerError(
                f"failed twice after step {step}, so the workers are not started again: "
                f"{failure.message}",
                failure.exit_code,
                failure.log,
            )
        if self.restarts == self.max_restarts:
            raise WorkerError(
                f"failed again after launch.max_restarts ({self.max_restarts}) restarts: "
                f"{failure.message}",
                failure.exit_code,
                failure.log,
            )
        self._last = this
        self.restarts += 1
