"""The address where hosts meet: is it this host's, can it be reached. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
import time
from dataclasses import dataclass

from planner import RequestError, UserError

# Another host may still be starting; one that nobody can reach is told of sooner.
_UNREACHABLE_SECONDS = 10.0
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True)
class Endpoint:
    """`address` is the IPv4 address of `host`."""

    host: str
    port: int
    address: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """HOST:PORT; RequestError where it is not that, or the host is not known."""
    host, _, digits = text.rpartition(":")
    if not host or not digits.isdecimal() or not 0 < int(digits) < 2**16:
        raise RequestError(f"--rdzv-endpoint {text}: write HOST:PORT, for example host0:29500")
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise RequestError(
            f"--rdzv-endpoint {text}: this host does not know {host} ({error.strerror}); give its "
            "IP address"
        ) from error
    is_local = host == "localhost" or host == address
    if ipaddress.ip_address(address).is_loopback and not is_local:
        raise RequestError(
            f"--rdzv-endpoint {text}: on this host {host} is {address}, where no other can reach "
            "it; give its IP address on the network"
        )
    return Endpoint(host, int(digits), address)


def listen(endpoint: Endpoint) -> socket.socket | None:
    """A socket at the endpoint, if that is this host's and no other process has it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((endpoint.address, endpoint.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return None
        raise UserError(f"--rdzv-endpoint {endpoint}: {error.strerror}") from error
    return listener


def reach(endpoint: Endpoint, wait_seconds: float) -> str:
    """Wait for somebody to listen there; this host's address on the way to it."""
    start = time.monotonic()
    while True:
        try:
            with socket.create_connection((endpoint.address, endpoint.port), timeout=5) as probe:
                return str(probe.getsockname()[0])
        except ConnectionRefusedError as error:  # the host is there, its launcher not yet
            limit, reason = wait_seconds, f"nobody listens there ({error.strerror})"
        except OSError as error:
            limit = min(_UNREACHABLE_SECONDS, wait_seconds)
            reason = f"it cannot be reached ({error.strerror or error})"
        if time.monotonic() - start > limit:
            raise UserError(
                f"--rdzv-endpoint {endpoint}: {reason}, for {limit:g} s; start the launcher on "
                f"{endpoint.host}, and let its firewall pass the port"
            )
        time.sleep(0.2)


def network_environment(address: str) -> dict[str, str]:
    """For workers: gloo and NCCL are to use the interface of `address`, unless the user says
    otherwise. By default gloo listens where the host's name leads, on Debian to itself."""
    interface = interface_of(address)
    if interface is None:
        return {}
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, interface) for name in names}


def interface_of(address: str) -> str | None:
    """The network interface of this host that has the address (netdevice(7), SIOCGIFADDR)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
