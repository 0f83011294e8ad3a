"""Which ports a run opens: those that the README's "Ports" names, and to whom."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.ports import Listener, PortWarning, listeners
from tests.launch.hosts_run import Run
from tests.launch.test_torchrun_hosts import free_port
from tests.launch.tiny_run import TIMEOUT_SECONDS, make_data


def test_what_this_process_listens_on() -> None:
    """The kernel's table, read back against sockets of our own; connections do not count."""
    with (
        socket.create_server(("127.0.0.1", 0)) as here,
        socket.create_server(("0.0.0.0", 0)) as anywhere,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as here_too,
        socket.create_connection(here.getsockname()),
    ):
        ports = {s.getsockname()[1]: s.getsockname()[0] for s in (here, anywhere, here_too)}
        found = {x for x in listeners([os.getpid()]) if x.port in ports}
    assert found == {Listener(address, port) for port, address in ports.items()}
    assert {x.address for x in found if x.is_loopback} == {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [("127.0.1.1", True), ("::ffff:127.0.0.1", True), ("::", False), ("10.0.0.1", False)],
)
def test_who_reaches_an_address(address: str, is_loopback: bool) -> None:
    """An IPv4 address that an IPv6 socket listens on counts as such."""
    assert Listener(address, 1).is_loopback == is_loopback


def test_the_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """It names what other machines reach, once; nothing where they reach nothing."""
    warning = PortWarning()
    with socket.create_server(("0.0.0.0", 0)) as anywhere, socket.create_server(("127.0.0.1", 0)):
        warning.say([])
        warning.say([])
        port = anywhere.getsockname()[1]
    assert f"0.0.0.0:{port}" in capsys.readouterr().err
    warning.say([])
    assert capsys.readouterr().err == ""


def family(pid: int) -> Iterator[int]:
    """A process, those it has started, and so on."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


@pytest.mark.parametrize("verb", ["train", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_run_listens_on_loopback_alone(tmp_path: Path, verb: str) -> None:
    """On one host; the endpoint is there where it was asked for. Nothing is warned of."""
    run, endpoint = Run(tmp_path, make_data(tmp_path / "data")), free_port()
    launch = ["launch", "torchrun", "--rdzv-endpoint", f"127.0.0.1:{endpoint}"]
    command = [*(launch if verb == "torchrun" else [verb]), str(run.config)]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *command, *run.mortal("SIGKILL", times=0, seconds=0.05)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(run.metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    found = listeners(family(process.pid))
    _, shown = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, shown
    assert found and all(listener.is_loopback for listener in found)
    assert (endpoint in {listener.port for listener in found}) == (verb == "torchrun")
    assert "other machines" not in shown
