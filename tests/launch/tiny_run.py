"""A run that is as small as one with every part can be: its data set and its config."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from shardemb.data.synthetic import SyntheticFeature, synthesize

ROWS = {f"C{i}": 40 * i for i in range(1, 7)}
DENSE = ["I1", "I2"]
# Long enough for a slow machine; a run takes about ten seconds.
TIMEOUT_SECONDS = 120


def make_data(folder: Path, train_rows: int = 2000, test_rows: int = 500) -> Path:
    synthesize(
        folder,
        features=[SyntheticFeature(n, rows, 2.0 if n == "C5" else 1.0) for n, rows in ROWS.items()],
        dense=DENSE,
        train_rows=train_rows,
        test_rows=test_rows,
        row_group_rows=100,
    )
    return folder


def tiny_config(data: Path, output: Path) -> dict[str, Any]:
    """Six tables of all sharding types that one host has, two workers on CPU."""
    return {
        "output": str(output),
        "data": {"dir": str(data), "dense": {"columns": list(DENSE), "transform": "log"}},
        "tables": {name: {"num_embeddings": n, "embedding_dim": 8} for name, n in ROWS.items()},
        "model": {"name": "dlrm", "args": {"dense_layers": [8], "over_layers": [8]}},
        "sharding": {
            "default": "table_wise",
            "tables": {"C2": "row_wise", "C3": "column_wise", "C4": "data_parallel"},
        },
        "train": {"batch_size": 64, "log_every": 4, "table_optimizer": {"name": "adagrad"}},
        "launch": {"nproc_per_node": 2, "device": "cpu"},
    }


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path


def shardemb(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return python("-m", "launch.cli", *arguments, **environment)


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **environment},
    )


def rewrite(parquet: Path, change: Any) -> None:
    """Replace the table in a Parquet file by `change(table)`; its row groups keep their size."""
    table: pa.Table = change(pq.read_table(parquet))
    pq.write_table(table, parquet, row_group_size=100)
