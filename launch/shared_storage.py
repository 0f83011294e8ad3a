"""Whether all hosts see the folders that a run writes: a mark of one host, looked for on others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner import UserError
from shardemb.config import RunConfig
from shardemb.data.sources import is_remote

# NFS shows a new file to other hosts when its cached listing is as old as this (acdirmin is 30 s,
# but a name that was never looked up is asked for at once).
_SIGHT_SECONDS = 3.0


@dataclass(frozen=True)
class Mark:
    """A file so many folders above the folder that `key` of the config names."""

    key: str
    name: str
    levels: int


def written_folders(config: RunConfig) -> dict[str, Path]:
    """Config keys and the folders that all hosts must share."""
    folders = {"output": config.output}
    if config.checkpoint.dir is not None and not is_remote(config.checkpoint.dir):
        folders["checkpoint.dir"] = Path(config.checkpoint.dir)
    return {key: path.absolute() for key, path in folders.items()}


def place_marks(config: RunConfig, run_id: str) -> list[Mark]:
    """One for each folder, in it or in the nearest above it that there is."""
    marks = []
    for key, folder in written_folders(config).items():
        places = [folder, *folder.parents]
        levels = next(i for i, place in enumerate(places) if place.is_dir())
        marks.append(Mark(key, f".shardemb-{run_id}", levels))
        _path(folder, marks[-1]).touch()
    return marks


def missing_marks(config: RunConfig, marks: Sequence[Mark]) -> list[str]:
    """The config keys whose marks this host does not see."""
    folders = written_folders(config)
    deadline = time.monotonic() + _SIGHT_SECONDS
    missing = list(marks)
    while missing and time.monotonic() < deadline:
        missing = [mark for mark in missing if not _path(folders[mark.key], mark).exists()]
        time.sleep(0.1 if missing else 0)
    return [mark.key for mark in missing]


def remove_marks(config: RunConfig, marks: Sequence[Mark]) -> None:
    folders = written_folders(config)
    for mark in marks:
        _path(folders[mark.key], mark).unlink(missing_ok=True)


def refuse_unshared(config: RunConfig, first: str, missing: Mapping[str, Sequence[str]]) -> None:
    """UserError that says what hosts do not see of what `first` writes; `missing` is by host."""
    folders = written_folders(config)
    lines = [
        f"{key}: {host} does not see what {first} writes in {folders[key]}"
        for host, keys in missing.items()
        for key in keys
    ]
    if lines:
        advice = "name a folder on storage that all hosts share"
        raise UserError("\n".join([*lines, advice]))


def _path(folder: Path, mark: Mark) -> Path:
    return [folder, *folder.parents][mark.levels] / mark.name
