"""`shardemb launch ray` on a cluster of several nodes: the same run as on one host, also when
workers and hosts die."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.hosts_run import Run
from tests.launch.ray_test_cluster import Cluster, cluster_settings
from tests.launch.tiny_run import TIMEOUT_SECONDS, make_data, python, shardemb

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'shardemb[ray]'",
)


class RayRun(Run):
    """On the nodes of a cluster."""

    process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "launch", "launch", "ray", str(self.config), *arguments]
        self.process = subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        )
        return self.process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    print(err)  # beside a failure
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        cluster_settings(patch, folder)
        made = Cluster(folder)
        try:
            made.tell("add")
            made.tell("add")
            yield made
        finally:
            made.close()


@pytest.fixture
def run(tmp_path: Path, data: Path, cluster: Cluster) -> Iterator[RayRun]:
    made = RayRun(tmp_path, data)
    (made.folder / "mortal.py").rename(cluster.folder / "mortal.py")
    yield made
    if made.process:
        made.process.kill()
        made.process.wait()


def test_a_killed_rank(run: RayRun, cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """Two hosts of two workers have the losses of four workers on one, also when one of them is
    killed: the run goes on from the last checkpoint, and reports each step once."""
    address = ["--address", cluster.address, "--num-hosts", "2", "--json"]
    code, out, err = finish(run.start(*address, *run.mortal("SIGKILL")))
    assert code == 0
    assert json.loads(out) == json.loads((run.directory / "result.json").read_text())
    assert "the worker of rank 1 was killed by SIGKILL" in err
    assert "going on after step 6" in err
    for rank in range(4):
        log = (run.directory / "logs" / f"rank_{rank}.log").read_text()
        assert [f", attempt {n}, " in log for n in (1, 2, 3)] == [True, True, False]
    (tmp_path / "local").mkdir()
    local = Run(tmp_path / "local", data)
    process = shardemb("train", local.config, "launch.nproc_per_node=4")
    assert process.returncode == 0, process.stderr
    assert run.losses() == pytest.approx(local.losses(), rel=1e-6)


@pytest.mark.slow
def test_a_host_that_is_lost_and_comes_back(run: RayRun, cluster: Cluster) -> None:
    """Training goes on with the ranks that are left, under a plan for them, then with all again;
    every row of an epoch is trained once."""
    process = run.start(
        *("--address", cluster.address, "elastic.min_hosts=1", "elastic.max_hosts=2"),
        *("train.epochs=20", "checkpoint.every_steps=10", "checkpoint.keep_last=1000"),
        *run.mortal("SIGKILL", times=0, seconds=0.05),
    )
    wait_for(lambda: "step-00000010" in checkpoints(run), process)
    cluster.tell("lose")
    wait_for(lambda: world_size(run) == 2, process)
    before = len(checkpoints(run))
    wait_for(lambda: len(checkpoints(run)) > before, process)
    cluster.tell("add")
    code, _, err = finish(process)
    assert code == 0
    assert "is lost" in err
    assert "going on with the hosts that have come" in err
    assert world_size(run) == 4
    result = json.loads((run.directory / "result.json").read_text())
    assert result["samples"] == 20 * 2000
    losses = run.metrics()
    samples = [line["samples"] for line in losses if line["kind"] == "train"]
    assert samples == sorted(set(samples))


def checkpoints(run: Run) -> list[str]:
    path = run.directory / "checkpoints" / "checkpoints.json"
    return json.loads(path.read_text())["checkpoints"] if path.exists() else []


def world_size(run: Run) -> int:
    plan = json.loads((run.directory / "plan.json").read_text())
    return int(plan["topology"]["world_size"])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_more_than_the_cluster_has(run: RayRun, cluster: Cluster) -> None:
    """What is asked for and what is there are told at once."""
    code, _, err = finish(run.start("--address", cluster.address, "--num-hosts", "3"))
    assert code == 1
    assert "3 hosts with 2 CPUs each are needed, and the cluster has 2" in " ".join(err.split())
    assert not run.directory.exists()


def test_a_wrong_token(run: RayRun, cluster: Cluster, tmp_path: Path) -> None:
    """It is refused, and so is one that others can read; neither shows it."""
    token = tmp_path / "token"
    token.write_text("1" * 64)
    said = {}
    for mode in (0o644, 0o600):
        token.chmod(mode)
        process = python(
            *("-m", "launch", "launch", "ray", run.config, "--address", cluster.address),
            RAY_AUTH_TOKEN_PATH=str(token),
        )
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
        assert "1" * 64 not in process.stderr
        said[mode] = " ".join(process.stderr.split())
    assert f"chmod 600 {token}" in said[0o644]
    assert "does not let this user in" in said[0o600]


def test_a_cluster_that_is_not_there(run: RayRun) -> None:
    """A port where nobody listens is told within seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*probe.getsockname())
    code, _, err = finish(run.start("--address", address))
    assert code == 1
    assert f"--address {address}: nobody answers there" in " ".join(err.split())
