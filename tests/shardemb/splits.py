"""Where a data set keeps its splits."""

from __future__ import annotations

from pathlib import Path


def split_files(folder: Path, split: str) -> list[Path]:
    """The Parquet parts of one split, in the order of their rows."""
    return sorted((folder / split).glob("*.parquet"))
