"""torch's elastic agent with this project's rules of when to start workers again.

What is overridden are the methods that torch.distributed.elastic documents for subclasses.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, Std

from launch.logs import WorkerLogs
from launch.meeting import Meeting
from launch.ports import PortWarning
from launch.recovery import Recovery, WorkerError
from launch.worker import (
    failure_of_process,
    failure_of_silence,
    first_cause,
    forget_reports,
    last_step,
)
from shardemb.failure import Failure, failure_file
from shardemb.supervision import StoppedError

# After one worker has ended: time for the others to end or report.
GRACE_SECONDS = 1.0
_WATCH_SECONDS = 1.0  # between questions to the store
_SILENT_SECONDS = 3.0  # a host that lives says so each second


class Agent(LocalElasticAgent):
    """The workers of this host: kept running, started again, or ended with the reason."""

    def __init__(
        self,
        spec: WorkerSpec,
        meeting: Meeting,
        folder: Path,
        recovery: Recovery,
        hang_seconds: float,
        output: Path,
    ) -> None:
        self._folder = folder / "reports"
        self._folder.mkdir()
        self._files = _LogFiles(log_dir=str(folder / "logs"), redirects=Std.ALL)
        super().__init__(spec, self._files)
        self.logs = WorkerLogs(self._folder, output, meeting.run_id)
        self._meeting, self._recovery, self._hang_seconds = meeting, recovery, hang_seconds
        self._next_question, self._hosts = 0.0, 0
        self._left_out: set[str] = set()  # hosts that were lost before
        self.is_stopping, self._ports = False, PortWarning()
        self._told: set[int] = set()  # processes that were asked to stop

    def ask_to_stop(self) -> bool:
        """Have the workers save and end, soon; whether there are any."""
        self.is_stopping = True
        return self.get_worker_group().state == WorkerState.HEALTHY

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        forget_reports(self._folder, range(worker_group.spec.local_world_size))
        self._left_out = set(self._meeting.lost_hosts(_SILENT_SECONDS))
        hosts = worker_group.group_world_size or 0
        if self._hosts not in (0, hosts):
            print(f"going on with {hosts} hosts", file=sys.stderr, flush=True)
        self._hosts = hosts
        self.logs.show()
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self.logs.begin(self._files.by_rank)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Its own method, where one has failed, waits half a minute for the others to end: it is
        asked when all have."""
        self._pass_on_stop(worker_group)
        self.logs.show()
        if self.logs.has_begun:
            self._ports.say(worker.id for worker in worker_group.workers)
        failures = self._failures(worker_group)
        if failures or self._is_cut_off():
            failures = self._wait_for_cause(worker_group, failures)
            step = last_step(self._folder, range(len(worker_group.workers)))
            self._shutdown()
            self._judge(failures, step)
            return RunResult(state=WorkerState.FAILED)
        if any(_exit_code(worker.id) is None for worker in worker_group.workers):
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        """At once: workers wait in collectives for others, where no other signal reaches them."""
        super()._shutdown(signal.SIGKILL, timeout)

    def _pass_on_stop(self, worker_group: WorkerGroup) -> None:
        if not self.is_stopping:
            return
        for worker in worker_group.workers:
            if worker.id not in self._told:
                self._told.add(worker.id)
                if _exit_code(worker.id) is None:
                    os.kill(worker.id, signal.SIGTERM)

    def _failures(self, worker_group: WorkerGroup) -> list[Failure]:
        found = []
        for worker in worker_group.workers:
            report = failure_file(self._folder, worker.local_rank)
            code = _exit_code(worker.id)
            *_, errors = self._files.by_rank[worker.global_rank]
            failure = failure_of_process(worker.global_rank, report, code, errors)
            if failure is None and code is None:
                place = worker.global_rank, self._folder, worker.local_rank
                failure = failure_of_silence(*place, self._hang_seconds)
            if failure:
                found.append(self.logs.named(failure, worker.global_rank))
        return found

    def _wait_for_cause(self, worker_group: WorkerGroup, failures: list[Failure]) -> list[Failure]:
        """Where an echo came first: what else fails, here or on another host."""
        deadline = time.monotonic() + GRACE_SECONDS
        while all(f.is_echo for f in failures) and time.monotonic() < deadline:
            self._raise_stop_of_another()
            time.sleep(0.05)
            failures = self._failures(worker_group)
        return failures

    def _judge(self, failures: list[Failure], step: int) -> None:
        """Return where workers are to be started again; else WorkerError, here and elsewhere."""
        self._raise_stop_of_another()
        if not failures or (cause := first_cause(failures)).is_echo:
            return
        if self.is_stopping and not cause.is_final:
            cause = Failure(StoppedError.exit_code, "ended by SIGTERM", time.time(), is_final=True)
        try:
            self._recovery.allow(cause, step)
        except WorkerError as error:
            end = Failure(error.exit_code, error.message, time.time(), is_final=True, log=error.log)
            self._meeting.stop(end)
            raise
        print(
            f"{cause.message.splitlines()[0]}; starting the workers again "
            f"({self._recovery.restarts} of {self._recovery.max_restarts})",
            file=sys.stderr,
            flush=True,
        )

    def _raise_stop_of_another(self) -> None:
        if reason := self._meeting.stopped():
            raise WorkerError(reason.message, reason.exit_code, reason.log)

    def _is_cut_off(self) -> bool:
        """Whether a host of these ranks is lost, for which collectives would wait; asked now and
        then."""
        if time.monotonic() < self._next_question:
            return False
        self._next_question = time.monotonic() + _WATCH_SECONDS
        self._raise_stop_of_another()
        return bool(set(self._meeting.lost_hosts(self._hang_seconds)) - self._left_out)


class _LogFiles(DefaultLogsSpecs):
    """Knows the files that each rank prints into, stderr's last."""

    by_rank: dict[int, list[Path]]

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        files = super().reify(envs)
        self.by_rank = {
            int(envs[local_rank]["RANK"]): [Path(out), Path(files.stderrs[local_rank])]
            for local_rank, out in files.stdouts.items()
        }
        return files


def _exit_code(pid: int) -> int | None:
    """As subprocess has it, of a child that stays to be waited for; None while it runs."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the agent has waited for it
        return 0
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
