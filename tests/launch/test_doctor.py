"""`launch/doctor.py`: its rules on described installations, and whole runs on faked broken ones."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from launch import doctor
from launch.doctor import Facts, find_notes, find_problems
from launch.matching import pinned_set, read_pins
from launch.probe import ImportFailure, Probe

ROOT = Path(doctor.__file__).resolve().parent.parent
PIP = shlex.join([sys.executable, "-m", "pip"])
PINS = {**read_pins("base"), **read_pins("training"), "fbgemm-gpu-cpu": pinned_set().fbgemm}
HEALTHY = {**dict.fromkeys(doctor.PACKAGES), **PINS, "torchrec": pinned_set().torchrec}
HEALTHY = {name: HEALTHY[name] for name in doctor.PACKAGES}
TORCH, FBGEMM, TORCHREC = pinned_set()

# ------------------------------------------------------------------ the rules


def facts(
    *,
    gpus: int = 0,
    cuda_build: str | None = None,
    failure: ImportFailure | None = None,
    python: tuple[int, int] = (3, 11),
    **versions: str | None,
) -> Facts:
    """A healthy CPU installation, but for what is named; packages are spelled with _."""
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    names = ["NVIDIA H200"] * gpus
    sees = names if cuda_build else []
    probe = Probe(True, cuda_build, cuda_devices=sees, backends=["gloo"], failure=failure)
    return Facts({**HEALTHY, **named}, names, probe, python)


def on_gpu(**changes: Any) -> Facts:
    """A healthy CUDA installation, but for what is named."""
    healthy = {"gpus": 1, "cuda_build": "13.0", "fbgemm_gpu": FBGEMM, "fbgemm_gpu_cpu": None}
    return facts(**{**healthy, **changes})


def the_problem(installation: Facts) -> tuple[str, str]:
    (found,) = find_problems(installation)
    return found.problem, found.fix


@pytest.mark.parametrize("installation", [facts(), on_gpu(), facts(torch=f"{TORCH}+cpu")])
def test_a_healthy_installation_has_no_problem(installation: Facts) -> None:
    """No false alarm, on either device."""
    assert find_problems(installation) == []


def test_both_wheels() -> None:
    """Both are removed before the right one comes back, because they share their files."""
    problem, fix = the_problem(facts(fbgemm_gpu=FBGEMM))
    assert f"both fbgemm-gpu-cpu {FBGEMM} and fbgemm-gpu {FBGEMM} are installed" in problem
    remove = f"{PIP} uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
    assert fix == f"{remove} && {PIP} install fbgemm-gpu-cpu=={FBGEMM}"
    _, fix = the_problem(on_gpu(fbgemm_gpu_cpu=FBGEMM))
    assert fix == f"{remove} && {PIP} install fbgemm-gpu=={FBGEMM}"


def test_no_wheel() -> None:
    """The wheel to install is the one for this machine."""
    problem, fix = the_problem(facts(fbgemm_gpu_cpu=None))
    assert "fbgemm is not installed" in problem
    assert fix == f"{PIP} install fbgemm-gpu-cpu=={FBGEMM}"
    _, fix = the_problem(on_gpu(fbgemm_gpu=None))
    assert fix == f"{PIP} install fbgemm-gpu=={FBGEMM}"


def test_cuda_wheel_without_a_cuda_device() -> None:
    """The CUDA wheel is replaced by the CPU wheel."""
    problem, fix = the_problem(facts(fbgemm_gpu=FBGEMM, fbgemm_gpu_cpu=None))
    assert "the CUDA wheel, but this machine has no CUDA device" in problem
    assert fix == f"{PIP} uninstall -y fbgemm-gpu && {PIP} install fbgemm-gpu-cpu=={FBGEMM}"


def test_cpu_torch_with_cuda_fbgemm() -> None:
    """The uninstall is part of the fix: pip takes 2.13.0+cpu for the 2.13.0 that is wanted."""
    problem, fix = the_problem(on_gpu(torch=f"{TORCH}+cpu", cuda_build=None))
    assert problem == f"torch {TORCH}+cpu is a CPU build, but fbgemm-gpu needs one with CUDA"
    assert fix == f"{PIP} uninstall -y torch && {PIP} install torch=={TORCH}"


def test_missing_torchrec_is_installed_without_its_dependencies() -> None:
    """With them, pip would put the CUDA wheel of fbgemm over the CPU one."""
    problem, fix = the_problem(facts(torchrec=None))
    assert problem == "torchrec is not installed"
    assert fix == f"{PIP} install --no-deps torchrec=={TORCHREC}"


@pytest.mark.parametrize("version", ["1.7.0", "1.9.0"])
def test_fbgemm_of_another_release(version: str) -> None:
    """fbgemm is brought to the torch that is installed."""
    problem, fix = the_problem(facts(fbgemm_gpu_cpu=version))
    assert problem == f"fbgemm {version} does not match torch 2.13, which needs fbgemm 1.8"
    assert fix == f"{PIP} uninstall -y fbgemm-gpu-cpu && {PIP} install fbgemm-gpu-cpu=={FBGEMM}"


def test_a_known_older_torch_is_kept() -> None:
    """With torch 2.11, the others are brought to 1.6, the release that matches it."""
    found = find_problems(facts(torch="2.11.0"))
    assert [problem.fix for problem in found] == [
        f"{PIP} uninstall -y fbgemm-gpu-cpu && {PIP} install 'fbgemm-gpu-cpu==1.6.*'",
        f"{PIP} install --force-reinstall --no-deps 'torchrec==1.6.*'",
    ]
    assert find_problems(facts(torch="2.11.0", fbgemm_gpu_cpu="1.6.0", torchrec="1.6.1")) == []


def test_an_unknown_torch_beside_the_pinned_others() -> None:
    """The smallest change is to torch alone."""
    problem, fix = the_problem(facts(torch="2.14.1"))
    assert problem == "torch 2.14.1 is in no known matching set with fbgemm and torchrec"
    assert fix == f"{PIP} install torch=={TORCH}"


def test_an_unknown_set_is_left_alone_while_it_works() -> None:
    """Newer versions than ours get a note; when importing them fails, the pinned set."""
    newer: dict[str, Any] = {"torch": "2.15.0", "fbgemm_gpu_cpu": "2.0.0", "torchrec": "2.0.0"}
    assert find_problems(facts(**newer)) == []
    assert "has not been run with" in find_notes(facts(**newer))[0]
    broken = facts(**newer, failure=ImportFailure("fbgemm_gpu", "raises OSError: x", None))
    assert [problem.subject for problem in find_problems(broken)] == ["torch", "fbgemm", "torchrec"]


def test_nothing_but_the_planner_installed() -> None:
    """Each missing package is named once, though the import of torch fails as well."""
    names = ("torch", "fbgemm_gpu_cpu", "torchrec", "tqdm", "tensordict")
    absent: dict[str, Any] = dict.fromkeys(names)
    failure = ImportFailure("torch", "finds no module torch", None, missing=True)
    found = find_problems(facts(**absent, failure=failure))
    assert [problem.subject for problem in found] == ["torch", "fbgemm", "torchrec", "packages"]
    pins = f"tensordict=={PINS['tensordict']} tqdm=={PINS['tqdm']}"
    assert found[-1].fix == f"{PIP} install {pins}"


def test_a_failing_import_joins_the_problem_that_explains_it() -> None:
    """One cause, one problem, one command."""
    failure = ImportFailure("fbgemm_gpu", "crashes the process (SIGSEGV)", None)
    problem, _ = the_problem(facts(fbgemm_gpu_cpu="1.7.0", failure=failure))
    assert "does not match torch 2.13" in problem and "SIGSEGV" in problem


def test_an_unsupported_python() -> None:
    """The fix makes a new environment: pip cannot change the Python of this one."""
    assert the_problem(facts(python=(3, 13)))[1] == "make setup PYTHON=python3.11"


def test_an_idle_gpu_is_noted() -> None:
    """A CPU wheel on a GPU machine, or a driver torch cannot use, is said without alarm."""
    assert "make setup DEVICE=cuda" in find_notes(facts(gpus=2))[0]
    blind = Facts(on_gpu().versions, ["NVIDIA H200"], Probe(True, cuda_build="13.0"))
    assert "older than CUDA 13.0" in find_notes(blind)[0]


# ----------------------------------------------------------------- whole runs

FAKE_TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
class version:
    cuda = None
class distributed:
    is_available = is_gloo_available = staticmethod(lambda: True)
class _Operators:
    def __init__(self):
        self.asynchronous_complete_cumsum = lambda tensor: tensor
class ops:
    fbgemm = _Operators()
int64 = None
def ones(*sizes, dtype):
    return sizes
"""


