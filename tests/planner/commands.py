"""The planner's command, run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from planner.cli import run

IMPOSSIBLE, MALFORMED = 1, 2
TABLES = [
    {"name": "users", "num_embeddings": 2_000_000, "embedding_dim": 64, "pooling_factor": 1},
    {"name": "items", "num_embeddings": 500_000, "embedding_dim": 64, "pooling_factor": 40},
    {"name": "words", "num_embeddings": 30_000, "embedding_dim": 32, "pooling_factor": 100},
    {"name": "days", "num_embeddings": 7, "embedding_dim": 16, "pooling_factor": 1},
]


class Ended(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Bench:
    """A folder, with a table list in it, in which commands run."""

    def __init__(self, folder: Path, start: Callable[[list[str]], Ended]) -> None:
        self.folder, self._start = folder, start
        self.write_tables()

    def write_tables(self, *tables: dict[str, Any], **top: Any) -> None:
        document = {"tables": tables or TABLES, **(top or {"batch_size_per_rank": 1024})}
        self.write("tables.json", json.dumps(document))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def plan(self, *arguments: str) -> Ended:
        """`plan` with these arguments; never a traceback."""
        return self._start(["planner", "plan", *arguments])

    def made(self, *arguments: str) -> Any:
        """What a command that must succeed prints with --json."""
        ended = self.plan(*arguments, "--json")
        assert ended.code == 0, ended.err
        return ended.document


def run_command(
    command: typer.Typer,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Ended:
    monkeypatch.setattr(sys, "argv", argv)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(command)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    return Ended(int(ended.value.code or 0), shown.out, shown.err)
