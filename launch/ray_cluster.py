"""The Ray cluster of a run: one that is there, or one on this machine, and what its hosts have.

Ray is imported here, and only where it is used: it is an extra.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner import RequestError, UserError

# Of the one on this machine: actors pass each other kilobytes.
OBJECT_STORE_BYTES = 128 * 1024 * 1024
_REACH_SECONDS = 10.0
_DEFAULTS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers on CPU may still see GPUs
    "RAY_gcs_server_port_wait_time_s": "10",  # for a head that is there
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or 127.0.0.1 becomes this host's address
}


@dataclass(frozen=True)
class Node:
    """A host of the cluster that lives."""

    id: str
    address: str
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.address}: {self.cpus} CPUs, {self.gpus} GPUs"


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[None]:
    """A connection to the cluster at `address`, or to one on this machine with so many CPUs.

    RequestError where Ray is not installed; UserError where the cluster does not answer, or does
    not take this user's token.
    """
    import_ray()
    import ray

    with tempfile.TemporaryDirectory(prefix="shardemb-") as folder:
        if address is None:
            _make_token(Path(folder) / "token")
        else:
            _check_reachable(address)
            check_token_file()
        _init(address, cpus)
        try:
            yield
        finally:
            ray.shutdown()


def import_ray() -> None:
    """With this project's settings, which Ray reads when it is imported; RequestError where it is
    not installed."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        raise RequestError(
            "`shardemb launch ray` needs Ray: pip install 'shardemb[ray]'"
        ) from error


def _init(address: str | None, cpus: int) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    alone: dict[str, Any] = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(address=address or "local", **common, **({} if address else alone))
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {address} does not let this user in: it does not take the token "
            f"in {_token_file()} (`ray get-auth-token` on its head shows the right one), or is "
            f"none of Ray {ray.__version__} ({error})"
        ) from error


def nodes() -> list[Node]:
    """Those that live, in an order that stays."""
    import ray

    found = [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.address, node.id))


def _check_reachable(address: str) -> None:
    """Ray itself tries for half a minute and more."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise RequestError(f"--address {address}: write HOST:PORT, for example head:6379")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nobody answers there ({error.strerror or error}); start the "
            f"cluster with `ray start --head --port {port}` on {host}"
        ) from error


def _make_token(path: Path) -> None:
    """Of a cluster of our own, which nobody else is to use."""
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()


def check_token_file() -> None:
    """A token that others on this machine can read is none."""
    path = _token_file()
    if os.environ["RAY_AUTH_MODE"] != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    if not path.exists():
        raise UserError(
            f"there is no token of the Ray cluster in {path}: put the cluster's there, mode 0600 "
            "(`ray get-auth-token` on its head shows it), or set RAY_AUTH_MODE=disabled for a "
            "cluster without"
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UserError(
            f"others can read the token of the Ray cluster in {path} (mode {mode:04o}): "
            f"chmod 600 {path}"
        )
