"""The Slurm script: bash runs it, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from tests.launch.tiny_run import tiny_config, write_config

STAND_INS = {
    "scontrol": 'printf "%s\\n" node-7 node-8 node-9',
    "srun": f'exec {sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
}


def emitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shown: pytest.CaptureFixture[str]
) -> str:
    config = tiny_config(folder / "data", folder / "run")
    path = write_config(folder / "run.yaml", config)
    line = ["shardemb", "launch", "torchrun", str(path), "data.label=is it", "--nnodes", "3"]
    monkeypatch.setattr(sys, "argv", [*line, "--nproc-per-node", "4", "--emit", "slurm"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return shown.readouterr().out


def test_every_host_gets_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It asks for the hosts and workers of the run, and starts on each what a user would, at the
    first host's name; overrides with spaces stay one."""
    script = emitted(tmp_path, monkeypatch, capfd)
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["nodes"] == "3"
    assert options["ntasks-per-node"] == "1"
    assert options["cpus-per-task"] == "4"
    assert options["signal"] == "TERM@300"
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    ran = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[7-9]"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout) == [
        *("--kill-on-bad-exit=0", "shardemb", "launch", "torchrun", str(tmp_path / "run.yaml")),
        *("checkpoint.resume=latest", "data.label=is it", "launch.nproc_per_node=4"),
        *("--nnodes", "3", "--rdzv-endpoint", "node-7:29500"),
    ]
