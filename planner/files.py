"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from planner.errors import PlannerError, RequestError


def replace_file(path: Path, text: str) -> None:
    """Write `path`, or leave it as it was and raise OSError."""
    partial = partial_of(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_of(path: Path) -> Path:
    """What `path` is called until it is whole."""
    return path.with_name(f"{path.name}.partial")


def write_whole(path: Path, text: str, what: str) -> None:
    """Write `path`, or leave it as it was; `what` it is, for the message."""
    try:
        replace_file(path, text)
    except OSError as error:
        raise PlannerError(f"cannot write the {what} {path}: {error.strerror}") from error


def check_folder(option: str, path: Path | None) -> None:
    """RequestError where `path` can never be written: told before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise RequestError(f"{option} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise RequestError(f"{option} {path}: there is no folder {path.parent}")
