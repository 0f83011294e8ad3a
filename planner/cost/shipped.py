"""Where profiles are: files that `shardemb profile` wrote, and those that come with shardemb."""

from __future__ import annotations

from pathlib import Path

SUFFIX = ".json"
FOLDER = Path(__file__).parents[1] / "profiles"


def shipped() -> dict[str, Path]:
    """Names of machines that were measured for shardemb, and their profiles."""
    return {path.stem: path for path in sorted(FOLDER.glob(f"*{SUFFIX}"))}


def profile_path(name: str) -> Path | None:
    """The file of a shipped profile, or the one that is named; None for another cost model."""
    if name in shipped():
        return shipped()[name]
    return Path(name) if name.endswith(SUFFIX) else None
