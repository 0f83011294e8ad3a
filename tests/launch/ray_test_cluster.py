"""A Ray cluster of several nodes on this machine, for tests; tests/launch/ray_nodes.py runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.tiny_run import TIMEOUT_SECONDS


class Cluster:
    """A head without room for workers, and nodes with room for two each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def close(self) -> None:
        self._process.communicate(timeout=TIMEOUT_SECONDS)


def cluster_settings(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A token, loopback alone, and modules of `folder` found."""
    (folder / "token").write_text("0" * 64)
    (folder / "token").chmod(0o600)
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    patch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', os.getcwd())}")
