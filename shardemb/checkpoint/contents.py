"""What is in a checkpoint: read without a model, a process group or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from planner import UserError
from shardemb.checkpoint.listing import opened, read_checkpoint, read_names
from shardemb.checkpoint.manifest import Manifest, PieceEntry, TensorEntry
from shardemb.checkpoint.piece import WEIGHT, Piece
from shardemb.checkpoint.reshard import SavedTables
from shardemb.checkpoint.store import Store
from shardemb.checkpoint.tensor_file import DTYPES, TensorFile

CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Found:
    """A checkpoint that a path names."""

    store: Store
    name: str
    manifest: Manifest

    @property
    def path(self) -> str:
        return self.store.path(self.name)


def find(path: str) -> Found:
    """`path` is a checkpoint, or a folder of them or a run directory: then its newest."""
    path = path.rstrip("/")
    for folder in (path, f"{path}/checkpoints"):
        names = read_names(Store(folder))
        if names:
            return Found(Store(folder), names[-1], read_checkpoint(Store(folder), names[-1]))
    folder, _, name = path.rpartition("/")
    if not name.startswith("step-"):
        raise UserError(
            f"{path} is no checkpoint and holds none: name a run directory, its checkpoints/ "
            "folder, or a step-NNNNNNNN folder in it"
        )
    store = Store(folder or ".")
    return Found(store, name, read_checkpoint(store, name))


# --- What there is


def describe(found: Found) -> dict[str, Any]:
    """Plain JSON: the run's position, and each table with its rows, states and bytes."""
    manifest = found.manifest
    dense = {k: v for k, v in manifest.tensors.items() if k.startswith("model/")}
    return {
        "checkpoint": found.path,
        "created": manifest.created,
        "step": manifest.step,
        "samples": manifest.samples,
        "epoch": None if manifest.loader is None else manifest.loader["epoch"],
        "world_size": manifest.world_size,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "files": len(manifest.files),
        "dense_parameters": sum(_count(entry) for entry in dense.values()),
        "tables": [_describe_table(manifest, name) for name in manifest.tables],
    }


def _describe_table(manifest: Manifest, name: str) -> dict[str, Any]:
    pieces = [piece for piece in manifest.pieces if piece.table == name]
    return {
        "name": name,
        **manifest.tables[name].model_dump(),
        "sharding_type": manifest.plan["tables"][name]["sharding_type"],
        "states": sorted({piece.state for piece in pieces} - {WEIGHT}),
        "bytes": sum(_count(piece) * DTYPES[piece.dtype].itemsize for piece in pieces),
    }


def _count(entry: TensorEntry) -> int:
    return int(torch.Size(entry.shape).numel())


# --- Whether it is whole


def verify(found: Found) -> int:
    """The bytes that were read and are as they were written; UserError lists every damaged file
    with the tables in it."""
    problems = []
    for name, entry in found.manifest.files.items():
        pieces = [piece for piece in found.manifest.pieces if piece.file == name]
        try:
            file = TensorFile(found.store, name, entry)
            try:
                file.verify(partial(_what, pieces))
            finally:
                file.close()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return sum(entry.bytes for entry in found.manifest.files.values())


def _what(pieces: list[PieceEntry], first: int, last: int) -> str:
    """The tables that bytes `first` to `last` of a file are of."""
    hit = {
        piece.table
        for piece in pieces
        if piece.start < last and first < piece.start + _count(piece) * DTYPES[piece.dtype].itemsize
    }
    return f"table {', '.join(sorted(hit))}" if hit else "the dense part"


# --- Its values


def table_chunks(found: Found, table: str, state: str = WEIGHT) -> Iterator[torch.Tensor]:
    """The rows of a table, unsharded, some at a time: [rows, columns], or [rows] where the state
    has one value a row (the mean over column shards that have their own)."""
    manifest = found.manifest
    pieces = [p for p in manifest.pieces if (p.table, p.state) == (table, state)]
    entry, saved = manifest.tables[table], SavedTables(pieces)
    shape = [entry.embedding_dim] if len(pieces[0].shape) == 2 else []
    with opened(found.store, manifest) as files:
        for first in range(0, entry.num_embeddings, CHUNK_ROWS):
            rows = min(CHUNK_ROWS, entry.num_embeddings - first)
            values = torch.empty([rows, *shape], dtype=DTYPES[pieces[0].dtype])
            saved.fill(Piece(table, state, first, rows, 0, entry.embedding_dim, values), files)
            yield values


def dense_values(found: Found) -> dict[str, torch.Tensor]:
    """The model's other parameters and buffers, by their names."""
    entries = {k: v for k, v in found.manifest.tensors.items() if k.startswith("model/")}
    with opened(found.store, found.manifest) as files:
        return {
            key.removeprefix("model/"): files[entry.file].tensor(entry, key)
            for key, entry in entries.items()
        }


def health(found: Found, table: str) -> dict[str, Any]:
    """How the rows of a table are: their norms, how many never were trained (None where the
    optimizer keeps no state to tell), how many hold a value that is no finite number."""
    squares, largest, broken, rows = 0.0, 0.0, 0, 0
    for chunk in table_chunks(found, table):
        norms = chunk.double().norm(dim=1)
        finite = norms.isfinite()
        rows, broken = rows + len(norms), broken + int((~finite).sum())
        squares += float(norms[finite].square().sum())
        largest = max(largest, float(norms.where(finite, 0).max()))
    states = {piece.state for piece in found.manifest.pieces if piece.table == table} - {WEIGHT}
    untouched = None
    if states:
        state = min(states)
        untouched = sum(
            int((chunk.reshape(len(chunk), -1) == 0).all(dim=1).sum())
            for chunk in table_chunks(found, table, state)
        )
    return {
        "rms_norm": (squares / max(rows - broken, 1)) ** 0.5,
        "max_norm": largest,
        "never_trained_rows": untouched,
        "not_finite_rows": broken,
    }
