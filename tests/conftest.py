"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, which is not ours to redistribute; skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SHARDEMB_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real data: set SHARDEMB_DATA to its folder, or put it in ../shared/data")
    return folder
