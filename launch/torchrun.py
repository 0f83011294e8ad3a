"""`shardemb launch torchrun` on one host: meet the others, compare, run this host's workers."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import WorkerSpec, WorkerState
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from launch.elastic_agent import Agent
from launch.endpoint import network_environment, parse_endpoint
from launch.host_facts import HostFacts, facts_of, refuse_differences
from launch.local import message_of
from launch.logs import terminal_environment
from launch.meeting import Meeting
from launch.recovery import Recovery, WorkerError
from launch.shared_storage import (
    Mark,
    missing_marks,
    place_marks,
    refuse_unshared,
    remove_marks,
)
from launch.worker import close_directory
from planner import RequestError, Topology, UserError
from shardemb.config import RunConfig
from shardemb.failure import Failure
from shardemb.preflight import check_run
from shardemb.supervision import RUN_ID

# Our own rules count restarts; the agent's limit is one that they never come to.
_AGENT_RESTARTS = 10**6
# After the fewest hosts that will do have come: for more.
_LAST_CALL_SECONDS = 5
_KEEP_ALIVE_SECONDS = 2


def run_torchrun(config: RunConfig, arguments: Sequence[str], nnodes: int, endpoint: str) -> None:
    """Run `python ARGUMENTS` as this host's part of `nnodes` hosts; return when all is done.

    Every host calls it. UserError on all of them where the hosts differ, or the run fails.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # what it does is told
    workers, where = config.launch.nproc_per_node, parse_endpoint(endpoint)
    check_run(config, Topology(world_size=nnodes * workers, local_world_size=workers))
    _say(f"waiting for {nnodes} hosts at {where}")
    meeting = Meeting(where, config.launch.wait_seconds)
    try:
        _refuse_unsuitable(meeting, config, nnodes)
        meeting.begin_to_watch(config.launch.hang_seconds, partial(_end_cut_off, meeting))
        _say(f"starting {workers} workers on each of {nnodes} hosts")
        with tempfile.TemporaryDirectory(prefix="shardemb-") as scratch:
            _run_agent(meeting, config, arguments, nnodes, Path(scratch))
    finally:
        meeting.leave()


def _refuse_unsuitable(meeting: Meeting, config: RunConfig, nnodes: int) -> None:
    """UserError, the same on all hosts, where they differ or do not share what the run writes."""
    wait, is_late = config.launch.wait_seconds, meeting.index >= nnodes
    here = facts_of(meeting.host, config, config.launch.nproc_per_node)
    hosts = [HostFacts(**h) for h in meeting.gather("facts", asdict(here), nnodes, wait)]
    refuse_differences([*hosts, here] if is_late else hosts)
    if nnodes == 1:
        return
    marks = place_marks(config, meeting.run_id) if meeting.index == 0 else []
    try:
        placed = meeting.gather("marks", [asdict(mark) for mark in marks], 1, wait)[0]
        missing = missing_marks(config, [Mark(**mark) for mark in placed])
        unseen = meeting.gather("unseen", missing, nnodes, wait)
    finally:
        remove_marks(config, marks)
    by_host = {host.host: keys for host, keys in zip(hosts, unseen, strict=True)}
    refuse_unshared(config, hosts[0].host, by_host)


def _run_agent(
    meeting: Meeting, config: RunConfig, arguments: Sequence[str], nnodes: int, folder: Path
) -> None:
    launch = config.launch
    # Or new workers look for the old ones (torch 2.13).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    handler = DynamicRendezvousHandler.from_backend(
        run_id=meeting.run_id,
        store=meeting.store,
        backend=C10dRendezvousBackend(meeting.store, meeting.run_id),
        min_nodes=config.elastic.min_hosts or nnodes,
        max_nodes=nnodes,
        local_addr=meeting.address,
        timeout=RendezvousTimeout(
            join=timedelta(seconds=launch.wait_seconds),
            last_call=timedelta(seconds=_LAST_CALL_SECONDS),
        ),
        keep_alive_interval=_KEEP_ALIVE_SECONDS,
    )
    spec = WorkerSpec(
        role="worker",
        local_world_size=launch.nproc_per_node,
        rdzv_handler=handler,
        entrypoint=sys.executable,
        args=tuple(arguments),
        max_restarts=_AGENT_RESTARTS,
        local_addr=meeting.address,
    )
    agent = Agent(
        spec,
        meeting,
        folder,
        Recovery(launch.max_restarts),
        launch.hang_seconds,
        config.output,
        {RUN_ID: meeting.run_id, **terminal_environment(), **network_environment(meeting.address)},
    )
    try:
        try:
            with _signals(agent):
                agent.run()
        finally:
            agent.logs.show()
        if agent.get_worker_group().state != WorkerState.SUCCEEDED:
            raise RendezvousClosedError
    except BaseException as error:
        reason = _as_told(error, meeting, launch.wait_seconds)
        close_directory(folder, message_of(reason))
        if reason is error:
            raise
        raise reason from error
    finally:
        _close(handler)


def _as_told(error: BaseException, meeting: Meeting, wait_seconds: float) -> BaseException:
    """What to tell the user of what ended the agent, after telling the other hosts."""
    try:
        if isinstance(error, RendezvousClosedError) and (reason := meeting.stopped()):
            return WorkerError(reason.message, reason.exit_code, reason.log)
        if isinstance(error, RendezvousTimeoutError):
            error = UserError(
                f"a host was lost and has not come back within {wait_seconds:g} s "
                "(launch.wait_seconds); go on with fewer by elastic.min_hosts, or later with "
                "checkpoint.resume=latest"
            )
        if not isinstance(error, RendezvousError | DistError):
            code = getattr(error, "exit_code", 1)
            what = f"{message_of(error)} (on {meeting.host})"
            meeting.stop(Failure(code, what, 0.0, is_final=True))
            return error
    except DistError:
        pass
    return UserError(_lost_connection(meeting))


def _lost_connection(meeting: Meeting) -> str:
    return (
        f"the connection to the launcher on {meeting.endpoint.host} is lost; start again with "
        "checkpoint.resume=latest"
    )


def _end_cut_off(meeting: Meeting) -> NoReturn:
    """In a thread, for the main one waits for the store. Workers end when this process is gone."""
    _say(f"error: {_lost_connection(meeting)}")
    os._exit(UserError.exit_code)


def _close(handler: DynamicRendezvousHandler) -> None:
    """Launchers that wait for this host are told not to."""
    try:
        handler.shutdown()
    except (RendezvousError, DistError):
        logging.getLogger(__name__).debug("the rendezvous was gone", exc_info=True)


@contextmanager
def _signals(agent: Agent) -> Iterator[None]:
    """SIGTERM and SIGHUP have the workers save and stop; a second one, or Ctrl-C, ends them."""

    def stop(signum: int, frame: object) -> None:
        if agent.is_stopping or not agent.ask_to_stop():
            raise SystemExit(128 + signum)

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the agent's own way saves nothing
    earlier = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_hosts(config: RunConfig, nnodes: int) -> None:
    """RequestError where `elastic` and the number of hosts do not agree."""
    elastic = config.elastic
    if not (elastic.min_hosts or nnodes) <= nnodes <= (elastic.max_hosts or nnodes):
        raise RequestError(
            f"--nnodes {nnodes} is not between elastic.min_hosts ({elastic.min_hosts}) and "
            f"elastic.max_hosts ({elastic.max_hosts})"
        )
