"""`shardemb launch torchrun` on emulated hosts: the same run as on one, also when workers die."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import Plan
from tests.launch.emulated_hosts import Hosts, require_hosts
from tests.launch.hosts_run import Run
from tests.launch.tiny_run import TIMEOUT_SECONDS, make_data, python, shardemb

QUIET = Path(__file__).parents[2] / "shardemb" / "quiet.py"


class HostsRun(Run):
    """On emulated hosts."""

    def __init__(self, folder: Path, data: Path, hosts: Hosts) -> None:
        super().__init__(folder, data)
        self.hosts = hosts

    def start(
        self, *arguments: str, first: str = "", nnodes: int = 2, endpoint: str = "h0:29500"
    ) -> list[subprocess.Popen[str]]:
        """Their launchers; the second does `first` before."""
        line = ["-m", "launch", "launch", "torchrun", self.config, "--nnodes", str(nnodes)]
        line += ["--rdzv-endpoint", endpoint, *arguments]
        path = f"{self.folder}:{os.getcwd()}"
        return [
            self.hosts.start(host, *line, first=first * host, PYTHONPATH=path)
            for host in range(nnodes)
        ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        print(err)  # beside a failure
        assert "Traceback" not in err
        ended.append((process.returncode, out, err))
    return ended


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_hosts()
    made = Hosts(2, tmp_path_factory.mktemp("hosts"))
    try:
        yield made
        assert [made.pids(host) for host in range(2)] == [[], []]
    finally:
        made.close()


@pytest.fixture
def run(tmp_path: Path, data: Path, hosts: Hosts) -> HostsRun:
    return HostsRun(tmp_path, data, hosts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path, hosts: Hosts) -> HostsRun:
    """A run on two hosts that nothing disturbs."""
    run = HostsRun(tmp_path_factory.mktemp("whole"), data, hosts)
    for host, (code, out, err) in enumerate(finish(run.start("--json"))):
        assert code == 0, err
        (warning,) = re.findall("other machines can connect to (.*)", err)
        assert all(port.startswith(f"10.77.0.{host + 1}:") for port in warning.split(", "))
        assert json.loads(out) == json.loads((run.directory / "result.json").read_text())
    return run


# ------------------------------------------------------------------ all goes well


def test_two_hosts_train_as_one(whole: HostsRun, tmp_path: Path, data: Path) -> None:
    """Two hosts of two workers have the losses and the evaluation of four workers on one."""
    local = Run(tmp_path, data)
    process = shardemb("train", local.config, "launch.nproc_per_node=4")
    assert process.returncode == 0, process.stderr
    assert whole.losses() == pytest.approx(local.losses(), rel=1e-6)
    assert whole.metrics()[-1]["auc"] == pytest.approx(local.metrics()[-1]["auc"], rel=1e-6)


def test_the_plan_knows_the_hosts(whole: HostsRun) -> None:
    """Shards of a table_row_wise table, and columns of a grid, are on the ranks of one host."""
    plan = Plan.load(whole.directory / "plan.json")
    assert (plan.topology.world_size, plan.topology.local_world_size) == (4, 2)
    ranks = sorted(shard.rank for shard in plan.tables["C5"].shards)
    assert ranks in ([0, 1], [2, 3])
    for column in {shard.column_offset for shard in plan.tables["C6"].shards}:
        shards = [s for s in plan.tables["C6"].shards if s.column_offset == column]
        assert sorted(shard.rank for shard in shards) in ([0, 1], [2, 3])


# ------------------------------------------------------------------ workers fail


def test_a_killed_rank(whole: HostsRun, run: HostsRun) -> None:
    """Both hosts start their workers again, from the last checkpoint; the run ends with the bits of
    the one that nothing disturbed, each step reported once, in one run directory."""
    ended = finish(run.start(*run.mortal("SIGKILL")))
    assert [code for code, _, _ in ended] == [0, 0]
    shown = ended[0][2] + ended[1][2]
    assert "the worker of rank 1 was killed by SIGKILL" in shown
    assert "starting the workers again (1 of 3)" in shown
    assert "going on after step 6" in shown
    assert run.bytes_of_newest() == whole.bytes_of_newest()
    assert run.losses() == whole.losses()
    assert [path.name for path in run.folder.glob("run*") if path.is_dir()] == ["run"]
    for rank in range(4):
        log = (run.directory / "logs" / f"rank_{rank}.log").read_text()
        for attempt in (1, 2):
            assert f"--- rank {rank} on h{rank // 2}, attempt {attempt}, " in log


@pytest.mark.slow
def test_a_stopped_rank(whole: HostsRun, run: HostsRun) -> None:
    """A process that does not run (SIGSTOP) is found, named and replaced."""
    ended = finish(run.start(*run.mortal("SIGSTOP"), "launch.hang_seconds=6"))
    assert [code for code, _, _ in ended] == [0, 0]
    assert "the worker of rank 1 on h0 has not run for launch.hang_seconds (6)" in (
        ended[0][2] + ended[1][2]
    )
    assert run.bytes_of_newest() == whole.bytes_of_newest()


@pytest.mark.slow
def test_a_rank_that_dies_at_the_same_step_again(run: HostsRun) -> None:
    """It is started once more, not for ever; every host tells the reason."""
    for code, _, err in finish(run.start(*run.mortal("SIGKILL", times=9))):
        assert code == 1
        assert "failed twice after step 6, so the workers are not started again" in err
        assert "the worker of rank 1 was killed by SIGKILL" in err
        assert f"its whole log: {run.directory}/logs/rank_1.log" in err
    failure = json.loads((run.directory / "failure.json").read_text())
    assert failure["error"].startswith("failed twice after step 6")


@pytest.mark.parametrize("nnodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_planned_stop(run: HostsRun, nnodes: int) -> None:
    """SIGTERM to one launcher: the ranks of all hosts save after the same step, and end."""
    processes = run.start("train.epochs=1000", "checkpoint.every_steps=null", nnodes=nnodes)
    wait_for(lambda: (run.directory / "metrics.jsonl").exists(), processes)
    processes[-1].send_signal(signal.SIGTERM)
    for code, _, err in finish(processes):
        assert code == 128 + signal.SIGTERM
        assert "stopped by SIGTERM after step" in err
        assert "checkpoint.resume=latest" in err
    failure = json.loads((run.directory / "failure.json").read_text())
    saved = run.directory / "checkpoints" / f"step-{failure['step']:08}"
    assert f"the last good one is {saved}" in failure["error"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "cut"])
def test_a_host_that_is_lost(run: HostsRun, fault: str) -> None:
    """Where elastic.min_hosts allows it, the other goes on, under a plan for its own ranks, with
    every row that is left once. A host that is cut off ends with the reason."""
    processes = run.start(
        *("elastic.min_hosts=1", "launch.hang_seconds=6", "train.epochs=20"),
        *run.mortal("SIGKILL", times=0, seconds=0.05),
    )
    first, second = processes
    wait_for(lambda: len(run.metrics()) > 20, processes)
    try:
        run.hosts.kill(1) if fault == "kill" else run.hosts.cut(1)
        ((code, _, err),) = finish([first])
        assert code == 0
        assert "going on with 1 hosts" in err
        if fault == "cut":
            ((code, _, said),) = finish([second])
            assert code == 1
            assert "the connection to the launcher on h0 is lost" in said
    finally:
        run.hosts.cut(1, False)
        second.communicate(timeout=TIMEOUT_SECONDS)
    assert run.metrics()[-2]["samples"] == 20 * 2000
    plan = Plan.load(run.directory / "plan.json")
    assert (plan.topology.world_size, plan.topology.local_world_size) == (2, 2)


def wait_for(condition: Any, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


# ------------------------------------------------------------------ bad input


def refused(run: HostsRun, *arguments: str, first: str = "") -> str:
    """What both hosts say of a run that must not begin."""
    said = finish(run.start(*arguments, first=first))
    for code, _, err in said:
        assert code in (1, 2)
        assert "starting 2 workers" not in err
    assert not run.directory.exists()
    assert not list(run.folder.glob(".shardemb*"))
    texts = [" ".join(err.partition("error:")[2].split()) for _, _, err in said]
    assert texts[0] == texts[1]
    return texts[0]


def test_hosts_that_differ(run: HostsRun, tmp_path: Path) -> None:
    """Number of workers, code and config are compared before training; each host names what
    differs, and where."""
    other = tmp_path / "other.yaml"
    other.write_text(run.config.read_text().replace("batch_size: 64", "batch_size: 32"))
    code = tmp_path / "quiet.py"
    code.write_text(QUIET.read_text() + "# changed\n")
    first = (
        f"mount --bind {other} {run.config}; mount --bind {code} {QUIET}; "
        'set -- "$@" --nproc-per-node 3'
    )
    said = refused(run, first=first)
    assert "number of workers: 2 on h0; 3 on h1" in said
    assert "code of shardemb/quiet.py: " in said
    assert "config key train.batch_size: 64 on h0; 32 on h1" in said
    assert "data.dir" not in said


def test_storage_that_is_not_shared(run: HostsRun) -> None:
    """A folder that only looks the same on both hosts is found before training."""
    run.directory.mkdir()
    said = refused_unshared(run)
    assert f"output: h1 does not see what h0 writes in {run.directory}" in said


def refused_unshared(run: HostsRun) -> str:
    said = finish(run.start(first=f"mount -t tmpfs tmpfs {run.directory}"))
    assert [code for code, _, _ in said] == [1, 1]
    assert list(run.directory.iterdir()) == []
    return " ".join(said[0][2].split())


def launch(run: Run, *arguments: str) -> tuple[int, str, float]:
    """Exit code, message and seconds of a launch on this machine."""
    start = time.monotonic()
    process = python("-m", "launch", "launch", "torchrun", run.config, *arguments)
    assert "Traceback" not in process.stderr
    assert not run.directory.exists()
    return process.returncode, " ".join(process.stderr.split()), time.monotonic() - start


@pytest.fixture
def alone(tmp_path: Path, data: Path) -> Run:
    return Run(tmp_path, data)


def test_an_endpoint_that_cannot_be(alone: Run) -> None:
    """Text without a port, and a host that nobody knows, are told at once."""
    code, said, _ = launch(alone, "--rdzv-endpoint", "h0")
    assert code == 2
    assert "--rdzv-endpoint h0: write HOST:PORT" in said
    code, said, _ = launch(alone, "--rdzv-endpoint", "nowhere.invalid:29500")
    assert code == 2
    assert "this host does not know nowhere.invalid" in said


def test_a_port_in_use(alone: Run) -> None:
    """Another program at the endpoint is told as such."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said, _ = launch(alone, "--rdzv-endpoint", f"127.0.0.1:{port}")
    assert code == 1
    assert f"127.0.0.1:{port}: the port is in use by another program" in said


def test_hosts_that_do_not_come(alone: Run) -> None:
    """How many came is told, and how long was waited."""
    port = free_port()
    code, said, _ = launch(
        alone, "--nnodes", "3", "--rdzv-endpoint", f"127.0.0.1:{port}", "launch.wait_seconds=1"
    )
    assert code == 1
    assert f"only 1 of 3 hosts came to 127.0.0.1:{port} within 1 s" in said


def test_an_endpoint_that_nobody_reaches(run: HostsRun) -> None:
    """An address without a way to it is told within seconds, not minutes."""
    waiting = run.start("launch.wait_seconds=2", nnodes=1, endpoint="10.99.0.1:29500")
    ((code, _, said),) = finish(waiting)
    assert code == 1
    assert "10.99.0.1:29500: it cannot be reached" in " ".join(said.split())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
