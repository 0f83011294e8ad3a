"""What is installed, what matches, which devices there are, and the command for each repair.

    python -m launch.doctor [--json]

Standard library only, and nothing is imported into this process: a broken installation, which is
what it is for, cannot take it down.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.matching import MatchingSet, minor, pinned_set, read_pins, set_for_torch, verdict
from launch.probe import ImportFailure, Probe, probe_imports
from launch.setup_env import supported, visible_gpus

CPU_WHEEL, CUDA_WHEEL = "fbgemm-gpu-cpu", "fbgemm-gpu"
PLANNER_PACKAGES = ("fsspec", "numpy", "pyarrow", "pydantic", "pyyaml", "rich", "scipy", "typer")
TRAINING_PACKAGES = ("tensordict", "torchmetrics", "pyre-extensions", "tqdm", "tensorboard")
OPTIONAL_PACKAGES = ("ray",)
PACKAGES = (
    *("torch", CPU_WHEEL, CUDA_WHEEL, "torchrec"),
    *TRAINING_PACKAGES,
    *PLANNER_PACKAGES,
    *OPTIONAL_PACKAGES,
)
IMPORT_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Problem:
    subject: str
    problem: str
    fix: str


@dataclass(frozen=True)
class Facts:
    """All that the verdict rests on, so that the rules below are functions of a value."""

    versions: dict[str, str | None]
    gpus: list[str]
    probe: Probe
    python: tuple[int, int] = sys.version_info[:2]

    @property
    def fbgemm(self) -> str | None:
        return self.versions[CUDA_WHEEL] or self.versions[CPU_WHEEL]

    @property
    def verdict(self) -> str:
        return verdict(self.versions["torch"], self.fbgemm, self.versions["torchrec"])

    @property
    def set_will_do(self) -> bool:
        """A set this project does not know is left alone for as long as it can be imported."""
        unknown_but_works = self.verdict == "unknown" and self.probe.failure is None
        return self.verdict == "match" or unknown_but_works

    @property
    def target(self) -> MatchingSet:
        return set_for_torch(self.versions["torch"])

    @property
    def right_wheel(self) -> str:
        return CUDA_WHEEL if self.gpus else CPU_WHEEL

    @property
    def torch_is_cpu_build(self) -> bool:
        if self.probe.torch_imports:
            return self.probe.cuda_build is None
        return (self.versions["torch"] or "").endswith("+cpu")


def diagnose(timeout: float = IMPORT_TIMEOUT_SECONDS) -> dict[str, Any]:
    """The whole report, ready for JSON. `timeout` is how long the imports may take, in seconds."""
    probe = probe_imports(timeout)
    facts = Facts(installed_versions(), probe.cuda_devices or visible_gpus(), probe)
    problems = find_problems(facts)
    return {
        "ok": not problems,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": facts.versions,
        "matching_set": _matching_set(facts),
        "devices": _devices(facts),
        "backends": probe.backends,
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "problems": [{"problem": p.problem, "fix": p.fix} for p in problems],
        "notes": find_notes(facts),
    }


def installed_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _matching_set(facts: Facts) -> dict[str, Any]:
    torch, torchrec = facts.versions["torch"], facts.versions["torchrec"]
    return {
        "verdict": facts.verdict,
        "installed": {"torch": torch, "fbgemm": facts.fbgemm, "torchrec": torchrec},
        "pinned": pinned_set()._asdict(),
    }


def _devices(facts: Facts) -> list[dict[str, Any]]:
    cuda = [{"kind": "cuda", "index": i, "name": name} for i, name in enumerate(facts.gpus)]
    return [*cuda, {"kind": "cpu", "index": 0, "name": platform.machine()}]


def cores() -> int:
    """The cores this process may use, which a batch system can make fewer than the host's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """The host's memory, or this container's limit where that is lower."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return host
    return min(host, int(limit)) if limit.isdigit() else host


# ------------------------------------------------------------------ the rules


