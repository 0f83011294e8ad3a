"""`python -m launch.template MODULE...`: forks workers that have these modules already.

Imports cost each worker seconds of a core; a forked worker has them, so those of one host cost them
once, and workers that are started again begin at once. `launch.forking` is the other side.

Requests are lines of JSON on stdin: `arguments` (of a module and the module's own), `environment`,
`log`. Answers on stdout: `pid` of a worker that has begun, `pid` and `code` of one that has ended.
Workers end with it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import selectors
import signal
import sys
from typing import Any

from launch.processes import end_with_parent, libc, name_process
from shardemb.quiet import silence_libraries

_REQUESTS, _LOG = 0, 2  # descriptors


def main() -> None:
    answers = os.dup(1)
    os.dup2(_LOG, 1)  # what is printed is no answer
    silence_libraries()
    for module in sys.argv[1:]:
        importlib.import_module(module)
    request = _serve(answers)
    if request:
        module, *_ = sys.argv = request["arguments"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(answers: int) -> dict[str, Any] | None:
    """Fork workers; what a worker is to run, in that worker, and None when no more are wanted."""
    ended, wakes = os.pipe()
    for end in (ended, wakes):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # or it would not wake
    signal.set_wakeup_fd(wakes)
    running: list[int] = []
    unread = b""
    with selectors.DefaultSelector() as selector:
        selector.register(_REQUESTS, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if ended in ready:
                os.read(ended, 4096)
                for pid in running[:]:
                    code = _exit_code(pid)
                    if code is not None:
                        running.remove(pid)
                        _answer(answers, {"pid": pid, "code": code})
            if _REQUESTS in ready:
                read = os.read(_REQUESTS, 1 << 16)
                if not read:
                    return None
                *lines, unread = (unread + read).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    pid = _fork(request)
                    if pid == 0:
                        for end in (ended, wakes, answers):
                            os.close(end)
                        return request
                    running.append(pid)
                    _answer(answers, {"pid": pid})


def _answer(answers: int, what: dict[str, int]) -> None:
    os.write(answers, json.dumps(what).encode() + b"\n")


def _exit_code(pid: int) -> int | None:
    """Of a worker, as subprocess has it. It is left unreaped, so that no other process gets its
    number, by which it may be killed."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _fork(request: dict[str, Any]) -> int:
    """The process, once it is the worker that was asked for; 0 in it."""
    template, library = os.getpid(), libc()
    begun, begins = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begins)
        os.read(begun, 1)
        os.close(begun)
        return pid
    os.setsid()
    end_with_parent(template, library)
    name_process(f"rank {request['environment'].get('RANK')} shardemb", library)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for source in (nothing, log):
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.close(begun)
    os.close(begins)
    return 0


if __name__ == "__main__":
    main()
