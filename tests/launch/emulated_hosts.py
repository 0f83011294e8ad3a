"""Hosts emulated on one Linux machine: each has its own network, name and /etc/hosts.

They share the file system, as hosts with NFS do. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# In the namespaces of a host; $1 is its name, $2 the file of all names, $3 what it does first.
_ENTER = """
hostname "$1"
mount --make-rprivate /
mount --bind "$2" /etc/hosts
eval "$3"
shift 3
exec "$@"
"""


def require_hosts() -> None:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("emulated hosts need root and iproute2")
    probe = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"no permission to make network namespaces: {probe.stderr.decode().strip()}")
    _run("ip", "netns", "del", f"probe{os.getpid()}")


class Hosts:
    """h0, h1, ... at 10.77.0.1, 10.77.0.2, ..., on a switch with no way out."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self._folder, self._tag = count, folder, f"s{os.getpid()}"
        names = [f"10.77.0.{i + 1} h{i}" for i in range(count)]
        (folder / "etc_hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        self._switch = f"{self._tag}sw"
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for i in range(count):
            space, port = self.space(i), f"p{i}"
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            pair = ["eth0", "netns", space, "type", "veth", "peer", "name", port]
            _run("ip", "link", "add", *pair, "netns", self._switch)
            _run("ip", "-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            _run("ip", "-n", self._switch, "link", "set", port, "master", "br0")
            self.cut(i, False)

    def space(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def start(
        self, host: int, *arguments: str | Path, first: str = "", **environment: str
    ) -> subprocess.Popen[str]:
        """`python ARGUMENTS` on a host, after the shell command `first`."""
        program = [sys.executable, *map(str, arguments)]
        names = str(self._folder / "etc_hosts")
        enter = ["unshare", "-m", "-u", "bash", "-ec", _ENTER, "_", f"h{host}", names, first]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.space(host), *enter, *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **environment},
        )

    def pids(self, host: int) -> list[int]:
        found = _run("ip", "netns", "pids", self.space(host))
        return [int(pid) for pid in found.split()]

    def kill(self, host: int) -> None:
        """All processes of a host, at once."""
        for pid in self.pids(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, host: int, is_cut: bool = True) -> None:
        """Pull the cable of a host, or put it back."""
        state = "down" if is_cut else "up"
        _run("ip", "-n", self._switch, "link", "set", f"p{host}", state)

    def close(self) -> None:
        for host in range(self.count):
            self.kill(host)
            deadline = time.monotonic() + 5
            while self.pids(host) and time.monotonic() < deadline:
                time.sleep(0.02)
            _run("ip", "netns", "del", self.space(host))
        _run("ip", "netns", "del", self._switch)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
