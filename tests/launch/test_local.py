"""`launch/local.py`: workers are small scripts without torch, so each case takes a moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.local import WorkerError, run_workers

# Each worker writes its pid, then does its part. `wait_for_others` so that all have started.
PREAMBLE = """
import os, signal, subprocess, sys, time
from pathlib import Path

from planner import RequestError
from shardemb.failure import report_failures

FOLDER, rank, world_size = Path({folder!r}), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def note_pid(name, pid):
    (FOLDER / f"{{name}}.partial").write_text(str(pid))
    (FOLDER / f"{{name}}.partial").rename(FOLDER / f"{{name}}.pid")

def wait_for_others():
    while len(list(FOLDER.glob("rank_*.pid"))) < world_size:
        time.sleep(0.01)

note_pid(f"rank_{{rank}}", os.getpid())
wait_for_others()
"""

# A command of `shardemb` that starts workers of the program it is given.
COMMAND = """
import sys
from launch import cli
from launch.local import run_workers

@cli.app.command()
def work(program: str):
    run_workers(["-c", program], 2)

cli.main()
"""


@dataclass
class Team:
    """Starts workers and knows their process ids, and those of the processes they start."""

    folder: Path
    scratch: Path  # where temporary folders go

    def program(self, body: str) -> str:
        return PREAMBLE.format(folder=str(self.folder)) + body

    def run(self, body: str, nproc: int = 2) -> None:
        run_workers(["-c", self.program(body)], nproc)

    def fail(self, body: str, nproc: int = 2) -> WorkerError:
        """The error of a run that must fail; all workers must be gone 3 s after they started."""
        start = time.monotonic()
        with pytest.raises(WorkerError) as raised:
            self.run(body, nproc)
        assert time.monotonic() - start < 3
        assert self.alive() == []
        return raised.value

    def command(
        self, body: str, at_start: signal.Handlers = signal.SIG_DFL
    ) -> subprocess.Popen[str]:
        """The command in a process of its own, whose workers have started."""
        program = [sys.executable, "-c", COMMAND, "work", self.program(body)]
        process = subprocess.Popen(
            program,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.scratch)},
            preexec_fn=lambda: set_signals(at_start),
        )
        wait_until(lambda: len(self.pids()) == 2)
        return process

    def pids(self) -> dict[str, int]:
        return {path.stem: int(path.read_text()) for path in self.folder.glob("*.pid")}

    def alive(self) -> list[str]:
        return [name for name, pid in self.pids().items() if is_alive(pid)]


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    """Whatever a test does, no worker and no temporary folder is left behind."""
    made = Team(tmp_path / "team", tmp_path / "scratch")
    made.folder.mkdir()
    made.scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made.scratch))
    yield made
    assert made.pids(), "no worker ran"
    assert made.alive() == []
    assert list(made.scratch.iterdir()) == []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def set_signals(handler: signal.Handlers) -> None:
    """As a terminal starts a program (SIG_DFL), or a script in the background (SIG_IGN)."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, handler)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# ------------------------------------------------------------------ all goes well


