"""What a run takes to go on after a failure, and whether its result stays right.

    python -m benchmarks.recovery --runs 20 --markdown benchmarks/results/recovery.md

Runs of two hosts with two gloo ranks each, again and again, each disturbed once at a random moment
while it trains. `torchrun`: hosts are network namespaces of this machine (root, iproute2), so that
a link can be cut. `ray`: nodes of a cluster on this machine. Where all ranks come back the last
checkpoint must have the bits of a run that nothing disturbed; where a host stays away every row
must be trained once, and the AUC be at most 0.002 below that run's (fewer ranks take smaller steps
and more of them, after which it is mostly above). Nothing may be left running.

Seconds from the failure on: until a launcher says what happened, until workers have loaded the last
checkpoint, and until they have trained a step.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

if not __package__:  # started as a file: its own folder must not hide the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytest
import typer
import yaml

from tests.launch.emulated_hosts import Hosts
from tests.launch.hosts_run import Run
from tests.launch.ray_test_cluster import Cluster, cluster_settings
from tests.launch.tiny_run import make_data

STEPS, CHECKPOINT_EVERY, STEP_SECONDS = 80, 10, 0.05
ROWS = STEPS * 4 * 64  # of four ranks with 64 rows each
MOST_SECONDS = 180.0
AUC_TOLERANCE = 0.002
SAME_RANKS = ("rank killed", "rank stopped", "killed while saving")
ELASTIC = ("host killed", "link cut")
FAULTS = {"torchrun": (*SAME_RANKS, *ELASTIC), "ray": (*SAME_RANKS, "host killed")}


class Engine(Protocol):
    """What runs are launched on."""

    name: str

    def launch(self, run: Run, *overrides: str) -> list[subprocess.Popen[str]]: ...

    def lose_host(self) -> None: ...

    def mend(self) -> None:
        """Have two hosts again, with nothing running."""


class Torchrun:
    name = "torchrun"

    def __init__(self, folder: Path) -> None:
        self.hosts = Hosts(2, folder)

    def launch(self, run: Run, *overrides: str) -> list[subprocess.Popen[str]]:
        line = ["-m", "launch", "launch", "torchrun", run.config, "--nnodes", "2"]
        line += ["--rdzv-endpoint", "h0:29500", *overrides]
        path = f"{run.folder}:{os.getcwd()}"
        return [self.hosts.start(host, *line, PYTHONPATH=path) for host in range(2)]

    def lose_host(self) -> None:
        self.hosts.kill(1)

    def mend(self) -> None:
        self.hosts.cut(1, False)
        left = [pid for host in range(2) for pid in self.hosts.pids(host)]
        for host in range(2):
            self.hosts.kill(host)
        assert not left, f"processes are left: {left}"


class Ray:
    name = "ray"

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder)
        self.cluster.tell("add")
        self.cluster.tell("add")
        self._has_lost = False

    def launch(self, run: Run, *overrides: str) -> list[subprocess.Popen[str]]:
        (self.cluster.folder / "mortal.py").write_text((run.folder / "mortal.py").read_text())
        line = [sys.executable, "-m", "launch", "launch", "ray", str(run.config)]
        line += ["--address", self.cluster.address, "--num-hosts", "2", *overrides]
        environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return [subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment)]

    def lose_host(self) -> None:
        self.cluster.tell("lose")
        self._has_lost = True

    def mend(self) -> None:
        if self._has_lost:
            self.cluster.tell("add")
        self._has_lost = False
        assert not _workers(), f"workers are left: {_workers()}"


@dataclass
class Launched:
    """Launchers whose lines are read as they come, with their time."""

    run: Run
    processes: list[subprocess.Popen[str]]
    said: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._readers = [threading.Thread(target=self._read, args=(p,)) for p in self.processes]
        for reader in self._readers:
            reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        for line in process.stderr:
            self.said.append((time.monotonic(), line))

    def when(self, after: float, *texts: str) -> float | None:
        """The first time after `after` at which one of `texts` was said."""
        found = [at for at, line in list(self.said) if at > after and any(t in line for t in texts)]
        return min(found, default=None)

    def step(self) -> int:
        trained = [m["step"] for m in self.run.metrics() if m["kind"] == "train"]
        return max(trained, default=0)

    def wait(self, condition: Callable[[], Any]) -> float:
        """When it became true."""
        deadline = time.monotonic() + MOST_SECONDS
        while not condition():
            now = time.monotonic()
            if now > deadline or all(p.poll() is not None for p in self.processes):
                raise AssertionError("".join(line for _, line in self.said)[-3000:])
            time.sleep(0.01)
        return time.monotonic()

    def finish(self) -> list[int]:
        codes = [process.wait(MOST_SECONDS) for process in self.processes]
        for reader in self._readers:
            reader.join()
        return codes


@dataclass(frozen=True)
class Recovered:
    """Seconds from the failure on."""

    noticed: float
    loaded: float
    trained: float


def recover(engine: Engine, fault: str, run: Run, whole: Run, draw: random.Random) -> Recovered:
    """One disturbed run; AssertionError where it does not end as it must."""
    overrides = run.mortal("SIGKILL", times=0, seconds=STEP_SECONDS)
    if fault in ELASTIC:
        overrides += ["elastic.min_hosts=1"]
    launched = Launched(run, engine.launch(run, *overrides))
    try:
        at_step = draw.randrange(CHECKPOINT_EVERY, STEPS - CHECKPOINT_EVERY)
        launched.wait(lambda: launched.step() >= at_step)
        failed = _disturb(engine, fault, launched, draw)
        launched.wait(lambda: launched.when(failed, "going on after step", "beginning anew"))
        loaded = launched.when(failed, "going on after step", "beginning anew")
        size = (run.directory / "metrics.jsonl").stat().st_size
        trained = launched.wait(lambda: (run.directory / "metrics.jsonl").stat().st_size > size)
        said = ("starting the workers again", "is lost", "going on with")
        noticed = launched.when(failed, *said)
        codes = launched.finish() if fault != "link cut" else [launched.processes[0].wait()]
        assert noticed is not None
        assert loaded is not None
        assert codes[0] == 0, launched.said
        _check(fault, run, whole)
        return Recovered(noticed - failed, loaded - failed, trained - failed)
    finally:
        for process in launched.processes:
            process.kill() if fault in ELASTIC else process.wait(MOST_SECONDS)
        launched.finish()
        engine.mend()


def _disturb(engine: Engine, fault: str, launched: Launched, draw: random.Random) -> float:
    """When it was done."""
    if fault == "host killed":
        engine.lose_host()
    elif fault == "link cut":
        assert isinstance(engine, Torchrun)
        engine.hosts.cut(1)
    else:
        victim = draw.choice(_workers())
        if fault == "killed while saving":
            victim = _workers()[0]
            folder = launched.run.directory / "checkpoints"
            known = set(folder.iterdir())
            launched.wait(lambda: set(folder.iterdir()) - known)
        os.kill(victim, signal.SIGSTOP if fault == "rank stopped" else signal.SIGKILL)
    return time.monotonic()


def _workers() -> list[int]:
    """The processes of ranks 0, 1, ..., which have the rank in their name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = re.fullmatch(r"rank (\d+) shard\w*\n", (path / "comm").read_text())
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if name and state != "Z":
                found[int(name[1])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def _check(fault: str, run: Run, whole: Run) -> None:
    result, expected = (
        json.loads((each.directory / "result.json").read_text()) for each in (run, whole)
    )
    assert result["samples"] == ROWS
    if fault in SAME_RANKS:
        assert run.bytes_of_newest() == whole.bytes_of_newest(), "other bits"
    else:
        lost = expected["eval"]["auc"] - result["eval"]["auc"]
        assert lost < AUC_TOLERANCE, f"AUC is {lost:.4f} lower"


# --- Measuring


def make_run(folder: Path, data: Path) -> Run:
    folder.mkdir()
    run = Run(folder, data)
    config = yaml.safe_load(run.config.read_text())
    config["train"]["epochs"] = 1
    config["checkpoint"]["every_steps"] = CHECKPOINT_EVERY
    run.config.write_text(yaml.safe_dump(config))
    return run


def measured(
    engine: Engine, runs: int, failures: Sequence[str], data: Path, folder: Path
) -> Iterator[str]:
    """Rows of a table."""
    whole = make_run(folder / f"{engine.name}-whole", data)
    mortal = whole.mortal("SIGKILL", times=0)
    assert Launched(whole, engine.launch(whole, *mortal)).finish()[0] == 0
    engine.mend()
    for fault in [each for each in FAULTS[engine.name] if each in failures]:
        found, wrong, draw = [], [], random.Random(f"{engine.name} {fault}")
        for number in range(runs):
            run = make_run(folder / f"{engine.name}-{fault}-{number}".replace(" ", "-"), data)
            try:
                found.append(recover(engine, fault, run, whole, draw))
            except AssertionError as error:
                wrong.append(str(error))
                print(f"{engine.name}, {fault}, run {number}: {error}", file=sys.stderr)
        cells = [f"{engine.name} | {fault} | {len(found)} of {runs}"]
        for part in ("noticed", "loaded", "trained"):
            values = [getattr(each, part) for each in found]
            shown = f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "-"
            cells.append(shown)
        row = f"| {' | '.join(cells)} |"
        print(row, file=sys.stderr)  # the others take minutes more
        yield row


@contextmanager
def started(name: str, folder: Path) -> Iterator[Engine]:
    if name == "torchrun":
        engine = Torchrun(folder)
        try:
            yield engine
        finally:
            engine.hosts.close()
    else:
        with pytest.MonkeyPatch.context() as patch:
            cluster_settings(patch, folder)
            ray = Ray(folder)
            try:
                yield ray
            finally:
                ray.cluster.close()


def main(
    runs: Annotated[int, typer.Option(metavar="N", help="of each failure")] = 20,
    engines: Annotated[str, typer.Option(metavar="NAME,...")] = "torchrun,ray",
    failures: Annotated[str, typer.Option(metavar="NAME,...")] = ",".join(FAULTS["torchrun"]),
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data", train_rows=ROWS, test_rows=20_000)
        for engine_name in engines.split(","):
            (folder / engine_name).mkdir()
            with started(engine_name, folder / engine_name) as engine:
                rows += list(measured(engine, runs, failures.split(","), data, folder))
    heading = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores for all four ranks "
        f"and both launchers; {STEPS} steps, a checkpoint after every {CHECKPOINT_EVERY}. Seconds "
        "after the failure: the median, and the longest."
    )
    columns = "| engine | failure | ended right | told | loaded | trained a step |"
    text = "\n".join(
        ["# Recovery", "", heading, "", columns, "|---|---|---|---:|---:|---:|", *rows, ""]
    )
    if markdown_path:
        markdown_path.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