def find_problems(facts: Facts) -> list[Problem]:
    """Every problem once. A failing import joins the problem that explains it, if one does."""
    rules = (python_problem, torch_problem, fbgemm_problem, torchrec_problem, missing_problem)
    problems = [found for rule in rules if (found := rule(facts)) is not None]
    failure = facts.probe.failure
    if failure is None or (failure.missing and not _installed(failure, facts)):
        return problems  # what is not installed has been named above
    text = f"importing {failure.module} {failure.why}"
    if failure.origin:
        text += f" (found in {failure.origin})"
    subject = _subject_of(failure)
    for i, known in enumerate(problems):
        if known.subject == subject:
            problems[i] = Problem(subject, f"{known.problem}; {text}", known.fix)
            return problems
    return [*problems, Problem(subject, text, reinstall(subject, facts))]


def python_problem(facts: Facts) -> Problem | None:
    if supported(facts.python):
        return None
    found = ".".join(map(str, facts.python))
    return Problem(
        "python",
        f"Python {found} is not supported: 3.10, 3.11 or 3.12 is needed",
        "make setup PYTHON=python3.11",
    )


def torch_problem(facts: Facts) -> Problem | None:
    torch, wanted = facts.versions["torch"], facts.target
    install = pip("install", _exactly("torch", wanted.torch))
    if torch is None:
        return Problem("torch", "torch is not installed", install)
    if minor(torch) != minor(wanted.torch) and not facts.set_will_do:
        text = f"torch {torch} is in no known matching set with fbgemm and torchrec"
        return Problem("torch", text, install)
    if facts.versions[CUDA_WHEEL] and facts.gpus and facts.torch_is_cpu_build:
        # pip counts the CPU build of a version as that version: only after an uninstall does it
        # look for another. From the default index, torch for Linux is the CUDA build.
        text = f"torch {torch} is a CPU build, but {CUDA_WHEEL} needs one with CUDA"
        return Problem("torch", text, reinstall("torch", facts))
    return None


def fbgemm_problem(facts: Facts) -> Problem | None:
    text = _wrong_wheel(facts) or _wrong_fbgemm_version(facts)
    return Problem("fbgemm", text, reinstall("fbgemm", facts)) if text else None


def _wrong_wheel(facts: Facts) -> str | None:
    cpu, cuda = facts.versions[CPU_WHEEL], facts.versions[CUDA_WHEEL]
    if cpu and cuda:
        return (
            f"both {CPU_WHEEL} {cpu} and {CUDA_WHEEL} {cuda} are installed: they write the same "
            "files, so each has overwritten the other"
        )
    if not cpu and not cuda:
        return f"fbgemm is not installed: neither {CPU_WHEEL} nor {CUDA_WHEEL}"
    if cuda and not facts.gpus:
        return f"{CUDA_WHEEL} {cuda} is the CUDA wheel, but this machine has no CUDA device"
    return None


def _wrong_fbgemm_version(facts: Facts) -> str | None:
    assert facts.fbgemm is not None  # or _wrong_wheel would have spoken
    return _mismatch("fbgemm", facts.fbgemm, facts.target.fbgemm, facts)


def torchrec_problem(facts: Facts) -> Problem | None:
    torchrec = facts.versions["torchrec"]
    if torchrec is None:
        text: str | None = "torchrec is not installed"
    else:
        text = _mismatch("torchrec", torchrec, facts.target.torchrec, facts)
    return Problem("torchrec", text, reinstall("torchrec", facts)) if text else None


def _mismatch(name: str, found: str, needed: str, facts: Facts) -> str | None:
    if facts.set_will_do or minor(found) == minor(needed):
        return None
    torch = minor(facts.target.torch)
    return f"{name} {found} does not match torch {torch}, which needs {name} {minor(needed)}"


def missing_problem(facts: Facts) -> Problem | None:
    pins = {**read_pins("base"), **read_pins("training")}
    required = (*TRAINING_PACKAGES, *PLANNER_PACKAGES)
    missing = [name for name in required if facts.versions[name] is None]
    if not missing:
        return None
    fix = pip("install", *(f"{name}=={pins[name]}" for name in missing))
    return Problem("packages", f"not installed: {', '.join(missing)}", fix)


