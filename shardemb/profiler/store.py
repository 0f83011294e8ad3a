"""Measurements in a folder: Parquet files that are written whole, one after the other.

A run that is killed leaves whole files behind; the next one goes on after the last row in them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from planner import UserError
from planner.cost.measurements import Environment
from planner.files import partial_of

PATTERN = "measurements-*.parquet"
SECONDS_A_FILE = 4.0  # so much is lost, and measured again, where a run is killed
_ENVIRONMENT = b"environment"

_TABLE = pa.struct(
    [
        ("num_embeddings", pa.int64()),
        ("embedding_dim", pa.int64()),
        ("pooling_factor", pa.float64()),
        ("reuse_histogram", pa.list_(pa.float64())),
    ]
)
_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "sequence": (pa.string(), "device; collective_N or plan_N over N ranks"),
    "number": (pa.int64(), "in its sequence; every number comes once"),
    "kind": (
        pa.string(),
        "kernel, all_to_all, reduce_scatter, all_gather, all_reduce, host_to_device, "
        "dense_matmul or plan",
    ),
    "task": (pa.int64(), "kernel: the model that the tables are of"),
    "batch_size": (pa.int64(), "kernel: rows that are looked up"),
    "dtype": (pa.string(), "kernel: of the tables"),
    "optimizer": (pa.string(), "kernel: of the tables, run in backward"),
    "tables": (pa.list_(_TABLE), "kernel: all of them; reuse as in planner.tables"),
    "sent_bytes": (
        pa.list_(pa.int64()),
        "all_to_all: of each rank, to each of the others; other collectives: of each rank, all "
        "together (all_gather: what it gathers); copies: of the one",
    ),
    "shape": (pa.list_(pa.int64()), "dense_matmul: rows, inner, columns"),
    "forward_ms": (pa.float64(), "kernel: median of the repetitions"),
    "backward_ms": (pa.float64(), "kernel: median of the repetitions"),
    "plan": (pa.string(), "plan: a plan.json, with its batch size"),
    "stages": (
        pa.list_(pa.float64()),
        "plan: medians of forward and backward, compute and comm as in planner.cost.stages, of "
        "rank after rank",
    ),
    "ms": (
        pa.float64(),
        "all other kinds: median; of collectives that of the slowest rank, of plans a step",
    ),
    "repetitions": (pa.int64(), "those timed, without warm-up"),
    "spread": (pa.float64(), "scaled median absolute deviation over the median, the worse of two"),
    "outliers": (pa.int64(), "repetitions beyond 3.5 such deviations"),
    "is_noisy": (pa.bool_(), "whether the median may be off so far that fits leave the row out"),
    "measured_at": (pa.timestamp("s", tz="UTC"), "when"),
}
SCHEMA = pa.schema(
    [pa.field(name, kind, metadata={"meaning": text}) for name, (kind, text) in _COLUMNS.items()]
)


@dataclass
class Store:
    """Takes the rows of one sequence, in order, and writes them every few seconds."""

    folder: Path
    sequence: str
    environment: Environment
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.next_number = _next_number(self.folder, self.sequence)

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row; its number is `next_number`."""
        now = datetime.now(timezone.utc)
        self._rows.append(
            row | {"sequence": self.sequence, "number": self.next_number, "measured_at": now}
        )
        self.next_number += 1
        if time.monotonic() - self._written > SECONDS_A_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is kept as a file of its own, whole or not at all."""
        if not self._rows:
            return
        first = self._rows[0]["number"]
        path = self.folder / f"measurements-{self.sequence}-{first:07d}.parquet"
        metadata = {_ENVIRONMENT: self.environment.model_dump_json().encode()}
        table = pa.Table.from_pylist(self._rows, SCHEMA.with_metadata(metadata))
        try:
            pq.write_table(table, partial_of(path))
            os.replace(partial_of(path), path)
        except OSError as error:
            raise UserError(f"cannot write the measurements {path}: {error}") from error
        self._rows.clear()
        self._written = time.monotonic()


def _next_number(folder: Path, sequence: str) -> int:
    last = max(folder.glob(f"measurements-{sequence}-*.parquet"), default=None)
    if last is None:
        return 0
    return int(read_part(last)["number"][-1].as_py()) + 1


def read_part(path: Path) -> pa.Table:
    """One file; UserError where it is damaged or was written by something else."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read the measurements {path}: {error}; delete the file") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UserError(f"{path} holds no measurements of this version: no column {missing[0]}")
    return table


def environment_of(paths: Iterable[Path]) -> Environment | None:
    """What all the files were measured on, None where there are none.

    UserError names two that differ: times of two machines, or versions, must not be mixed.
    """
    first: tuple[Path, Environment] | None = None
    for path in paths:
        found = _environment(path)
        if first is None:
            first = path, found
        elif not first[1].is_like(found):
            raise UserError(
                f"{first[0]} was measured on {first[1].described}, {path} on {found.described}: "
                "keep measurements of each in a folder of their own"
            )
    return first[1] if first else None


def _environment(path: Path) -> Environment:
    metadata = read_part(path).schema.metadata or {}
    try:
        return Environment.model_validate(json.loads(metadata.get(_ENVIRONMENT, b"")))
    except (ValueError, ValidationError) as error:
        raise UserError(f"{path} does not say what it was measured on; delete it") from error