def test_every_rank_learns_its_place_and_one_common_port(team: Team) -> None:
    """The environment is what torch.distributed needs, as torchrun would set it."""
    team.run(
        """
import json, socket
place = {k: v for k, v in os.environ.items() if k in (
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")}
if rank == 0:
    socket.create_server((place["MASTER_ADDR"], int(place["MASTER_PORT"]))).close()  # it is free
(FOLDER / f"{rank}.json").write_text(json.dumps(place))
""",
        nproc=3,
    )
    places = [json.loads((team.folder / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, place in enumerate(places):
        assert (place.pop("RANK"), place.pop("LOCAL_RANK")) == (str(rank), str(rank))
    assert places[0] == places[1] == places[2]
    port = places[0].pop("MASTER_PORT")
    assert 1024 <= int(port) <= 65535
    assert places[0] == {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}


def test_rank_0_shows_its_output_on_stderr_alone(
    team: Team, capfd: pytest.CaptureFixture[str]
) -> None:
    """stdout stays free for --json; the other ranks do not repeat rank 0's progress."""
    team.run("print(f'printed by {rank}'); print(f'logged by {rank}', file=sys.stderr)")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert sorted(shown.err.split("\n")) == ["", "logged by 0", "printed by 0"]


def test_it_works_in_a_thread_and_without_a_real_stderr(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python code may call it from any thread, and from a notebook, whose stderr is no file."""
    monkeypatch.setattr(sys, "stderr", object())
    outcomes: list[object] = []

    def run() -> None:
        try:
            team.run("sys.exit(0 if rank == 0 else 7)")
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    (error,) = outcomes
    assert isinstance(error, WorkerError)
    assert "the worker of rank 1 ended with exit code 7" in str(error)


def test_the_callers_signal_handlers_stay(team: Team) -> None:
    """A program that handles SIGTERM itself still does, while workers run and after."""
    caught: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda signum, frame: caught.append(signum))
    try:
        team.run("if rank == 0: os.kill(os.getppid(), signal.SIGTERM)")
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, earlier)
    team.run("")
    assert signal.getsignal(signal.SIGTERM) is earlier


# ------------------------------------------------------------------ a worker fails


@pytest.mark.parametrize(
    "others",
    ["time.sleep(60)", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"],
    ids=["asleep", "ignoring SIGTERM"],
)
def test_a_users_mistake_ends_all_workers_with_its_message(team: Team, others: str) -> None:
    """One rank's UserError is the run's: its message and exit code, and nobody waits."""
    error = team.fail(
        f"""
with report_failures() as outcome:
    if rank == 1:
        raise RequestError("tables.C1: too many rows; lower num_embeddings")
    {others}
sys.exit(outcome.exit_code)
"""
    )
    assert str(error) == "tables.C1: too many rows; lower num_embeddings"
    assert error.exit_code == 2


def test_the_cause_is_shown_and_not_its_echo(team: Team) -> None:
    """A rank that only notices another's end often reports first; the cause is waited for."""
    error = team.fail(
        """
with report_failures() as outcome:
    if rank == 1:
        time.sleep(0.4)
        raise RequestError("the cause")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
sys.exit(outcome.exit_code)
"""
    )
    assert str(error) == "the cause"


def test_an_echo_is_shown_where_there_is_nothing_better(team: Team) -> None:
    """A failure is never swallowed, even if it looks like the echo of another."""
    error = team.fail(
        """
with report_failures() as outcome:
    if rank == 0:
        raise RuntimeError("Connection closed by peer")
    time.sleep(60)
sys.exit(outcome.exit_code)
"""
    )
    assert "rank 0" in str(error) and "closed by peer" in str(error)


def test_a_worker_that_fails_and_then_hangs_is_not_waited_for(team: Team) -> None:
    """A reported failure counts at once: a library's thread may keep the process from ending."""
    error = team.fail(
        """
import threading
threading.Thread(target=time.sleep, args=(60,)).start()
with report_failures() as outcome:
    if rank == 1:
        raise RequestError("the cause")
sys.exit(outcome.exit_code)
"""
    )
    assert str(error) == "the cause"


def test_a_killed_worker_is_named_with_its_signal(team: Team) -> None:
    """Out of memory is told as such, not as the other ranks' lost connections."""
    error = team.fail(
        """
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
with report_failures() as outcome:
    time.sleep(0.02)
    raise RuntimeError("Connection reset by peer")
sys.exit(outcome.exit_code)
"""
    )
    assert str(error).startswith("the worker of rank 1 was killed by SIGKILL")
    assert "out of memory" in str(error)


def test_the_last_words_of_a_silent_worker_are_shown(team: Team) -> None:
    """A library that ends the process without an exception leaves its reason in the log."""
    error = team.fail(
        """
if rank == 1:
    for line in range(100):
        print(f"line {line}", file=sys.stderr)
    print("terminate called: no space", file=sys.stderr, flush=True)
    os._exit(3)
time.sleep(60)
"""
    )
    lines = str(error).splitlines()
    assert lines[0] == "the worker of rank 1 ended with exit code 3; its log ends:"
    assert lines[-2:] == ["line 99", "terminate called: no space"]
    assert len(lines) < 20
    assert error.exit_code == 1


@pytest.mark.parametrize("everybody", [False, True], ids=["one rank", "all ranks"])
@pytest.mark.parametrize(
    ("leave", "message"),
    [
        ("os._exit(0)", "the worker of rank 0 ended with exit code 0 before the run was done"),
        ("sys.exit(0)", "in the worker of rank 0: sys.exit(0) before the run was done\nTraceback"),
    ],
)
def test_a_worker_that_leaves_amid_its_work(
    team: Team, leave: str, message: str, everybody: bool
) -> None:
    """An exit code of 0 is no success while the work goes on: not to the others, who may hang or
    notice it first, and not where all leave."""
    for others in ("time.sleep(60)", "raise RuntimeError('Connection closed by peer')"):
        error = team.fail(
            f"""
with report_failures() as outcome:
    if rank == 0 or {everybody}:
        time.sleep(0.3 * rank)
        {leave}
    {others}
sys.exit(outcome.exit_code)
"""
        )
        assert str(error).startswith(message)
        assert error.exit_code == 1


def test_workers_may_end_one_after_the_other(team: Team) -> None:
    """A rank whose work is done has not left early, however long the others take."""
    team.run(
        """
with report_failures() as outcome:
    time.sleep(0.4 * rank)
sys.exit(outcome.exit_code)
""",
        nproc=3,
    )


def test_a_bug_is_shown_with_one_traceback(team: Team, capfd: pytest.CaptureFixture[str]) -> None:
    """What is not the user's mistake keeps its traceback, once, whichever rank it comes from."""
    for culprit in (0, 1):
        error = team.fail(
            f"""
with report_failures() as outcome:
    if rank == {culprit}:
        [].pop()
    time.sleep(60)
sys.exit(outcome.exit_code)
"""
        )
        everything = str(error) + capfd.readouterr().err
        assert everything.count("Traceback") == 1
        assert str(error).startswith(f"in the worker of rank {culprit}\n")
        assert "IndexError: pop from empty list" in str(error)
        assert error.exit_code == 1


def test_what_a_worker_started_ends_with_it(team: Team) -> None:
    """Helper processes of a worker, such as compilers or data loaders, are not left behind."""
    team.fail(
        """
if rank == 0:
    note_pid("helper", subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)
while not (FOLDER / "helper.pid").exists():
    time.sleep(0.01)
sys.exit(1)
"""
    )
    assert "helper" in team.pids()


# ------------------------------------------------------------------ the launcher is ended


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_workers_end_with_their_launcher(team: Team, signum: signal.Signals, code: int) -> None:
    """Ctrl-C, SIGTERM, a closed terminal and even SIGKILL leave no worker, and no traceback."""
    ignore = "for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, 1)\n"
    command = team.command(ignore + "(FOLDER / f'deaf_{rank}').touch(); time.sleep(60)")
    wait_until(lambda: len(list(team.folder.glob("deaf_*"))) == 2)
    command.send_signal(signum)
    _, errors = command.communicate(timeout=3)
    assert command.returncode == code
    assert errors == ""
    wait_until(lambda: team.alive() == [], seconds=3)
    if signum == signal.SIGKILL:  # nobody was left to remove it
        (scratch,) = team.scratch.iterdir()
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()


def test_a_run_in_the_background_keeps_ignoring_what_its_shell_ignores(team: Team) -> None:
    """`nohup shardemb ... &` from a script starts with SIGINT and SIGHUP ignored: so it stays."""
    body = "while not (FOLDER / 'go').exists(): time.sleep(0.01)"
    command = team.command(body, at_start=signal.SIG_IGN)
    for signum in (signal.SIGINT, signal.SIGHUP):
        command.send_signal(signum)
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(0.3)
    (team.folder / "go").touch()
    assert command.wait(3) == 0
    command.communicate()
