"""The pins, and which versions belong together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch import matching
from launch.matching import known_sets, pinned_set, read_pins, set_for_torch, verdict

# pytest itself brings tomli where the standard library has no reader of TOML.
toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(matching.__file__).resolve().parent.parent
PIN_FILES = sorted(path.stem for path in matching.PINS.glob("*.txt"))
PYTHONS = [(3, 10), (3, 11), (3, 12)]


def requirements(name: str) -> list[Requirement]:
    lines = (matching.PINS / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def project() -> dict[str, Any]:
    read: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())
    return read


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", PIN_FILES)
def test_our_reader_of_pins_agrees_with_the_packaging_library(
    name: str, python: tuple[int, int]
) -> None:
    """`read_pins`, which must work with nothing installed, reads what pip reads."""
    environment = {"python_version": f"{python[0]}.{python[1]}"}
    theirs = [r for r in requirements(name) if not r.marker or r.marker.evaluate(environment)]
    assert read_pins(name, python) == {r.name: str(r.specifier)[2:] for r in theirs}
    assert all(str(r.specifier).startswith("==") for r in theirs)
    assert len(theirs) == len({canonicalize_name(r.name) for r in theirs}), "pinned twice"


@pytest.mark.parametrize("python", PYTHONS)
def test_files_that_pin_the_same_package_agree(python: tuple[int, int]) -> None:
    """All files but one of cpu and cuda are installed together."""
    seen: dict[str, str] = {}
    for name in PIN_FILES:
        for package, version in read_pins(name, python).items():
            assert seen.setdefault(package, version) == version


def test_every_python_pins_the_same_packages() -> None:
    """A marker changes the version of a package, and leaves none out, but for backports."""
    backports = {"exceptiongroup", "tomli"}
    for name in PIN_FILES:
        assert set(read_pins(name, (3, 10))) - backports == set(read_pins(name, (3, 12)))


def test_the_pinned_triple_is_a_matching_set() -> None:
    """What `make setup` installs is what `doctor` calls a match, on either device."""
    assert verdict(*pinned_set()) == "match"
    assert read_pins("cpu") == {"fbgemm-gpu-cpu": pinned_set().fbgemm}
    assert read_pins("cuda") == {"fbgemm-gpu": pinned_set().fbgemm}


def test_the_cpu_extra_cannot_bring_the_cuda_wheel() -> None:
    """torchrec's metadata asks for fbgemm-gpu: it is in no extra but the one for CUDA."""
    extras = project()["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    packages = {
        extra: {r.name for path in source["file"] for r in requirements(Path(path).stem)}
        for extra, source in extras.items()
    }
    with_torchrec = {extra for extra, names in packages.items() if "torchrec" in names}
    with_cuda_wheel = {extra for extra, names in packages.items() if "fbgemm-gpu" in names}
    assert with_torchrec == with_cuda_wheel == {"cuda"}
    assert "fbgemm-gpu-cpu" in packages["cpu"]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_satisfy_the_project_file(python: tuple[int, int]) -> None:
    """The project is installed with --no-deps, so nothing else checks its ranges."""
    pins = read_pins("base", python)
    for line in project()["project"]["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line


@pytest.mark.parametrize(
    ("torch", "fbgemm", "torchrec", "expected"),
    [
        ("2.13.0+cpu", "1.8.0", "1.8.0", "match"),
        ("2.11.0", "1.6.0", "1.6.1", "match"),
        ("2.13.0", "1.7.0", "1.8.0", "mismatch"),
        ("2.13.0", "1.9.0", "1.9.2", "mismatch"),
        ("2.14.0", "1.8.0", "1.8.0", "mismatch"),
        ("2.15.0", "2.0.0", "2.0.0", "unknown"),
        ("2.13.0", None, "1.8.0", "incomplete"),
        ("2.13.0", "1.8.0", None, "incomplete"),
    ],
)
def test_verdict(torch: str, fbgemm: str | None, torchrec: str | None, expected: str) -> None:
    """Patch releases and build labels do not matter; one member of another set does."""
    assert verdict(torch, fbgemm, torchrec) == expected


def test_repairs_keep_the_installed_torch_where_it_is_known() -> None:
    """torch is the largest download: its set is the target; without one, the pinned set is."""
    for known in known_sets():
        assert set_for_torch(f"{known.minors().torch}.7+cu130") == known
    assert set_for_torch("1.0.0") == set_for_torch(None) == pinned_set()
