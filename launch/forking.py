"""Workers forked from a process that has done their imports, or started afresh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from launch.processes import end_with_parent, libc

# What `shardemb.train` and the profiler import once they run.
MODULES = (
    "shardemb.build",
    "shardemb.checkpoint.checkpoints",
    "shardemb.metrics.run_log",
    "shardemb.models.dcn_v2",
    "shardemb.models.dlrm",
    "shardemb.warm_start",
)
_GPUS = ("/dev/nvidiactl", "/dev/dxg")  # NVIDIA's driver: on Linux, and under Windows
_POLL_SECONDS = 0.01


class Process(Protocol):
    """What a worker's process can do; subprocess.Popen is one."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class Template:
    """Starts workers of one host, which are forked with `modules` (see launch/template.py).

    On a machine with NVIDIA GPUs, and where a worker runs no module, it is a process of its own: a
    forked one cannot use CUDA where an import has touched it. All workers end with this process.
    """

    def __init__(self, log: Path, modules: Sequence[str] = MODULES) -> None:
        """`log` is for what the template prints."""
        self._log, self._modules = log, modules
        self._process: subprocess.Popen[bytes] | None = None
        has_gpu = any(map(os.path.exists, _GPUS))
        self._forks = sys.platform == "linux" and not has_gpu
        self._unread = b""
        self._begun: list[int] = []
        self._codes: dict[int, int] = {}

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        """`python ARGUMENTS` in a session of its own, printing into `log`."""
        if self._forks and arguments[0] == "-m":
            own = {"environment": dict(environment), "log": str(log)}
            request = {"arguments": arguments[1:], **own}
            try:
                return Forked(self._ask(request, environment), self)
            except (BrokenPipeError, EOFError):  # what it died of a fresh worker tells
                self._forks = False
        with log.open("w") as out:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C comes to us alone, and we end the workers
                preexec_fn=partial(end_with_parent, os.getpid(), libc()),
            )

    def _ask(self, request: Mapping[str, object], environment: Mapping[str, str]) -> int:
        """The process that was begun."""
        if self._process is None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "launch.template", *self._modules],
                    env=dict(environment),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    start_new_session=True,
                    preexec_fn=partial(end_with_parent, os.getpid(), libc()),
                )
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        while not self._begun:
            if not self._read(waits=True):
                raise EOFError
        return self._begun.pop()

    def exit_code(self, pid: int) -> int | None:
        """Of a worker that was forked; None while it runs."""
        if pid not in self._codes and not self._read(waits=False):
            self._codes.setdefault(pid, -signal.SIGKILL)  # it has ended with the template
        return self._codes.get(pid)

    def _read(self, waits: bool) -> bool:
        """Take answers; False where no more will come."""
        assert self._process is not None
        assert self._process.stdout
        answers = self._process.stdout.fileno()
        os.set_blocking(answers, waits)
        try:
            read = os.read(answers, 1 << 16)
        except BlockingIOError:
            return True
        *lines, self._unread = (self._unread + read).split(b"\n")
        for answer in map(json.loads, lines):
            if "code" in answer:
                self._codes[answer["pid"]] = answer["code"]
            else:
                self._begun.append(answer["pid"])
        return bool(read)

    def close(self) -> None:
        """End it, and all workers that it has forked."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._forks = False


class Forked:
    """A worker that is a child of the template."""

    def __init__(self, pid: int, template: Template) -> None:
        self.pid, self._template = pid, template

    def poll(self) -> int | None:
        return self._template.exit_code(self.pid)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return code

    def send_signal(self, sig: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, sig)
