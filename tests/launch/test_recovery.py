"""When workers are started again, and what must be the same on all hosts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from launch.endpoint import Endpoint, interface_of, listen, parse_endpoint, reach
from launch.host_facts import HostFacts, facts_of, refuse_differences
from launch.recovery import Recovery, WorkerError
from launch.shared_storage import (
    missing_marks,
    place_marks,
    refuse_unshared,
    remove_marks,
)
from planner import RequestError, UserError
from shardemb.config import RunConfig
from shardemb.failure import Failure
from tests.launch.tiny_run import tiny_config


def crash(message: str = "killed") -> Failure:
    return Failure(1, f"{message}\na traceback", 0.0)


def test_crashes_at_other_steps_are_tried_again_so_often() -> None:
    """The limit counts restarts; what went wrong last is told with it."""
    recovery = Recovery(max_restarts=2)
    recovery.allow(crash(), 1)
    recovery.allow(crash(), 2)
    with pytest.raises(WorkerError, match=r"launch.max_restarts \(2\) restarts: killed\na trace"):
        recovery.allow(crash(), 3)


def test_the_same_crash_at_the_same_step_is_not_tried_again() -> None:
    """Another reason at the same step, or the same at another, is."""
    recovery = Recovery(max_restarts=9)
    recovery.allow(crash(), 4)
    recovery.allow(crash("hung"), 4)
    recovery.allow(crash("hung"), 5)
    with pytest.raises(WorkerError, match="failed twice after step 5"):
        recovery.allow(crash("hung"), 5)


def test_a_users_mistake_is_not_tried_again() -> None:
    """Its message and exit code are the run's."""
    mistake = Failure(2, "tables.C1: too many rows", 0.0, is_final=True)
    with pytest.raises(WorkerError, match="tables.C1: too many rows") as raised:
        Recovery(max_restarts=3).allow(mistake, 0)
    assert raised.value.exit_code == 2


# ------------------------------------------------------------------ hosts


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(tiny_config(tmp_path / "data", tmp_path / "runs" / "run"))


def test_equal_hosts_pass(config: RunConfig) -> None:
    """Facts of one host are the same each time, and say nothing of its name."""
    refuse_differences([facts_of("h0", config, 2), facts_of("h1", config, 2)])


def test_every_difference_is_named_with_its_hosts(config: RunConfig) -> None:
    """What is missing on one counts; of many, the first are shown and the rest counted."""
    ours = facts_of("h0", config, 2)
    other = HostFacts("h1", {**ours.facts, "torch": "2.11.0", "number of workers": "4"})
    with pytest.raises(RequestError) as raised:
        refuse_differences([ours, other, HostFacts("h2", ours.facts)])
    _, workers, torch = str(raised.value).splitlines()
    assert workers == "  number of workers: 2 on h0, h2; 4 on h1"
    assert torch == f"  torch: {ours.facts['torch']} on h0, h2; 2.11.0 on h1"
    with pytest.raises(RequestError, match=r"and \d+ more$"):
        refuse_differences([ours, HostFacts("h1", {})])


def test_a_mark_is_seen_where_storage_is_shared(config: RunConfig, tmp_path: Path) -> None:
    """It lies in the nearest folder there is, and leaves no trace; elsewhere it is missed."""
    marks = place_marks(config, "id")
    assert missing_marks(config, marks) == []
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "runs").mkdir(parents=True)
    other = config.model_copy(update={"output": elsewhere / "runs" / "run"})
    missing = missing_marks(other, marks)
    assert missing == ["output"]
    with pytest.raises(UserError, match="output: h1 does not see what h0 writes in"):
        refuse_unshared(config, "h0", {"h0": [], "h1": missing})
    refuse_unshared(config, "h0", {"h0": [], "h1": []})
    remove_marks(config, marks)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


# ------------------------------------------------------------------ the endpoint


@pytest.mark.parametrize("text", ["h0", "h0:", ":29500", "h0:0", "h0:70000", "h0:x"])
def test_an_endpoint_has_a_host_and_a_port(text: str) -> None:
    """Else the message shows the form."""
    with pytest.raises(RequestError, match="write HOST:PORT, for example"):
        parse_endpoint(text)


def test_a_name_that_leads_to_the_host_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's own name does: no other host would reach it."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(RequestError, match=r"on this host h0 is 127.0.1.1, where no other"):
        parse_endpoint("h0:29500")


def test_only_the_host_of_the_address_listens() -> None:
    """On that address alone; the second launcher, and one elsewhere, do not."""
    here = Endpoint("localhost", 0, "127.0.0.1")
    listener = listen(here)
    assert listener
    with listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        taken = Endpoint("localhost", port, "127.0.0.1")
        assert listen(taken) is None
        assert reach(taken, 1) == "127.0.0.1"
    assert listen(Endpoint("elsewhere", 29500, "192.0.2.1")) is None


def test_nobody_listens() -> None:
    """A launcher that has not started is waited for, but not for ever."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match="nobody listens there"):
        reach(Endpoint("localhost", port, "127.0.0.1"), 0.1)


def test_the_interface_of_an_address() -> None:
    """What gloo and NCCL are told to use."""
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
