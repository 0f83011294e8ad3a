"""Makes `.venv`, the environment of this project, with the versions pinned in `launch/pins`.

    python3 launch/setup_env.py [--venv .venv] [--device auto|cpu|cuda]

Standard library only: it runs before anything is installed. No syntax newer than Python 3.7: an
old Python must get as far as the message that says which one is needed.

A stamp in the venv, written last, says what was installed. With the same stamp there is nothing
to do; without it (a first run, a changed pin, an interrupted install) the steps are run, each of
which repairs what it finds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)
STAMP = "shardemb-setup.stamp"
LOG = "shardemb-setup.log"
FBGEMM_WHEEL = {"cpu": "fbgemm_gpu_cpu", "cuda": "fbgemm_gpu"}
PIP_LINES_SHOWN = 15


class SetupError(Exception):
    """What stopped the setup and what to do about it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make or repair the project's environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: SHARDEMB_DEVICE if set, else cuda where nvidia-smi lists a GPU, else cpu",
    )
    options = parser.parse_args(arguments)
    try:
        set_up(options.venv.resolve(), choose_device(options.device))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def set_up(venv: Path, device: str) -> None:
    python = choose_python(venv)
    stamp, wanted = venv / STAMP, fingerprint(venv, device, python)
    # `exists` follows the link: an interpreter that was upgraded away leaves a dangling one
    if stamp.is_file() and stamp.read_text() == wanted and (venv / "bin" / "python").exists():
        return
    stamp.unlink(missing_ok=True)
    ensure_venv(venv, python)
    discard_half_installed(venv)
    remove_wheels_of_other_device(venv, device)
    for step in install_steps(device):
        pip(venv, *step)
    stamp.write_text(wanted)
    print(f"setup: {venv.name} is ready ({device}, Python {'.'.join(map(str, python))})")


def choose_device(requested: str) -> str:
    if requested == "auto":
        requested = os.environ.get("SHARDEMB_DEVICE", "") or "auto"
    if requested == "auto":
        return "cuda" if visible_gpus() else "cpu"
    if requested not in FBGEMM_WHEEL:
        raise SetupError(f"SHARDEMB_DEVICE={requested!r} is none of auto, cpu, cuda")
    return requested


def visible_gpus() -> list[str]:
    """The names `nvidia-smi` lists: the one way to ask before torch is installed."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = listing.stdout.splitlines() if listing.returncode == 0 else []
    return [name.strip() for name in names if name.strip()]


def choose_python(venv: Path, running: tuple[int, int] = sys.version_info[:2]) -> tuple[int, int]:
    """The version this run uses; an unsuitable one will do if the venv's own is suitable."""
    if supported(running):
        return running
    installed = python_of(venv)
    if installed is not None and supported(installed):
        return installed
    raise SetupError(
        f"this is Python {running[0]}.{running[1]} and shardemb needs 3.10, 3.11 or 3.12.\n"
        "Name one that is installed: make demo PYTHON=python3.11"
    )


def supported(version: tuple[int, int]) -> bool:
    return OLDEST_PYTHON <= version <= NEWEST_PYTHON


def python_of(venv: Path) -> tuple[int, int] | None:
    """The version the venv was made with, from its pyvenv.cfg."""
    try:
        lines = (venv / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "version":
            major, minor, *_ = value.strip().split(".")
            return int(major), int(minor)
    return None


def fingerprint(venv: Path, device: str, python: tuple[int, int]) -> str:
    """Changes whenever an install would come out differently, or the venv was moved."""
    digest = hashlib.sha256(repr((device, python, str(venv), str(ROOT))).encode())
    pins = sorted((ROOT / "launch" / "pins").glob("*.txt"))
    for file in [ROOT / "pyproject.toml", Path(__file__), *pins]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def ensure_venv(venv: Path, python: tuple[int, int]) -> None:
    if python_of(venv) == python and has_pip(venv):
        return
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise SetupError(f"{venv} is not a virtual environment; name another folder with --venv")
    print(f"setup: making {venv.name} with Python {python[0]}.{python[1]}", flush=True)
    made = run([sys.executable, "-m", "venv", "--clear", str(venv)])
    if made.returncode != 0:
        raise SetupError(
            f"{made.stdout.strip()}\n"
            "The virtual environment could not be made. On Debian and Ubuntu, install the package "
            "python3-venv, or name another Python: make demo PYTHON=python3.11"
        )


def has_pip(venv: Path) -> bool:
    try:
        return run([str(venv / "bin" / "python"), "-m", "pip", "--version"]).returncode == 0
    except OSError:  # no interpreter there, or one whose own installation is gone
        return False


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def site_packages(venv: Path) -> list[Path]:
    return sorted(venv.glob("lib/python3.*/site-packages"))


def discard_half_installed(venv: Path) -> None:
    """Makes pip install again what it was writing when it was killed.

    pip writes RECORD last and never looks for it: metadata without one passes for installed.
    """
    for folder in site_packages(venv):
        for metadata in folder.glob("*.dist-info"):
            if not (metadata / "RECORD").is_file():
                shutil.rmtree(metadata)
        for leftover in folder.glob("~*"):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_wheels_of_other_device(venv: Path, device: str) -> None:
    """Both fbgemm wheels write the same folder, so removing one breaks the other: remove both."""
    other = FBGEMM_WHEEL["cpu" if device == "cuda" else "cuda"]
    doomed = [*FBGEMM_WHEEL.values()] if installed_version(venv, other) else []
    if device == "cuda" and installed_version(venv, "torch").endswith("+cpu"):
        doomed.append("torch")  # pip counts 2.13.0+cpu as the 2.13.0 that is pinned
    if doomed:
        pip(venv, "uninstall", "--yes", *(name.replace("_", "-") for name in doomed))


def installed_version(venv: Path, name: str) -> str:
    """The installed version, '' for none. PyTorch has spelled its wheels with - and with _."""
    for folder in site_packages(venv):
        for metadata in folder.glob("*.dist-info"):
            found, _, version = metadata.name[: -len(".dist-info")].rpartition("-")
            if found.replace("-", "_").lower() == name:
                return version
    return ""


def install_steps(device: str) -> list[list[str]]:
    pins = ROOT / "launch" / "pins"
    together = []
    for name in ("base", "training", device, "dev"):
        together += ["-r", str(pins / f"{name}.txt")]
    return [
        ["install", *together],
        # torchrec's metadata asks for the CUDA wheel of fbgemm, also where the CPU one is meant.
        ["install", "--no-deps", "-r", str(pins / "torchrec.txt")],
        # The pinned setuptools builds it, so that this step needs no download.
        ["install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)],
    ]


def pip(venv: Path, *arguments: str) -> None:
    """Runs the venv's pip: downloads are shown, everything is logged, a failure is explained."""
    command = [str(venv / "bin" / "python"), "-m", "pip", *arguments]
    last_lines: deque[str] = deque(maxlen=PIP_LINES_SHOWN)
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)  # pip would count what lies there as installed
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    with process, (venv / LOG).open("a", encoding="utf-8") as log:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            last_lines.append(line)
            if takes_long(line.strip()):
                print(f"  {line.strip()[:96]}", flush=True)
    if process.returncode != 0:
        raise SetupError(
            f"pip failed.\nCommand: {' '.join(command)}\nIts last lines:\n{''.join(last_lines)}"
            f"All its output is in {venv.name}/{LOG}. The next run repairs what this one left."
        )


def takes_long(line: str) -> bool:
    large = line.startswith("Downloading") and line.endswith((" MB)", " GB)"))
    return large or line.startswith("Installing collected packages")


if __name__ == "__main__":
    sys.exit(main())
