"""Tables that begin with pretrained vectors: each rank fills what it holds of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from planner import UserError
from shardemb.build import tell
from shardemb.checkpoint.manifest import Manifest
from shardemb.checkpoint.piece import Piece
from shardemb.checkpoint.state import weight_pieces
from shardemb.config import RunConfig
from shardemb.data.pretrained import Pretrained, pretrained_tables
from shardemb.data.vector_blocks import Block, Ints
from shardemb.sharding.shard_model import ShardedModel


class Filled(NamedTuple):
    """Rows of a table that a file has, and keys of the file that have no row."""

    rows: int
    unknown_keys: int


def warm_start(config: RunConfig, model: ShardedModel, loaded: Manifest | None) -> None:
    """Fill the tables of `model` that the config has vectors for; a collective. Of those in a
    checkpoint that was `loaded`, the rows that it does not have."""
    saved = {name: table.num_embeddings for name, table in loaded.tables.items()} if loaded else {}
    for spec in model.table_specs:
        rows = saved.get(spec.name, spec.num_embeddings)
        if rows < spec.num_embeddings:
            tell(f"table {spec.name}: grows from {rows:,} rows to {spec.num_embeddings:,}")
    for table in pretrained_tables(config):
        first_row = saved.get(table.table, 0)
        if first_row == table.num_embeddings:
            continue
        filled = fill_pretrained(model, table, first_row)
        unknown = f"; {filled.unknown_keys:,} of its keys have none" if filled.unknown_keys else ""
        tell(
            f"table {table.table}: {filled.rows:,} of {table.num_embeddings - first_row:,} "
            f"{'new ' if first_row else ''}rows begin as in {table.config.path}{unknown}"
        )


def fill_pretrained(model: ShardedModel, table: Pretrained, first_row: int = 0) -> Filled:
    """Set the rows of a table from `first_row` on that its file has; a collective.

    Takes memory for some vectors at a time, on each rank. UserError, on all ranks, where the file
    cannot be used: some rows are set then.
    """
    pieces = [
        piece
        for piece in weight_pieces(model)
        if piece.table == table.table and piece.rows and piece.row + piece.rows > first_row
    ]
    own: Filled | UserError | None = None
    try:
        own = fill_pieces(pieces, table, first_row) if pieces else None
    except UserError as error:
        own = error
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for each in found:
        if isinstance(each, UserError):
            raise each
    return next(each for each in found if isinstance(each, Filled))


def fill_pieces(pieces: list[Piece], table: Pretrained, first_row: int = 0) -> Filled:
    """Of the weights of a table. All keys are read, and the vectors that come with keys of rows of
    these pieces."""
    low = max(first_row, min(piece.row for piece in pieces))
    high = max(piece.row + piece.rows for piece in pieces)
    is_set = np.zeros(high - low, bool)
    rows = unknown = 0
    with table.told():
        for block in table.read(lambda rows: bool(((rows >= low) & (rows < high)).any())):
            rows += int((block.rows >= first_row).sum())
            unknown += int((block.rows < 0).sum())
            if block.vectors is not None:
                own = np.flatnonzero((block.rows >= low) & (block.rows < high))
                _check(block, own, is_set[block.rows[own] - low])
                is_set[block.rows[own] - low] = True
                _copy(block, own, pieces)
    return Filled(rows, unknown)


def _check(block: Block, own: Ints, is_set: NDArray[np.bool_]) -> None:
    """UserError where a vector of `own` is no finite one, or its row is set before, as `is_set`
    says, or by another of them."""
    assert block.vectors is not None
    broken = ~np.isfinite(block.vectors[own]).all(axis=1)
    if broken.any():
        wrong = own[np.argmax(broken)]
        raise UserError(f"{block.place(int(wrong))}: the vector has a value that is no number")
    again = np.ones(len(own), bool)
    again[np.unique(block.rows[own], return_index=True)[1]] = False
    again |= is_set
    if again.any():
        wrong = own[np.argmax(again)]
        raise UserError(
            f"{block.place(int(wrong))}: a second vector for row {block.rows[wrong]} of the table; "
            "remove one of them"
        )


def _copy(block: Block, own: Ints, pieces: list[Piece]) -> None:
    assert block.vectors is not None
    for piece in pieces:
        rows = block.rows[own] - piece.row
        inside = (rows >= 0) & (rows < piece.rows)
        values = block.vectors[own[inside], piece.column : piece.column + piece.columns]
        places = torch.from_numpy(rows[inside]).to(piece.tensor.device)
        with torch.no_grad():
            piece.tensor[places] = torch.from_numpy(values).to(piece.tensor)