@dataclass
class Installation:
    """Fake packages that come before the real ones on the path."""

    folder: Path

    def add(self, module: str, code: str = "") -> None:
        (self.folder / module).mkdir(exist_ok=True)
        (self.folder / module / "__init__.py").write_text(code)

    def add_metadata(self, name: str, version: str) -> None:
        metadata = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )

    def doctor(self, *options: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(self.folder), "PATH": str(self.folder)}
        return subprocess.run(
            [sys.executable, "-m", "launch.doctor", *options],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def report(self, *options: str) -> dict[str, Any]:
        run = self.doctor("--json", *options)
        assert run.stderr == ""
        report: dict[str, Any] = json.loads(run.stdout)
        assert run.returncode == (0 if report["ok"] else 1)
        return report


@pytest.fixture
def fake(tmp_path: Path) -> Installation:
    """A healthy CPU installation whose modules import in no time."""
    made = Installation(tmp_path)
    for module in ("fbgemm_gpu", "tensordict", "torchmetrics", "pyre_extensions", "torchrec"):
        made.add(module)
    made.add("torch", FAKE_TORCH)
    for name, version in HEALTHY.items():
        if version is not None:
            made.add_metadata(name, version)
    return made


def test_a_healthy_run(fake: Installation) -> None:
    """Exit code 0, and the report has what the command prints."""
    report = fake.report()
    assert report["ok"] and report["problems"] == []
    assert report["matching_set"]["verdict"] == "match"
    assert report["packages"]["torchrec"] == TORCHREC
    assert report["devices"][0]["kind"] == "cpu"
    assert report["backends"] == ["gloo"]
    assert report["cores"] >= 1 and report["memory_bytes"] > 2**28
    text = fake.doctor()
    assert text.returncode == 0 and text.stdout.endswith("No problems found.\n")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.abort()", "crashes the process (SIGABRT)"),
        ("import signal; signal.raise_signal(11)", "crashes the process (SIGSEGV)"),
        ("raise OSError('undefined symbol: _ZN2at')", "raises OSError: undefined symbol: _ZN2at"),
        ("import os; os._exit(3)", "ends the process with exit code 3"),
        ("import sys; sys.exit(3)", "raises SystemExit: 3"),
        ("import time; time.sleep(60)", "hangs: not finished after 1 s"),
    ],
)
def test_an_import_that_goes_wrong(fake: Installation, code: str, expected: str) -> None:
    """Whatever an import does, doctor names the package, how it ended, and the command."""
    fake.add("fbgemm_gpu", code)
    report = fake.report("--timeout", "1" if "sleep" in code else "60")
    (found,) = report["problems"]
    assert found["problem"].startswith(f"importing fbgemm_gpu {expected}")
    assert str(fake.folder / "fbgemm_gpu") in found["problem"]
    install = f"{PIP} install fbgemm-gpu-cpu=={FBGEMM}"
    assert found["fix"] == f"{PIP} uninstall -y fbgemm-gpu-cpu && {install}"
    assert report["backends"] == ["gloo"], "what torch told before the crash is kept"


