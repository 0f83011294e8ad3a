"""Ids of any size into the rows of a table: the same rows on every machine and version."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def mix64(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit integers that spreads neighbours: SplitMix64's finalizer.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    x = ids.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_ids(
    ids: NDArray[np.int64], num_embeddings: int, reserved_row: int | None = None
) -> NDArray[np.int64]:
    """Rows in [0, num_embeddings) for `ids`; `reserved_row` is none of them, if there are two."""
    if reserved_row is None:
        return (mix64(ids) % np.uint64(num_embeddings)).astype(np.int64)
    rows = (mix64(ids) % np.uint64(max(num_embeddings - 1, 1))).astype(np.int64)
    return rows + (rows >= reserved_row) if num_embeddings > 1 else rows


def strings_to_ids(strings: pa.Array) -> pa.Array:
    """A 64-bit integer for each string, nulls kept; each distinct string is hashed once."""
    encoded = strings.cast(pa.large_binary()).dictionary_encode()  # no need to be valid UTF-8
    texts = encoded.dictionary.to_pylist()
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    codes = np.frombuffer(b"".join(digests), dtype="<i8")
    return pc.take(pa.array(codes, pa.int64()), encoded.indices)
