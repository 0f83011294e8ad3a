"""Which versions of torch, fbgemm and torchrec belong together, and the pins of this project.

Standard library only: it answers while nothing else can be imported.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

PINS = Path(__file__).resolve().parent / "pins"
PIN_LINE = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)"
    r'(?:\s*;\s*python_version\s*(?P<operator><|>=)\s*"(?P<bound>\d+\.\d+)")?$'
)


class MatchingSet(NamedTuple):
    """Versions, major.minor, that load together; an exact version where the project pins one."""

    torch: str
    fbgemm: str
    torchrec: str

    def minors(self) -> MatchingSet:
        return MatchingSet(*(minor(version) for version in self))


def minor(version: str) -> str:
    """'2.13.0+cpu' -> '2.13'"""
    return ".".join(version.split("+")[0].split(".")[:2])


def read_pins(name: str, python: tuple[int, int] = sys.version_info[:2]) -> dict[str, str]:
    """The pins in `launch/pins/NAME.txt` that hold for this Python: {package: version}."""
    pins = {}
    for line in (PINS / f"{name}.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin = PIN_LINE.match(line.strip())
        assert pin, f"launch/pins/{name}.txt: not `name==version [; python_version ...]`: {line}"
        if pin["operator"] is None or _holds(pin["operator"], pin["bound"], python):
            pins[pin["name"]] = pin["version"]
    return pins


def _holds(operator: str, bound: str, python: tuple[int, int]) -> bool:
    major, minor_ = bound.split(".")
    at_least = python >= (int(major), int(minor_))
    return at_least if operator == ">=" else not at_least


def pinned_set() -> MatchingSet:
    return MatchingSet(
        torch=read_pins("training")["torch"],
        fbgemm=read_pins("cpu")["fbgemm-gpu-cpu"],
        torchrec=read_pins("torchrec")["torchrec"],
    )


# fbgemm's libraries are linked against one minor release of torch and do not load in another;
# the pairs are those of the compatibility table in fbgemm_gpu/__init__.py. torchrec is released
# with fbgemm, under the same minor version. The pinned set is added by `known_sets`.
OTHER_SETS = (
    MatchingSet(torch="2.12", fbgemm="1.7", torchrec="1.7"),
    MatchingSet(torch="2.11", fbgemm="1.6", torchrec="1.6"),
)


def known_sets() -> list[MatchingSet]:
    return [pinned_set(), *OTHER_SETS]


def set_for_torch(version: str | None) -> MatchingSet:
    """The set to repair an installation towards: that of its torch if known, else the pinned one.

    torch decides, because it is by far the largest download and other packages depend on it.
    """
    for known in known_sets():
        if version is not None and known.minors().torch == minor(version):
            return known
    return pinned_set()


def verdict(torch: str | None, fbgemm: str | None, torchrec: str | None) -> str:
    """'match', 'mismatch', 'incomplete' (one is not installed) or 'unknown' (to this project)."""
    if torch is None or fbgemm is None or torchrec is None:
        return "incomplete"
    installed = MatchingSet(torch, fbgemm, torchrec).minors()
    known = [members.minors() for members in known_sets()]
    if installed in known:
        return "match"
    seen = any(ours == theirs for one in known for ours, theirs in zip(installed, one, strict=True))
    return "mismatch" if seen else "unknown"