def test_libraries_that_were_not_loaded(fake: Installation) -> None:
    """fbgemm_gpu can import and have no operators: importing it is not enough."""
    fake.add("torch", FAKE_TORCH.replace("asynchronous_complete_cumsum", "another"))
    (found,) = fake.report()["problems"]
    assert "importing fbgemm_gpu raises AttributeError" in found["problem"]


def test_a_package_that_prints_does_not_spoil_the_json(fake: Installation) -> None:
    """stdout holds one JSON object, whatever the packages print while they are imported."""
    fake.add("torchrec", "import os; print('{not json}'); os.write(1, b'{not json}\\n')")
    assert fake.report()["ok"]


def test_installed_metadata_is_what_is_judged(fake: Installation) -> None:
    """Both wheels' dist-info on the path: the problem, its command and exit code 1."""
    fake.add_metadata("fbgemm-gpu", FBGEMM)
    (found,) = fake.report()["problems"]
    assert found["problem"].startswith("both fbgemm-gpu-cpu")
    text = fake.doctor()
    assert text.returncode == 1
    assert f"fix: {found['fix']}\n" in text.stdout


def test_a_gpu_is_found_without_torch(fake: Installation) -> None:
    """nvidia-smi alone says that the CUDA wheel is the right one."""
    fake.add("torch", "raise ImportError('libcudart.so.13')")
    (fake.folder / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    (fake.folder / "nvidia-smi").chmod(0o755)
    report = fake.report()
    assert report["devices"][0] == {"kind": "cuda", "index": 0, "name": "NVIDIA H200"}
    (found,) = report["problems"]
    assert found["fix"] == f"{PIP} uninstall -y torch && {PIP} install torch=={TORCH}"


def test_this_environment_is_a_matching_set() -> None:
    """The environment the tests run in is one that doctor passes."""
    pytest.importorskip("torchrec")
    run = subprocess.run(
        [sys.executable, "-m", "launch.doctor", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    report = json.loads(run.stdout)
    assert report["problems"] == []
    assert report["matching_set"]["verdict"] == "match"
    assert "gloo" in report["backends"]


def test_the_command_survives_what_it_diagnoses(tmp_path: Path) -> None:
    """`shardemb doctor` reports even where the command's own libraries do not import."""
    (tmp_path / "pydantic.py").write_text("raise ImportError('broken pydantic')\n")
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "Traceback" not in done.stderr
    assert "packages" in json.loads(done.stdout)


def test_the_console_script_is_that_command() -> None:
    """pip's `shardemb` starts the same module."""
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "shardemb"]
    assert script.value == "launch.__main__:main"
