"""`shardemb launch ray --submit`: a run as a job of a Ray cluster that has a dashboard."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.hosts_run import Run
from tests.launch.tiny_run import TIMEOUT_SECONDS, make_data

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("aiohttp") is None,
    reason="Ray's job server is not installed: pip install 'ray[default]'",
)


class JobRun(Run):
    """Submitted from its own folder."""

    def start(self, url: str, *arguments: str) -> subprocess.Popen[str]:
        line = ["-m", "launch", "launch", "ray", "run.yaml", "--submit", "--address", url]
        return subprocess.Popen(
            [sys.executable, *line, "--json", "--num-hosts", "1", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Head:
    """A cluster of one host with room for two workers."""

    def __init__(self, folder: Path) -> None:
        ports = {name: free_port() for name in ("port", "dashboard-port", "metrics-export-port")}
        self.url = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.metrics = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
        options = [
            *("--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=100000000"),
            *("--include-dashboard=true", f"--temp-dir={folder}"),
            *(f"--{name}={port}" for name, port in ports.items()),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
            stdout=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(self.url[-5:])), 1):
                return
            time.sleep(0.1)
        raise AssertionError("no dashboard")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text("0" * 64)
    (folder / "token").chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", os.getcwd()))
        made = Head(Path("/tmp") / folder.name)  # paths of its sockets must be short
        try:
            made.wait()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path: Path, data: Path) -> JobRun:
    return JobRun(tmp_path, data)


def test_a_job_is_followed_to_its_result(run: JobRun, head: Head) -> None:
    """With a model of the directory that is uploaded; its progress is in Ray's own metrics."""
    slow = run.mortal("SIGKILL", times=0, seconds=0.15)
    process = run.start(head.url, *slow, "train.epochs=3", "checkpoint.every_steps=null")
    exported = ""
    while process.poll() is None:
        with suppress(OSError):
            text = urllib.request.urlopen(head.metrics).read().decode()
            exported = text if "shardemb_step" in text else exported
        time.sleep(0.2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result == json.loads((run.directory / "result.json").read_text())
    assert "training on 2 x cpu" in err and '{"steps"' not in err
    values = [line for line in exported.splitlines() if line.startswith("ray_shardemb_step{")]
    assert values and 0 < float(values[0].split()[-1]) <= result["steps"]


def test_a_job_that_fails(run: JobRun, head: Head) -> None:
    """Its message is shown and its exit code is the command's."""
    process = run.start(head.url, "data.dir=/nowhere")
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode and "Traceback" not in err
    assert "data.dir: /nowhere" in err or "/nowhere/train" in err
    assert f"failed: Job entrypoint command failed with exit code {process.returncode}," in err


def test_ctrl_c_leaves_the_job_running(run: JobRun, head: Head) -> None:
    """How to follow and to end it is told, and it is there to be ended."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    slow = run.mortal("SIGKILL", times=0, seconds=0.5)
    process = run.start(head.url, *slow, "train.epochs=50")
    assert process.stderr
    job = next(line for line in process.stderr if line.startswith("submitted")).split()[1]
    client = JobSubmissionClient(head.url)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while client.get_job_status(job) != JobStatus.RUNNING and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"{job} goes on" in err and f"ray job stop {job}" in err
    assert client.get_job_status(job) == JobStatus.RUNNING
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.get_job_status(job) == JobStatus.STOPPED


def test_an_address_without_a_job_server(run: JobRun) -> None:
    """It is named, within seconds."""
    url = f"http://127.0.0.1:{free_port()}"
    process = run.start(url)
    _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1 and "Traceback" not in err
    assert f"--address {url}: the cluster takes no job there" in " ".join(err.split())
