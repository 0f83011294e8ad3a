"""Fixtures of the planner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.cli import app

from .commands import Bench, run_command


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Bench:
    """The current folder: it holds tables.json, and `plan` runs in it."""
    monkeypatch.chdir(tmp_path)  # so that paths in messages are short
    return Bench(tmp_path, lambda argv: run_command(app, argv, monkeypatch, capfd))
