"""Checkpoints for other tools: tables as Parquet or safetensors, a model as one state_dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from planner import RequestError, UserError
from planner.files import partial_of
from planner.validation import nearest
from shardemb.checkpoint.contents import Found, dense_values, table_chunks
from shardemb.checkpoint.store import Store
from shardemb.checkpoint.tensor_file import write_tensors

Format = Literal["parquet", "safetensors", "state_dict"]


def export(found: Found, out: Path, kind: Format, tables: list[str]) -> list[Path]:
    """The files written. `tables`: those alone; none for all.

    `parquet` and `safetensors`: a file for each table in the folder `out`, with the rows in the
    order of their ids. `state_dict`: one safetensors file `out`, which
    `model.load_state_dict(safetensors.torch.load_file(out))` takes into the unsharded model.
    """
    for name in tables:
        if name not in found.manifest.tables:
            raise RequestError(
                f"{found.path} has no table {name}{nearest(name, found.manifest.tables)}"
            )
    try:
        if kind == "state_dict":
            return [_state_dict(found, out)]
        out.mkdir(parents=True, exist_ok=True)
        write = {"parquet": _parquet, "safetensors": _safetensors}[kind]
        return [write(found, name, out) for name in tables or found.manifest.tables]
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error})") from error


def _parquet(found: Found, table: str, out: Path) -> Path:
    """Columns `id` and `embedding`, a list of 32-bit floats."""
    path, dim = out / f"{table}.parquet", found.manifest.tables[table].embedding_dim
    kind = pa.list_(pa.float32(), dim)
    schema = pa.schema([("id", pa.int64()), ("embedding", kind)])

    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, schema) as writer:
            first = 0
            for rows in table_chunks(found, table):
                flat = pa.array(rows.float().numpy().reshape(-1))
                ids = pa.array(range(first, first + len(rows)), pa.int64())
                embeddings = pa.FixedSizeListArray.from_arrays(flat, dim)
                writer.write_table(pa.table([ids, embeddings], schema=schema))
                first += len(rows)

    return _whole(path, write)


def _safetensors(found: Found, table: str, out: Path) -> Path:
    """One tensor, `weight`."""
    rows = torch.cat(list(table_chunks(found, table)))
    write_tensors(Store(out), f"{table}.safetensors", {"weight": rows})
    return out / f"{table}.safetensors"


def _state_dict(found: Found, out: Path) -> Path:
    tensors = dense_values(found)
    for name, entry in found.manifest.tables.items():
        tensors[entry.parameter] = torch.cat(list(table_chunks(found, name)))
    write_tensors(Store(out.parent), out.name, tensors)
    return out


def _whole(path: Path, write: Callable[[Path], None]) -> Path:
    partial = partial_of(path)
    try:
        write(partial)
        return partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
