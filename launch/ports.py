"""Where processes of this host listen, as Linux tells it in /proc."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, order=True)
class Listener:
    """A TCP port that a process accepts connections on, at an address, or at all (0.0.0.0, ::)."""

    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


class PortWarning:
    """Says once on stderr which ports other machines reach."""

    def __init__(self) -> None:
        self._is_said = False

    def say(self, pids: Iterable[int]) -> None:
        """Those of these processes and of this one."""
        if self._is_said:
            return
        self._is_said = True
        found = sorted(x for x in listeners([os.getpid(), *pids]) if not x.is_loopback)
        if found:
            ports = ", ".join(map(str, found))
            print(f"other machines can connect to {ports}", file=sys.stderr, flush=True)


def listeners(pids: Iterable[int]) -> set[Listener]:
    """Of these processes; those that have ended, or are others', have none."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            sockets = _sockets(pid)
            for table in ("tcp", "tcp6"):
                lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
                for fields in map(str.split, lines):
                    if fields[3] == _LISTEN and fields[9] in sockets:
                        found.add(_parse(fields[1]))
    return found


def _sockets(pid: int) -> set[str]:
    """Inodes."""
    links = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.add(os.readlink(descriptor))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def _parse(text: str) -> Listener:
    """`0100007F:0050`: words of 32 bits in this machine's byte order, little-endian as on x86."""
    address, _, port = text.partition(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return Listener(socket.inet_ntop(family, b"".join(words)), int(port, 16))