def find_notes(facts: Facts) -> list[str]:
    """What is worth knowing and needs no repair."""
    notes = []
    if facts.gpus and facts.versions[CPU_WHEEL] and not facts.versions[CUDA_WHEEL]:
        notes.append(
            f"this machine has {len(facts.gpus)} CUDA device(s), and the CPU wheel of fbgemm is "
            "installed: training runs on the CPU. For CUDA: make setup DEVICE=cuda"
        )
    if facts.gpus and facts.probe.cuda_build and not facts.probe.cuda_devices:
        notes.append(
            f"nvidia-smi lists {len(facts.gpus)} CUDA device(s), and torch sees none: the driver "
            f"may be older than CUDA {facts.probe.cuda_build} needs"
        )
    if facts.verdict == "unknown":
        notes.append("torch, fbgemm and torchrec are a set that this project has not been run with")
    return notes


# ---------------------------------------------------------------- the repairs


def pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def reinstall(subject: str, facts: Facts) -> str:
    """The command that puts the right version of `subject` in the place of whatever is there."""
    wanted = facts.target
    if subject == "fbgemm":
        # An uninstall takes the files that the two wheels share, whoever wrote them last.
        install = pip("install", _exactly(facts.right_wheel, wanted.fbgemm))
        present = [wheel for wheel in (CUDA_WHEEL, CPU_WHEEL) if facts.versions[wheel]]
        return f"{pip('uninstall', '-y', *present)} && {install}" if present else install
    if subject == "torch":
        # Not --force-reinstall, which would also replace the gigabytes of libraries below it.
        install = pip("install", _exactly("torch", wanted.torch))
        return f"{pip('uninstall', '-y', 'torch')} && {install}"
    pins = {**read_pins("training"), "torchrec": wanted.torchrec}
    if subject not in pins:
        return "rm -r .venv && make setup"
    # --no-deps: torchrec's metadata would pull the CUDA wheel of fbgemm, whatever the device.
    force = ["--force-reinstall"] if facts.versions[subject] else []
    return pip("install", *force, "--no-deps", _exactly(subject, pins[subject]))


def _exactly(name: str, version: str) -> str:
    """A pinned version as it is; the newest patch of a set that is known by major.minor only."""
    return f"{name}=={version}" if version.count(".") > 1 else f"{name}=={version}.*"


def _subject_of(failure: ImportFailure) -> str:
    return {"fbgemm_gpu": "fbgemm"}.get(failure.module, failure.module.replace("_", "-"))


def _installed(failure: ImportFailure, facts: Facts) -> bool:
    subject = _subject_of(failure)
    return bool(facts.fbgemm if subject == "fbgemm" else facts.versions.get(subject))


# ----------------------------------------------------------------- the output


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    versions = report["packages"]
    width = max(map(len, versions))
    matching, pinned = report["matching_set"], report["matching_set"]["pinned"]
    pins = ", ".join(f"{name} {version}" for name, version in pinned.items())
    devices = ", ".join(f"{d['kind']}:{d['index']} {d['name']}" for d in report["devices"])
    lines = [
        f"{'python':<{width}}  {report['python']['version']}  {report['python']['executable']}",
        *(f"{name:<{width}}  {version or '-'}" for name, version in versions.items()),
        "",
        f"{'matching set':<{width}}  {matching['verdict']} (pinned: {pins})",
        f"{'platform':<{width}}  {report['platform']}",
        f"{'devices':<{width}}  {devices}",
        f"{'backends':<{width}}  {', '.join(report['backends']) or '-'}",
        f"{'cores':<{width}}  {report['cores']}",
        f"{'memory':<{width}}  {report['memory_bytes'] / 2**30:.1f} GiB",
        "",
        *(f"note: {note}" for note in report["notes"]),
    ]
    for number, found in enumerate(report["problems"], start=1):
        lines += [f"problem {number}: {found['problem']}", f"    fix: {found['fix']}"]
    if report["ok"]:
        lines.append("No problems found.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="doctor", description="Check this installation.")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--timeout",
        type=float,
        default=IMPORT_TIMEOUT_SECONDS,
        help="seconds the imports may take (default: %(default)g)",
    )
    options = parser.parse_args(arguments)
    report = diagnose(options.timeout)
    print(json.dumps(report) if options.json else render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
