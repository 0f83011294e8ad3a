"""Ids of any size into the rows of a table: the same rows on every machine and version."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_CHUNK = 1 << 14  # numbers that stay in the CPU's cache from one step to the next


def mix64(ids: NDArray[np.int64], seed: int = 0) -> NDArray[np.uint64]:
    """A bijection of 64-bit integers that spreads neighbours: SplitMix64's finalizer.

    Seed 0 is the published function. Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom
    Number Generators", OOPSLA 2014.
    """
    start = np.uint64(_GAMMA)
    if seed:
        start ^= mix64(np.array([seed]))[0]
    mixed = np.empty(len(ids), np.uint64)
    shifted = np.empty(min(len(ids), _CHUNK), np.uint64)
    for first in range(0, len(ids), _CHUNK):
        x = mixed[first : first + _CHUNK]
        y = shifted[: len(x)]
        np.add(ids[first : first + _CHUNK].view(np.uint64), start, out=x)
        for shift, factor in _ROUNDS:
            np.right_shift(x, np.uint64(shift), out=y)
            np.bitwise_xor(x, y, out=x)
            np.multiply(x, np.uint64(factor), out=x)
        np.right_shift(x, np.uint64(31), out=y)
        np.bitwise_xor(x, y, out=x)
    return mixed


def hash_ids(
    ids: NDArray[np.int64], num_embeddings: int, reserved_row: int | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """Rows in [0, num_embeddings) for `ids`; `reserved_row` is none of them, if there are two."""
    mixed = mix64(ids, seed)
    if reserved_row is None or num_embeddings == 1:
        return _remainder(mixed, num_embeddings)
    rows = _remainder(mixed, num_embeddings - 1)
    return rows + (rows >= reserved_row)


def _remainder(numbers: NDArray[np.uint64], divisor: int) -> NDArray[np.int64]:
    """numbers % divisor, in their place: NumPy divides by one number with SIMD, but has no such
    remainder."""
    for first in range(0, len(numbers), _CHUNK):
        x = numbers[first : first + _CHUNK]
        x -= (x // np.uint64(divisor)) * np.uint64(divisor)
    return numbers.view(np.int64)


def strings_to_ids(strings: pa.Array) -> pa.Array:
    """A 64-bit integer for each string, nulls kept; each distinct string is hashed once."""
    encoded = strings.cast(pa.large_binary()).dictionary_encode()  # no need to be valid UTF-8
    texts = encoded.dictionary.to_pylist()
    digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    codes = np.frombuffer(b"".join(digests), dtype="<i8")
    return pc.take(pa.array(codes, pa.int64()), encoded.indices)
