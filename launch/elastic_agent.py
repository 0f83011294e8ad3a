"""torch's elastic agent with this project's workers, and rules of when to start them again.

What is written here are the methods that torch.distributed.elastic documents for subclasses.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)

from launch.forking import Template
from launch.logs import WorkerLogs
from launch.meeting import Meeting
from launch.ports import PortWarning
from launch.recovery import Recovery, WorkerError
from launch.worker import Worker, failure_of_silence, first_cause, forget_reports, last_step
from shardemb.failure import Failure
from shardemb.supervision import StoppedError

# After one worker has ended: time for the others to end or report.
GRACE_SECONDS = 1.0
_WATCH_SECONDS = 1.0  # between questions to the store
_SILENT_SECONDS = 3.0  # a host that lives says so each second


class Agent(SimpleElasticAgent):
    """The workers of this host: kept running, started again, or ended with the reason.

    They report in `folder`, and have `environment` beside this process's own.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        meeting: Meeting,
        folder: Path,
        recovery: Recovery,
        hang_seconds: float,
        output: Path,
        environment: Mapping[str, str],
    ) -> None:
        super().__init__(spec)
        self._folder, self._environment = folder, environment
        self._template = Template(folder / "template.log")
        self._workers: list[Worker] = []
        self.logs = WorkerLogs(folder, output, meeting.run_id)
        self._meeting, self._recovery, self._hang_seconds = meeting, recovery, hang_seconds
        self._next_question, self._hosts = 0.0, 0
        self._left_out: set[str] = set()  # hosts that were lost before
        self.is_stopping, self._ports = False, PortWarning()
        self._told: set[int] = set()  # processes that were asked to stop, of these workers

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
        self._told.clear()
        self._workers = [
            Worker(worker_group.spec.args, place, self._folder, self._template)
            for place in self._places(worker_group)
        ]
        self.logs.begin({worker.rank: worker.log for worker in self._workers})
        return {worker.local_rank: worker.process.pid for worker in self._workers}

    def _places(self, worker_group: WorkerGroup) -> list[dict[str, int | str]]:
        return [
            {
                **self._environment,
                "RANK": worker.global_rank,
                "WORLD_SIZE": worker.world_size,
                "LOCAL_RANK": worker.local_rank,
                "LOCAL_WORLD_SIZE": worker_group.spec.local_world_size,
                "GROUP_RANK": str(worker_group.group_rank),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
            }
            for worker in worker_group.workers
        ]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._pass_on_stop()
        self.logs.show()
        if self.logs.has_begun:
            self._ports.say(worker.process.pid for worker in self._workers)
        failures = self._failures()
        if failures or self._is_cut_off():
            failures = self._wait_for_cause(failures)
            step = last_step(self._folder, range(len(self._workers)))
            self._stop_workers(worker_group)
            self._judge(failures, step)
            return RunResult(state=WorkerState.FAILED)
        if any(worker.process.poll() is None for worker in self._workers):
            return RunResult(state=WorkerState.HEALTHY)
        done = {worker.rank: None for worker in self._workers}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=done)

    def _stop_workers(self, *_: Any, **__: Any) -> None:
        """At once: workers wait in collectives for others, where no other signal reaches them."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.process.wait()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        self._stop_workers()
        self._template.close()

    def _pass_on_stop(self) -> None:
        for worker in self._workers if self.is_stopping else ():
            if worker.rank not in self._told and worker.process.poll() is None:
                self._told.add(worker.rank)
                worker.process.send_signal(signal.SIGTERM)

    def _failures(self) -> list[Failure]:
        found = []
        for worker in self._workers:
            failure = worker.failure()
            if failure is None and worker.process.poll() is None:
                place = worker.rank, self._folder, worker.local_rank
                failure = failure_of_silence(*place, self._hang_seconds)
            if failure:
                found.append(self.logs.named(failure, worker.rank))
        return found

    def _wait_for_cause(self, failures: list[Failure]) -> list[Failure]:
        """Where an echo came first: what else fails, here or on another host."""
        deadline = time.monotonic() + GRACE_SECONDS
        while all(f.is_echo for f in failures) and time.monotonic() < deadline:
            self._raise_stop_of_another()
            time.sleep(0.05)
            failures = self._failures()
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
