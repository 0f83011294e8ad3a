"""Runs that are killed, at any moment, go on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shardemb.checkpoint.contents import Found, verify
from shardemb.checkpoint.listing import read_checkpoint, read_names
from shardemb.checkpoint.store import Store
from tests.launch.tiny_run import (
    TIMEOUT_SECONDS,
    make_data,
    python,
    shardemb,
    tiny_config,
    write_config,
)


class Run:
    """A run with a checkpoint after every second step."""

    def __init__(self, data: Path, folder: Path) -> None:
        config = tiny_config(data, folder / "run")
        config["train"] |= {"epochs": 4, "deterministic": True}
        config["checkpoint"] = {"every_steps": 2}
        self.folder, self.directory = folder, folder / "run"
        self.config = write_config(folder / "run.yaml", config)
        self.store = Store(self.directory / "checkpoints")

    def train(self, *overrides: str) -> dict[str, Any]:
        process = shardemb("train", self.config, *overrides, "--json")
        assert process.returncode == 0, process.stderr
        result: dict[str, Any] = json.loads(process.stdout)
        return result

    def start(self) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "launch", "train", str(self.config)]
        log = (self.folder / "log").open("ab")
        return subprocess.Popen([*line, "checkpoint.resume=latest"], stdout=log, stderr=log)

    def newest(self) -> list[str]:
        return read_names(self.store)[-1:]

    def bytes_of_newest(self) -> dict[str, bytes]:
        """Of its tensors."""
        (name,) = self.newest()
        folder = self.directory / "checkpoints" / name
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    def verify(self) -> None:
        """Every checkpoint in the list is whole."""
        for name in read_names(self.store):
            verify(Found(self.store, name, read_checkpoint(self.store, name)))


def kill_at_random(run: Run, chance: random.Random) -> None:
    """Kill the launcher or a worker some time after the run has gone on."""
    before, process = run.newest(), run.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while run.newest() == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.8))
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    victim = chance.choice([process.pid, *map(int, workers)])
    with suppress(ProcessLookupError):  # the run was done before
        os.kill(victim, signal.SIGKILL)
    process.wait(TIMEOUT_SECONDS)
    for worker in workers:  # the kernel ends them with their launcher
        while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing stopped."""
    run = Run(data, tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def check_killed(whole: Run, data: Path, folder: Path, kills: int) -> None:
    run, chance = Run(data, folder), random.Random(kills)
    for _ in range(kills):
        kill_at_random(run, chance)
        run.verify()
    result = run.train("checkpoint.resume=latest")
    assert run.bytes_of_newest() == whole.bytes_of_newest()
    assert (result["steps"], result["samples"]) == (64, 8000)
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 64
    assert not (run.directory / "failure.json").exists()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["run"]
    expected = json.loads((whole.directory / "result.json").read_text())
    assert result["eval"] == expected["eval"]


def test_a_killed_run_goes_on(whole: Run, data: Path, tmp_path: Path) -> None:
    """Killed three times, its launcher or a worker: its last checkpoint has the bytes of the run
    that nothing stopped, and its metrics each step once."""
    check_killed(whole, data, tmp_path, kills=3)


@pytest.mark.slow
def test_a_run_killed_twenty_times_goes_on(whole: Run, data: Path, tmp_path: Path) -> None:
    check_killed(whole, data, tmp_path, kills=20)


def test_going_on_with_nothing(data: Path, tmp_path: Path) -> None:
    """`latest` starts from the beginning where there is no checkpoint; a name that is not there is
    an error."""
    run = Run(data, tmp_path)
    process = shardemb("train", run.config, "checkpoint.resume=latest", "train.max_steps=3")
    assert process.returncode == 0, process.stderr
    assert "starting from the beginning" in process.stderr
    process = shardemb("train", run.config, "checkpoint.resume=step-00000004")
    assert process.returncode == 1
    assert "there is no checkpoint" in process.stderr
    assert "step-00000003" in process.stderr


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(data: Path, tmp_path: Path) -> None:
    """Where checkpoints have a place of their own, it is refused before training."""
    run, place = Run(data, tmp_path), f"checkpoint.dir={tmp_path / 'place'}"
    run.train(place, "train.max_steps=2")
    process = shardemb("train", run.config, place)
    assert process.returncode == 1
    assert "holds checkpoints of an earlier run" in process.stderr
    assert "training on" not in process.stderr


# A model whose second rank is killed at its sixth step, once.
MORTAL = """
import os, signal
from pathlib import Path

from shardemb.models.dlrm import DLRM

class Mortal(DLRM):
    def __init__(self, embeddings, num_dense, mark):
        super().__init__(embeddings, num_dense, dense_layers=[8], over_layers=[8])
        self.mark, self.step = Path(mark), 0

    def forward(self, batch):
        self.step += 1
        if os.environ["RANK"] == "1" and self.step == 6 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)
"""


def test_torchrun_goes_on(whole: Run, data: Path, tmp_path: Path) -> None:
    """Workers that torchrun starts again go on where the others were, with the same end."""
    run, mark = Run(data, tmp_path), tmp_path / "died"
    (tmp_path / "mortal.py").write_text(MORTAL)
    process = python(
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"),
        *("-m", "shardemb.train", run.config, "checkpoint.resume=latest"),
        *("model.name=mortal:Mortal", f"model.args={{mark: {mark}}}"),
        PYTHONPATH=f"{tmp_path}:{os.getcwd()}",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # or new workers find the addresses of the old
    )
    assert process.returncode == 0, process.stderr
    assert mark.exists()
    assert "going on after step 4" in process.stderr
    assert run.bytes_of_newest() == whole.bytes_of_newest()


def test_a_run_that_was_done(whole: Run) -> None:
    """Gone on with, it evaluates again; with more epochs, it trains on. (The last test: it changes
    the run that others compare with.)"""
    before = json.loads((whole.directory / "result.json").read_text())
    again = whole.train("checkpoint.resume=latest")
    assert again["eval"] == before["eval"]
    assert (again["steps"], again["samples_per_second"]) == (64, None)
    more = whole.train("checkpoint.resume=latest", "train.epochs=5")
    assert more["steps"] == 80
    back = whole.train("checkpoint.resume=step-00000080", "train.epochs=5")
    assert back["eval"] == more["eval"]
