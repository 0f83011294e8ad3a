"""`shardemb launch ray`: one actor on each host; this process watches over them.

Ray finds the hosts and carries messages. Ranks, recovery and checkpoints are the same as under
every other launcher.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.host_facts import refuse_differences
from launch.local import message_of
from launch.ray_cluster import Node, connected, nodes
from launch.ray_host import Host, HostState, Place
from launch.recovery import Recovery, WorkerError
from launch.shared_storage import refuse_unshared
from launch.worker import first_cause
from planner import RequestError, UserError
from shardemb.config import RunConfig
from shardemb.failure import Failure
from shardemb.metrics.wall_time import LAUNCHED
from shardemb.supervision import StoppedError

POLL_SECONDS = 0.25
GRACE_SECONDS = 1.0
_RETURN_SECONDS = 5.0  # between looks for hosts that have come


class LostHostError(Exception):
    """Hosts that do not answer."""

    def __init__(self, lost: Sequence[Node]) -> None:
        super().__init__("no answer from " + ", ".join(node.address for node in lost))
        self.lost = lost


class MoreHostsError(Exception):
    """Training has stopped, with a checkpoint, to go on with hosts that have come."""


def run_ray(config: RunConfig, num_hosts: int | None, address: str | None) -> str:
    """Train on `num_hosts` hosts of the cluster at `address`, by default all; its result.json.

    Without an address, on a cluster of this machine alone.
    """
    with connected(address, config.launch.nproc_per_node):
        return _Launcher(config, num_hosts).run()


class _Launcher:
    def __init__(self, config: RunConfig, num_hosts: int | None) -> None:
        self._config, self._run_id, self._begun = config, uuid.uuid4().hex, time.time()
        self._recovery = Recovery(config.launch.max_restarts)
        self._team: dict[str, _Member] = {}  # by the id of the node
        self._lost: set[str] = set()
        self._directory: str | None = None
        self._is_stopping = self._is_watching = False
        able = self._able_nodes()
        self._wanted = num_hosts or config.elastic.max_hosts or max(len(able), 1)
        self._fewest = config.elastic.min_hosts or self._wanted
        self._most = config.elastic.max_hosts or self._wanted
        if not self._fewest <= self._wanted <= self._most:
            raise RequestError(
                f"--num-hosts {self._wanted} is not between elastic.min_hosts ({self._fewest}) and "
                f"elastic.max_hosts ({self._most})"
            )
        if len(able) < self._wanted:
            raise UserError(self._too_few(able))

    def run(self) -> str:
        earlier = signal.signal(signal.SIGTERM, self._ask_to_stop)
        try:
            while True:
                try:
                    self._is_watching = False
                    self._gather()
                    self._start()
                    self._is_watching = True
                    return self._watch()
                except LostHostError as error:
                    self._drop(error.lost)
                except MoreHostsError:
                    _say("going on with the hosts that have come")
        except BaseException as error:
            self._end(message_of(error))
            raise
        finally:
            signal.signal(signal.SIGTERM, earlier)

    def _ask_to_stop(self, signum: int, frame: object) -> None:
        if self._is_stopping or not self._is_watching:
            raise SystemExit(128 + signum)
        self._is_stopping = True

    # --- Hosts

    def _able_nodes(self) -> list[Node]:
        """Nodes that have room for their workers."""
        workers = self._config.launch.nproc_per_node
        return [
            node
            for node in nodes()
            if node.id not in self._lost and (node.gpus if self._on_gpus else node.cpus) >= workers
        ]

    @property
    def _on_gpus(self) -> bool:
        device, workers = self._config.launch.device, self._config.launch.nproc_per_node
        return device == "cuda" or (
            device == "auto" and all(node.gpus >= workers for node in nodes())
        )

    def _too_few(self, able: Sequence[Node]) -> str:
        workers, what = self._config.launch.nproc_per_node, "GPUs" if self._on_gpus else "CPUs"
        found = "; ".join(map(str, nodes()))
        return (
            f"{self._wanted} hosts with {workers} {what} each are needed, and the cluster has "
            f"{len(able)} ({found}); lower --num-hosts or --workers-per-host, or add hosts"
        )

    def _gather(self) -> None:
        """As many hosts as there are, of those wanted; compare those that are new."""
        deadline = time.monotonic() + self._config.launch.wait_seconds
        while len(able := self._able_nodes()) < self._fewest:
            if time.monotonic() > deadline:
                raise UserError(
                    f"a host was lost, and after {self._config.launch.wait_seconds:g} s "
                    f"(launch.wait_seconds) there are {len(able)} of {self._fewest}; go on with "
                    "fewer by elastic.min_hosts, or later with checkpoint.resume=latest"
                )
            time.sleep(POLL_SECONDS)
        able.sort(key=lambda node: node.id not in self._team)  # those that are here stay
        chosen = able[: self._most if self._team else self._wanted]
        for node in chosen:
            if node.id not in self._team:
                self._team[node.id] = _Member(node, self._actor(node))
        wait_seconds = self._config.launch.wait_seconds  # the first answer takes imports
        refuse_differences(self._all(lambda host: host.facts.remote(), wait_seconds))
        if len(self._team) > 1:
            self._refuse_unshared()

    def _actor(self, node: Node) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        workers = self._config.launch.nproc_per_node
        room = {"num_gpus" if self._on_gpus else "num_cpus": workers}
        options = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
        made = ray.remote(Host).options(**room, **options)
        launched = os.environ.get(LAUNCHED, str(self._begun))
        return made.remote(self._config.to_yaml(), self._run_id, node.address, launched)

    def _refuse_unshared(self) -> None:
        marks = self._first(lambda host: host.place_marks.remote())
        try:
            missing = self._all(lambda host: host.missing_marks.remote(marks))
        finally:
            self._first(lambda host: host.remove_marks.remote(marks))
        names = self._all(lambda host: host.name.remote())
        refuse_unshared(self._config, names[0], dict(zip(names, missing, strict=True)))

    def _all(self, call: Callable[[Any], Any], seconds: float | None = None) -> list[Any]:
        """What `call` gives for each host; LostHostError where one does not answer in time, by
        default launch.hang_seconds."""
        return self._ask(list(self._team.values()), call, seconds)

    def _first(self, call: Callable[[Any], Any]) -> Any:
        """What `call` gives for the first host; LostHostError as for all."""
        return self._ask(list(self._team.values())[:1], call, None)[0]

    def _ask(
        self, members: Sequence[_Member], call: Callable[[Any], Any], seconds: float | None
    ) -> list[Any]:
        import ray

        if not members:
            return []
        answers = [call(member.actor) for member in members]
        seconds = seconds or self._config.launch.hang_seconds
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=seconds)
        found, lost = [], []
        for member, answer in zip(members, answers, strict=True):
            try:
                found.append(ray.get(answer, timeout=0 if answer in ready else 0.1))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                lost.append(member.node)
        if lost:
            raise LostHostError(lost)
        return found

    def _drop(self, lost: Sequence[Node]) -> None:
        """Go on without hosts that are lost: LostHostError is not the end, if others will do."""
        import ray

        for node in lost:
            _say(f"the host {node.address} is lost: it does not answer")
            self._lost.add(node.id)
            member = self._team.pop(node.id, None)
            if member:
                ray.kill(member.actor)
        try:
            self._all(lambda host: host.kill.remote())
        except LostHostError as error:
            self._drop(error.lost)

    # --- Workers

    def _start(self) -> None:
        members = list(self._team.values())
        port = self._first(lambda host: host.free_port.remote())
        address = members[0].node.address
        places = iter(Place(index, len(members), address, port) for index in range(len(members)))
        self._all(lambda host: host.start.remote(next(places)))
        _say(
            f"{len(members)} hosts ({', '.join(m.node.address for m in members)}), "
            f"{self._config.launch.nproc_per_node} workers on each"
        )

    def _watch(self) -> str:
        """Until the run is done; workers that fail are started again. result.json."""
        is_told, is_growing = False, False
        look = time.monotonic() + _RETURN_SECONDS
        while True:
            states = self._states()
            failures = [failure for state in states for failure in state.failures]
            if failures:
                self._judge(failures, is_growing)
                self._start()
                is_told = False
            elif all(state.is_done for state in states):
                return self._result()
            if len(self._team) < self._most and time.monotonic() > look:
                look = time.monotonic() + _RETURN_SECONDS
                is_growing = is_growing or len(self._able_nodes()) > len(self._team)
            if (self._is_stopping or is_growing) and not is_told:
                self._all(lambda host: host.ask_to_stop.remote())
                is_told = True
            time.sleep(POLL_SECONDS)

    def _states(self) -> list[HostState]:
        states: list[HostState] = self._all(lambda host: host.state.remote())
        print(states[0].shown, end="", file=sys.stderr, flush=True)
        for state in states:
            self._directory = state.directory or self._directory
        return states

    def _judge(self, failures: list[Failure], is_growing: bool) -> None:
        """End all workers; return where they are to be started again."""
        deadline = time.monotonic() + GRACE_SECONDS
        states: list[HostState] = []
        while all(failure.is_echo for failure in failures) and time.monotonic() < deadline:
            states = self._states()
            failures = [failure for state in states for failure in state.failures]
            time.sleep(0.05)
        cause = first_cause(failures)
        states = self._states()
        self._all(lambda host: host.kill.remote())
        if is_growing and cause.exit_code == StoppedError.exit_code and not self._is_stopping:
            raise MoreHostsError
        if self._is_stopping and not cause.is_final:
            raise WorkerError("ended by SIGTERM", StoppedError.exit_code)
        self._recovery.allow(cause, max(state.step for state in states))
        _say(
            f"{cause.message.splitlines()[0]}; starting the workers again "
            f"({self._recovery.restarts} of {self._recovery.max_restarts})"
        )

    def _result(self) -> str:
        result = self._first(lambda host: host.result.remote())
        assert isinstance(result, str), "workers that end well have written it"
        return result

    def _end(self, message: str) -> None:
        """After a failure: no worker stays, and the run directory says why."""
        try:
            self._all(lambda host: host.kill.remote())
            if self._directory and self._team:
                self._first(lambda host: host.close_failed.remote(self._directory, message))
        except LostHostError:
            return  # its workers end with it


@dataclass(frozen=True)
class _Member:
    node: Node
    actor: Any = field(repr=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
