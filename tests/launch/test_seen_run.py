"""What a run tells of itself at its end: where its time went, and who was waited for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from planner import RequestError
from shardemb.metrics.exported import refuse_unavailable
from shardemb.metrics.wall_time import PARTS
from tests.launch.hosts_run import Run
from tests.launch.tiny_run import make_data, python

# Evaluation takes a second, so that the last report can be read.
LINGERING = """
import time

from shardemb.models.dlrm import DLRM

class Lingering(DLRM):
    def forward(self, batch):
        time.sleep(0.3 * (not self.training))
        return super().forward(batch)
"""

# One rank's steps take 60 ms more.
SLOW = """
import os, time

from shardemb.models.dlrm import DLRM

class Slow(DLRM):
    def __init__(self, embeddings, num_dense, rank):
        super().__init__(embeddings, num_dense, dense_layers=[8], over_layers=[8])
        self.is_slow = int(os.environ["RANK"]) == rank

    def forward(self, batch):
        time.sleep(0.06 * (self.is_slow and self.training))
        return super().forward(batch)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    (tmp_path / "slow.py").write_text(SLOW)
    return Run(tmp_path, data)


def import_path(run: Run) -> str:
    return ":".join([str(run.folder), os.getcwd(), os.environ.get("PYTHONPATH", "")])


def train(run: Run, verb: tuple[str, ...], *overrides: str) -> tuple[dict[str, Any], str, float]:
    """Result, what was shown, and the seconds of the whole command."""
    begin = time.monotonic()
    process = python(
        *("-m", "launch", *verb, run.config, *overrides),
        PYTHONPATH=import_path(run),
    )
    seconds = time.monotonic() - begin
    assert process.returncode == 0, process.stderr
    result = json.loads((run.directory / "result.json").read_text())
    return result, process.stdout + process.stderr, seconds


def check_sum(seconds: dict[str, float], whole: float) -> None:
    """Each second once; what the command took beyond is the ends of two processes."""
    assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["wall"])
    assert seconds["compute"] + seconds["communication"] == pytest.approx(seconds["training"])
    assert 0 < whole - seconds["wall"] < 0.5 * whole


def test_the_slow_rank_is_named(run: Run) -> None:
    """In the progress, the summary and the result, with what it costs the other."""
    args = ["model.name=slow:Slow", "model.args={rank: 1}", "train.epochs=2"]
    result, shown, whole = train(run, ("train",), *args)
    assert result["straggler"]["rank"] == 1
    assert 40 < result["straggler"]["wait_ms"] < result["straggler"]["step_ms"]
    assert result["straggler"]["step_ms"] > 60
    assert shown.count("rank 1 (host ") == 2
    check_sum(result["seconds"], whole)
    assert result["seconds"]["recovery"] == 0 and result["restarts"] == 0
    assert result["seconds"]["communication"] > 0.5 * result["seconds"]["training"]
    for part in ("start", "evaluation", "checkpoints", "data_wait"):
        assert result["seconds"][part] > 0
    assert "(estimated" in shown


def test_a_failure_costs_recovery(run: Run) -> None:
    """Workers that are started again load anew and train the sixth step again: next to nothing
    else is between the reports of the fifth step and of the sixth."""
    verb = ("launch", "torchrun", "--rdzv-endpoint", "127.0.0.1:29477")
    result, shown, whole = train(run, verb, *run.mortal("SIGKILL"), "checkpoint.every_steps=5")
    check_sum(result["seconds"], whole)
    assert result["restarts"] == 1
    assert "restarted 1 times" in shown
    metrics = [line for line in run.metrics() if line["kind"] == "train"]
    assert [line["restarts"] for line in metrics] == [0] * 5 + [1] * (len(metrics) - 5)
    between = metrics[5]["time"] - metrics[4]["time"]
    assert 0.5 * between < result["seconds"]["recovery"] < between + 0.1


def test_a_running_run_is_scraped(run: Run) -> None:
    """What Prometheus reads is what the run itself reports; only this machine may read it."""
    parser = pytest.importorskip("prometheus_client.parser")
    (run.folder / "lingering.py").write_text(LINGERING)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    overrides = [f"launch.metrics_port={port}", "model.name=lingering:Lingering"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "train", run.config, *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": import_path(run)},
    )
    text = ""
    while process.poll() is None:
        with suppress(OSError):
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        time.sleep(0.05)
    assert process.stderr
    assert process.returncode == 0, process.stderr.read()
    samples = [s for f in parser.text_string_to_metric_families(text) for s in f.samples]
    found = {s.name + s.labels.get("part", ""): s.value for s in samples}
    result = json.loads((run.directory / "result.json").read_text())
    for key in ("samples", "samples_per_second", "train_loss"):
        assert found[f"shardemb_{key}"] == pytest.approx(result[key])
    assert found["shardemb_step"] == result["steps"]
    assert found["shardemb_data_wait_ratio"] == pytest.approx(result["data_wait_fraction"])
    assert found["shardemb_restarts_total"] == 0
    trained = found["shardemb_seconds_totaltraining"]
    assert 0 < trained == pytest.approx(result["seconds"]["training"], rel=0.01)
    assert 0 < found["shardemb_seconds_totalcheckpoints"] <= result["seconds"]["checkpoints"]
    steps = result["steps"] - 10
    assert found["shardemb_step_seconds"] * steps * result["samples_per_second"] == pytest.approx(
        result["samples"] - 10 * 128
    )


def test_a_metrics_port_in_use(run: Run) -> None:
    """It is told by the name of its key."""
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = python("-m", "launch", "train", run.config, f"launch.metrics_port={port}")
    assert process.returncode == 1
    assert f"launch.metrics_port: cannot listen on 127.0.0.1:{port}" in process.stderr
    assert not run.directory.exists()


def test_the_library_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, how to have it is told before workers start."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'shardemb\[metrics\]'"):
        refuse_unavailable()
