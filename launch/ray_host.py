"""One host of a run under Ray: an actor that starts its workers and says how they are."""

from __future__ import annotations

import json
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.endpoint import network_environment
from launch.forking import Template
from launch.host_facts import HostFacts, facts_of
from launch.logs import WorkerLogs
from launch.ray_metrics import RayMetrics
from launch.shared_storage import Mark, missing_marks, place_marks, remove_marks
from launch.worker import Worker, failure_of_silence, forget_reports, last_step
from shardemb.config import RunConfig, load_config
from shardemb.failure import Failure, directory_note, failure_file
from shardemb.metrics.wall_time import LAUNCHED
from shardemb.run_directory import Created, close_failed
from shardemb.supervision import RUN_ID


@dataclass(frozen=True)
class HostState:
    """What a host's workers did since they were asked before."""

    failures: list[Failure]
    is_done: bool  # all have ended
    step: int  # the last that any has trained
    shown: str  # what its first worker has printed
    directory: str | None  # what a worker has noted of the run directory


@dataclass(frozen=True)
class Place:
    """Of a host among the hosts of a run."""

    index: int
    count: int
    master_address: str
    master_port: int


class Host:
    """`config` is the text of a run config, with all overrides in it; `launched` is when, as unix
    time."""

    def __init__(self, config: str, run_id: str, address: str, launched: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="shardemb-")
        self._folder = Path(self._scratch.name)
        (self._folder / "config.yaml").write_text(config)
        self._config: RunConfig = load_config(self._folder / "config.yaml")
        self._run_id, self._address, self._launched = run_id, address, launched
        self._template = Template(self._folder / "template.log")
        self._workers: list[Worker] = []
        self._logs = WorkerLogs(self._folder, self._config.output, run_id)
        self._shown = ""  # and not yet asked for
        self._metrics: RayMetrics | None = None

    def name(self) -> str:
        return socket.gethostname()

    def facts(self) -> HostFacts:
        return facts_of(self.name(), self._config, self._config.launch.nproc_per_node)

    def place_marks(self) -> list[Mark]:
        return place_marks(self._config, self._run_id)

    def missing_marks(self, marks: Sequence[Mark]) -> list[str]:
        return missing_marks(self._config, marks)

    def remove_marks(self, marks: Sequence[Mark]) -> None:
        remove_marks(self._config, marks)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind((self._address, 0))
            return int(probe.getsockname()[1])

    def start(self, place: Place) -> None:
        """The workers of this host, which is one of several."""
        count = self._config.launch.nproc_per_node
        self._shown += self._logs.copy()
        forget_reports(self._folder, range(count))
        self._metrics = RayMetrics() if place.index == 0 else None
        overrides = ["launch.metrics_port=null"]  # Ray has its own
        arguments = ["-m", "shardemb.train", str(self._folder / "config.yaml"), *overrides]
        common: dict[str, int | str] = {
            "WORLD_SIZE": place.count * count,
            "LOCAL_WORLD_SIZE": count,
            "GROUP_RANK": place.index,
            "MASTER_ADDR": place.master_address,
            "MASTER_PORT": place.master_port,
            RUN_ID: self._run_id,
            LAUNCHED: self._launched,
            **network_environment(self._address),
        }
        self._workers = [
            Worker(
                arguments,
                {**common, "RANK": place.index * count + local_rank, "LOCAL_RANK": local_rank},
                self._folder,
                self._template,
            )
            for local_rank in range(count)
        ]
        self._logs.begin({worker.rank: worker.log for worker in self._workers})

    def state(self) -> HostState:
        found = [self._failure(worker) for worker in self._workers]
        state = HostState(
            failures=[failure for failure in found if failure],
            is_done=all(worker.process.poll() is not None for worker in self._workers),
            step=last_step(self._folder, range(len(self._workers))),
            shown=self._new_lines(),
            directory=self._directory(),
        )
        if self._metrics and state.directory:
            self._metrics.show(self._config.output / "metrics.jsonl")
        return state

    def _failure(self, worker: Worker) -> Failure | None:
        failure = worker.failure()
        if failure is None and worker.process.poll() is None:
            seconds = self._config.launch.hang_seconds
            failure = failure_of_silence(worker.rank, self._folder, worker.local_rank, seconds)
        return self._logs.named(failure, worker.rank) if failure else None

    def _new_lines(self) -> str:
        text, self._shown = self._shown + self._logs.copy(), ""
        return text

    def _directory(self) -> str | None:
        notes = [directory_note(failure_file(self._folder, w.local_rank)) for w in self._workers]
        return next((note.read_text() for note in notes if note.exists()), None)

    def ask_to_stop(self) -> None:
        """Have the workers save and end."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.process.wait()
        self._shown += self._logs.copy()

    def result(self) -> str | None:
        """result.json, of a run that has come to its end."""
        path = self._config.output / "result.json"
        return path.read_text() if path.exists() else None

    def close_failed(self, directory: str, message: str) -> None:
        """End the run directory that `HostState.directory` is about."""
        close_failed(Created(**json.loads(directory)), message)
