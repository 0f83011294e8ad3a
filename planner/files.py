"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from planner.errors import PlannerError, RequestError


def write_whole(path: Path, text: str, what: str) -> None:
    """Write `path`, or leave it as it was; `what` it is, for the message."""
    partial = path.parent / f"{path.name}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise PlannerError(f"cannot write the {what} {path}: {error.strerror}") from error


def check_folder(option: str, path: Path | None) -> None:
    """RequestError where `path` can never be written: told before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise RequestError(f"{option} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise RequestError(f"{option} {path}: there is no folder {path.parent}")
