"""What workers print, kept in the run directory: by rank and attempt, each byte once."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.logs import WorkerLogs
from launch.recovery import WorkerError
from shardemb.failure import Failure
from tests.launch.tiny_run import TIMEOUT_SECONDS, make_data, tiny_config, write_config

MARK = re.compile(r"--- rank (\d+) on (\S+), attempt (\d+), \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n")


class Host:
    """Two ranks of one host that print as told, into a file each."""

    def __init__(self, folder: Path, first_rank: int = 0) -> None:
        self.reports, self.run = folder / "reports", folder / "run"
        self.reports.mkdir(parents=True)
        self.ranks = [first_rank, first_rank + 1]
        self.logs = WorkerLogs(self.reports, self.run, "this run")
        self.attempt = 0

    def begin(self) -> None:
        self.attempt += 1
        self.logs.begin({rank: self._file(rank) for rank in self.ranks})

    def _file(self, rank: int) -> Path:
        return self.reports / f"{rank}.{self.attempt}.log"

    def print(self, rank: int, text: str) -> None:
        with self._file(rank).open("a") as file:
            file.write(text)

    def create_run(self, run_id: str = "this run") -> None:
        self.run.mkdir()
        (self.run / "run_id").write_text(run_id)

    def kept(self, rank: int) -> str:
        return (self.run / "logs" / f"rank_{rank}.log").read_text()


def test_all_is_kept_once_there_is_a_run_directory(tmp_path: Path) -> None:
    """Also what was printed before, also of the attempts after: one file for each rank."""
    host = Host(tmp_path)
    host.begin()
    host.print(1, "early\n")
    assert host.logs.copy() == ""
    assert not host.run.exists()
    host.create_run()
    host.print(1, "half of a ")
    host.logs.copy()
    host.print(1, "line\n")
    host.logs.copy()
    host.begin()
    host.print(1, "again\n")
    host.logs.copy()
    host.logs.copy()
    assert MARK.sub(r"<\1 \2 \3>", host.kept(1)) == (
        f"<1 {socket.gethostname()} 1>early\nhalf of a line\n<1 {socket.gethostname()} 2>again\n"
    )
    assert MARK.fullmatch(host.kept(0).splitlines(keepends=True)[0])


def test_nothing_is_written_into_the_directory_of_another_run(tmp_path: Path) -> None:
    """An earlier run of that name stays as it is until this one has set it aside."""
    host = Host(tmp_path)
    host.create_run("an earlier run")
    host.begin()
    host.print(0, "text\n")
    host.logs.copy()
    assert [path.name for path in host.run.iterdir()] == ["run_id"]


@pytest.mark.parametrize(("first_rank", "prefix"), [(0, ""), (4, "[rank 4] ")])
def test_the_first_rank_is_shown(tmp_path: Path, first_rank: int, prefix: str) -> None:
    """Whole lines, each once; those of another than rank 0 with its number."""
    host = Host(tmp_path, first_rank)
    host.begin()
    host.print(first_rank, "one\ntw")
    host.print(first_rank + 1, "hidden\n")
    assert host.logs.copy() == f"{prefix}one\n"
    assert host.logs.copy() == ""
    host.print(first_rank, "o\n")
    assert host.logs.copy() == f"{prefix}two\n"


def test_the_log_of_a_failure(tmp_path: Path) -> None:
    """It is named where it is kept, for as long as it is there; not for a user's mistake."""
    host = Host(tmp_path)
    host.create_run()
    host.begin()
    host.logs.copy()
    path = host.run / "logs" / "rank_1.log"
    crash = host.logs.named(Failure(1, "killed", 0.0), 1)
    assert crash.log == str(path)
    assert host.logs.named(Failure(2, "a wrong key", 0.0, is_final=True), 1).log is None
    error = WorkerError(crash.message, crash.exit_code, crash.log)
    assert str(error) == f"killed\nits whole log: {path}"
    path.unlink()
    assert str(error) == "killed"


def test_a_terminal_has_the_progress_bar(tmp_path: Path) -> None:
    """Drawn by rank 0 on the launcher's terminal, while what it prints goes to its log as well."""
    (tmp_path / "talking.py").write_text(
        "from shardemb.models.dlrm import DLRM\n"
        "class Talking(DLRM):\n"
        "    def forward(self, batch):\n"
        "        print('something was said')\n"
        "        return super().forward(batch)\n"
    )
    config = tiny_config(make_data(tmp_path / "data"), tmp_path / "run")
    config["model"]["name"] = "talking:Talking"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", write_config(tmp_path / "run.yaml", config)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # nobody has it open any more
        pass
    assert process.wait(TIMEOUT_SECONDS) == 0, shown.decode()
    assert "━" in shown.decode() and "16/16" in shown.decode()
    assert "something was said" in shown.decode()
    for rank in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()
        assert MARK.match(log) and "something was said" in log
        assert "━" not in log
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 16
