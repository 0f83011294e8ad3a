"""What must be the same on all hosts of a run. Imports no torch."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from planner import RequestError
from shardemb.config import RunConfig

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
_ROOT = Path(__file__).resolve().parents[1]
_LINES_SHOWN = 8


@dataclass(frozen=True)
class HostFacts:
    """`facts` by name, as a person would look for them."""

    host: str
    facts: Mapping[str, str]


def facts_of(host: str, config: RunConfig, workers: int) -> HostFacts:
    """Of this host: workers, versions, files of the code, keys of the config."""
    facts = {"number of workers": str(workers), "Python": platform.python_version()}
    facts |= {name: _version(name) for name in PACKAGES}
    for package in ("planner", "shardemb", "launch"):
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            facts[f"code of {file.relative_to(_ROOT)}"] = digest[:12]
    document = config.model_dump(mode="json")
    del document["launch"]["nproc_per_node"]
    facts |= {f"config key {key}": value for key, value in _leaves(document)}
    return HostFacts(host, facts)


def refuse_differences(hosts: Sequence[HostFacts]) -> None:
    """RequestError that names every fact that is not the same on all."""
    hosts = sorted(hosts, key=lambda host: host.host)
    names = {name: None for host in hosts for name in host.facts}
    lines = []
    for name in names:
        found: dict[str, list[str]] = {}
        for host in hosts:
            found.setdefault(host.facts.get(name, "none"), []).append(host.host)
        if len(found) > 1:
            values = (f"{value} on {', '.join(where)}" for value, where in found.items())
            lines.append(f"  {name}: {'; '.join(values)}")
    if not lines:
        return
    more = len(lines) - _LINES_SHOWN
    shown = [*lines[:_LINES_SHOWN], *([f"  and {more} more"] if more > 0 else [])]
    raise RequestError("\n".join(["the hosts of a run must not differ; found", *shown]))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, str(value)
