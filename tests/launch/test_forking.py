"""Forked workers are what processes of their own would be, but for imports done before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.forking import Forked, Process, Template

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")

# A worker: says what it is, then does as it is told.
WORKER = """
import json, os, signal, sys, time

me = {
    "arguments": sys.argv[1:],
    "environment": {k: v for k, v in os.environ.items() if k.startswith("WORKER_")},
    "is_leader": os.getsid(0) == os.getpid(),
    "imported": "wave" in sys.modules,
    "module": __name__,
    "input": sys.stdin.read(),
    "name": open("/proc/self/comm").read(),
}
print(json.dumps(me), flush=True)
exec(sys.argv[1])
"""
# Starts a worker, tells its process, and waits.
STARTER = """
import os, sys, time
from pathlib import Path
from launch.forking import Template

template = Template(Path("template.log"), ["wave"])
print(template.start(["-m", "worker", "time.sleep(100)"], os.environ, Path("log")).pid, flush=True)
time.sleep(100)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    return tmp_path


@pytest.fixture
def template(folder: Path) -> Iterator[Template]:
    """Has imported `wave`, which nothing else does."""
    made = Template(folder / "template.log", ["wave"])
    yield made
    made.close()


def begin(template: Template, folder: Path, what: str, number: int = 0) -> Process:
    environment = {**os.environ, "WORKER_NUMBER": str(number), "RANK": str(number)}
    return template.start(["-m", "worker", what], environment, folder / f"log{number}")


def test_a_worker_is_a_process_of_its_own(template: Template, folder: Path) -> None:
    """Its arguments, environment, session, input and log; each has the imports of the template."""
    workers = [begin(template, folder, f"print({i})", i) for i in range(3)]
    assert all(isinstance(worker, Forked) for worker in workers)
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert len({worker.pid for worker in workers}) == 3
    for i in range(3):
        first, printed = (folder / f"log{i}").read_text().splitlines()
        assert printed == str(i)
        assert json.loads(first) == {
            "arguments": [f"print({i})"],
            "environment": {"WORKER_NUMBER": str(i)},
            "is_leader": True,
            "imported": True,
            "module": "__main__",
            "name": f"rank {i} shardemb\n",
            "input": "",
        }


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no luck')", 1, "no luck"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'the end')", 0, "the end"),
    ],
)
def test_how_it_ends(template: Template, folder: Path, what: str, code: int, said: str) -> None:
    worker = begin(template, folder, what)
    assert worker.wait() == code
    assert said in (folder / "log0").read_text()
    assert begin(template, folder, "", 1).wait() == 0  # others begin after it


def test_it_can_be_signalled(template: Template, folder: Path) -> None:
    worker = begin(template, folder, "time.sleep(100)")
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() == -signal.SIGTERM
    worker.send_signal(signal.SIGTERM)  # of one that has ended nothing comes


def test_workers_end_with_the_template(template: Template, folder: Path) -> None:
    """Also where that is killed, of which all workers seem to be."""
    worker = begin(template, folder, "time.sleep(100)")
    parent = int(Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    wait_for(lambda: not is_running(worker.pid))


def test_workers_end_with_the_starter(folder: Path) -> None:
    """A launcher that is killed leaves neither a template nor workers."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, cwd=folder
    )
    assert starter.stdout
    pid = int(starter.stdout.readline())
    assert is_running(pid)
    starter.kill()
    starter.communicate()
    wait_for(lambda: not is_running(pid))


def test_a_template_that_cannot_import(folder: Path) -> None:
    """Workers are started afresh then, and say themselves what is wrong."""
    template = Template(folder / "template.log", ["no_such_module"])
    worker = begin(template, folder, "import no_such_module")
    assert worker.wait() == 1
    assert "No module named 'no_such_module'" in (folder / "log0").read_text()
    assert begin(template, folder, "print(7)", 1).wait() == 0
    first, _ = (folder / "log1").read_text().splitlines()
    assert json.loads(first)["imported"] is False
    template.close()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
