"""`launch/setup_env.py`, run in a small copy of the tree with a stand-in for pip."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import setup_env

ROOT = Path(setup_env.__file__).resolve().parent.parent

# Records each call. What it installs or breaks is told by files beside it.
FAKE_PYTHON = """#!/bin/sh
[ "$3" = --version ] && exit 0
PATH=/bin:/usr/bin
here=${0%/*}
echo "$@" >> "$here/calls"
if [ -e "$here/kill-me" ]; then rm "$here/kill-me"; kill -9 $PPID; fi
if [ -e "$here/fail" ]; then echo "ERROR: No matching distribution found"; exit 1; fi
exit 0
"""


@dataclass
class Tree:
    """A copy of what the setup reads, with a venv whose interpreter is the stand-in."""

    root: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def bin(self) -> Path:
        return self.venv / "bin"

    @property
    def packages(self) -> Path:
        return self.venv / "lib" / "python3.11" / "site-packages"

    def set_up(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/setup_env.py", *options]
        kept = {k: v for k, v in os.environ.items() if k != "SHARDEMB_DEVICE"}
        # No other folder in PATH: a real nvidia-smi must not decide.
        variables = {**kept, "PATH": str(self.root / "tools"), **environment}
        return subprocess.run(
            command, cwd=self.root, env=variables, capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[str]:
        """pip's arguments since the last look, without the path to the tree."""
        record = self.bin / "calls"
        lines = record.read_text().splitlines() if record.is_file() else []
        record.unlink(missing_ok=True)
        return [line.replace(f"{self.root}/", "").removeprefix("-m pip ") for line in lines]

    def add_package(self, name: str, *, complete: bool = True) -> Path:
        folder = self.packages / f"{name}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").touch()
        if complete:
            (folder / "RECORD").touch()
        return folder

    def add_nvidia_smi(self, output: str, exit_code: int = 0) -> None:
        tool = self.root / "tools" / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {exit_code}\n")
        tool.chmod(0o755)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    root = tmp_path.resolve() / "project"
    shutil.copytree(ROOT / "launch" / "pins", root / "launch" / "pins")
    shutil.copy(ROOT / "launch" / "setup_env.py", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    made = Tree(root)
    made.bin.mkdir(parents=True)
    (root / "tools").mkdir()
    version = ".".join(map(str, sys.version_info[:3]))
    (made.venv / "pyvenv.cfg").write_text(f"home = somewhere\nversion = {version}\n")
    (made.bin / "python").write_text(FAKE_PYTHON)
    (made.bin / "python").chmod(0o755)
    return made


def pins_installed(calls: list[str]) -> set[str]:
    return {word for call in calls for word in call.split() if word.endswith(".txt")}


def test_installs_the_pins_then_torchrec_alone_then_the_project(tree: Tree) -> None:
    """torchrec never meets the resolver, which would add the CUDA wheel of fbgemm."""
    assert tree.set_up("--device", "cpu").returncode == 0
    pins = "launch/pins"
    together = " ".join(f"-r {pins}/{name}.txt" for name in ("base", "training", "cpu", "dev"))
    assert tree.calls() == [
        f"install {together}",
        f"install --no-deps -r {pins}/torchrec.txt",
        f"install --no-deps --no-build-isolation -e {tree.root}",
    ]


def test_second_run_does_nothing_and_takes_under_a_second(tree: Tree) -> None:
    """An up-to-date environment costs the start of one Python."""
    tree.set_up()
    tree.calls()
    start = time.perf_counter()
    assert tree.set_up().returncode == 0
    assert time.perf_counter() - start < 1
    assert tree.calls() == []


@pytest.mark.parametrize("changed", ["launch/pins/dev.txt", "pyproject.toml"])
def test_a_changed_pin_or_project_file_is_installed(tree: Tree, changed: str) -> None:
    """The stamp covers every file that says what to install."""
    tree.set_up()
    tree.calls()
    with (tree.root / changed).open("a") as file:
        file.write("# changed\n")
    tree.set_up()
    assert len(tree.calls()) == 3


def test_a_moved_environment_is_installed_again(tree: Tree) -> None:
    """A venv's scripts and its editable install name its place: a move is a change."""
    tree.set_up()
    moved = Tree(tree.root.with_name("elsewhere"))
    tree.root.rename(moved.root)
    moved.calls()
    moved.set_up()
    assert len(moved.calls()) == 3


def test_a_venv_whose_interpreter_is_gone_is_made_again(tree: Tree) -> None:
    """The stamp alone does not count: an upgrade of the system's Python breaks the link."""
    tree.set_up()
    (tree.bin / "python").unlink()
    (tree.bin / "python").symlink_to("no-such-python")
    # The new venv has the real pip, which must find nothing to install.
    tree.set_up(PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert (tree.bin / "python").exists()


def test_a_failing_pip_is_explained_and_retried(tree: Tree) -> None:
    """The message has the command and pip's last lines; the failure leaves no stamp."""
    (tree.bin / "fail").touch()
    failed = tree.set_up()
    assert failed.returncode == 1
    assert f"Command: {tree.bin}/python -m pip install -r" in failed.stderr
    assert "ERROR: No matching distribution found" in failed.stderr
    assert "Traceback" not in failed.stderr
    (tree.bin / "fail").unlink()
    tree.calls()
    assert tree.set_up().returncode == 0
    assert len(tree.calls()) == 3


def test_a_killed_install_is_repaired_by_the_next_run(tree: Tree) -> None:
    """Metadata without a RECORD, which pip would take for installed, is discarded first."""
    whole = tree.add_package("numpy-2.4.6")
    half = tree.add_package("scipy-1.17.1", complete=False)
    (tree.bin / "kill-me").touch()
    assert tree.set_up().returncode < 0
    tree.calls()
    assert tree.set_up().returncode == 0
    assert whole.exists() and not half.exists()
    assert len(tree.calls()) == 3
    tree.set_up()
    assert tree.calls() == []


def test_changing_the_device_removes_both_fbgemm_wheels_first(tree: Tree) -> None:
    """The wheels share files: what is left after removing one of them is not a working other."""
    tree.add_package("fbgemm_gpu_cpu-1.8.0")
    tree.add_package("torch-2.13.0+cpu")
    tree.set_up("--device", "cuda")
    calls = tree.calls()
    assert calls[0] == "uninstall --yes fbgemm-gpu-cpu fbgemm-gpu torch"
    assert "launch/pins/cuda.txt" in pins_installed(calls)
    assert "launch/pins/cpu.txt" not in pins_installed(calls)


def test_the_same_device_removes_nothing(tree: Tree) -> None:
    """An environment for this device is added to, not taken apart."""
    tree.add_package("fbgemm_gpu-cpu-1.8.0")
    tree.add_package("torch-2.13.0+cpu")
    tree.set_up("--device", "cpu")
    assert not any("uninstall" in call for call in tree.calls())


def test_auto_takes_cuda_where_nvidia_smi_lists_a_device(tree: Tree) -> None:
    """A GPU is what nvidia-smi lists; the tool without a device, or failing, is none."""
    assert "launch/pins/cpu.txt" in _pins_of(tree)
    tree.add_nvidia_smi("NVIDIA H200")
    assert "launch/pins/cuda.txt" in _pins_of(tree)
    tree.add_nvidia_smi("couldn't communicate with the NVIDIA driver".replace("'", ""), 9)
    assert "launch/pins/cpu.txt" in _pins_of(tree)


def test_the_option_beats_the_variable_beats_the_machine(tree: Tree) -> None:
    """--device, then SHARDEMB_DEVICE, then nvidia-smi."""
    tree.add_nvidia_smi("NVIDIA H200")
    assert "launch/pins/cpu.txt" in _pins_of(tree, SHARDEMB_DEVICE="cpu")
    assert "launch/pins/cuda.txt" in _pins_of(tree, "--device", "cuda", SHARDEMB_DEVICE="cpu")
    refused = tree.set_up(SHARDEMB_DEVICE="tpu")
    assert refused.returncode == 1
    assert "SHARDEMB_DEVICE='tpu' is none of auto, cpu, cuda" in refused.stderr


def _pins_of(tree: Tree, *options: str, **environment: str) -> set[str]:
    assert tree.set_up(*options, **environment).returncode == 0
    return pins_installed(tree.calls())


def test_a_folder_that_is_no_venv_is_not_cleared(tree: Tree) -> None:
    """--venv with a wrong path must not delete what is there."""
    precious = tree.root / "data" / "train.parquet"
    precious.parent.mkdir()
    precious.touch()
    refused = tree.set_up("--venv", "data")
    assert refused.returncode == 1
    assert "is not a virtual environment" in refused.stderr
    assert precious.exists()


def test_an_unsupported_python_is_told_which_to_use(tmp_path: Path) -> None:
    """Too old and too new are refused with the command to type, unless a venv serves."""
    for version in ((3, 8), (3, 13)):
        with pytest.raises(setup_env.SetupError, match="make demo PYTHON=python3.11") as refused:
            setup_env.choose_python(tmp_path, running=version)
        assert f"Python {version[0]}.{version[1]}" in str(refused.value)
    (tmp_path / "pyvenv.cfg").write_text("version = 3.11.7\n")
    assert setup_env.choose_python(tmp_path, running=(3, 8)) == (3, 11)


def test_an_old_python_can_read_the_script() -> None:
    """A Python that is too old gets the message above, not a SyntaxError."""
    ast.parse(Path(setup_env.__file__).read_text(), feature_version=(3, 7))
