"""Ids of random batches, with the reuse that a table asks for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.tables import TableSpec
from shardemb.data.reuse_skew import reuse_ranks

ID_BATCHES = 4  # to use in turn: a training step never looks up the ids of the one before
_PRIME = 2_147_483_647  # scatters hot rows over the table; the product with a row fits 64 bits


def draw_ids(
    table: TableSpec, batch_size: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids, lengths [batch_size]) of one batch.

    Lengths are the two integers about the pooling factor, in the shares that give it as mean. Ids
    repeat as `table.reuse_histogram` says, or are uniform; hot rows lie anywhere in the table.
    """
    whole, rest = divmod(table.pooling_factor, 1)
    lengths = int(whole) + (generator.uniform(size=batch_size) < rest)
    lengths = lengths.astype(np.int64)
    uniform = generator.uniform(size=int(lengths.sum()))
    rows = table.num_embeddings
    if table.reuse_histogram is None:
        return (uniform * rows).astype(np.int64), lengths
    ranks = reuse_ranks(uniform, rows, table.pooling_factor, table.reuse_histogram)
    return ranks * _PRIME % rows, lengths
