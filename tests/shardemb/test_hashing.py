from __future__ import annotations

import hashlib
import random

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chi2

from shardemb.data.hashing import hash_ids, mix64, strings_to_ids

MASK = (1 << 64) - 1
EDGES = [0, 1, 2, -1, -2, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63), 0x68FD1E64]


def splitmix64(state: int) -> int:
    """The next output of SplitMix64 whose state is `state`, in plain Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_first_outputs_of_splitmix64():
    """What Vigna's splitmix64.c gives for seed 1234567: the published values, not our own."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    step = 0x9E3779B97F4A7C15
    states = [(1234567 + i * step) & MASK for i in range(4)]
    assert [splitmix64(state) for state in states] == published
    found = mix64(np.array(states, np.uint64).view(np.int64))
    assert found.tolist() == published


@pytest.mark.parametrize("num_embeddings", [1, 2, 3, 1000, 1 << 20, (1 << 31) + 11])
def test_rows_are_splitmix64_modulo_the_table(num_embeddings: int):
    """Edge cases and random ids, negative ones as their bit patterns: golden for ever, since a
    saved table means nothing under another hash."""
    random_ids = [random.Random(0).getrandbits(64) - (1 << 63) for _ in range(100)]
    ids = EDGES + random_ids
    found = hash_ids(np.array(ids, np.int64), num_embeddings)
    assert found.dtype == np.int64
    assert found.tolist() == [splitmix64(i & MASK) % num_embeddings for i in ids]


@pytest.mark.parametrize("num_embeddings", [2, 3, 10, 101])
def test_the_reserved_row_is_never_hit(num_embeddings: int):
    """Whatever row is reserved, ids go to all the others and to no other place."""
    ids = np.arange(-5000, 5000)
    for reserved in range(num_embeddings):
        rows = hash_ids(ids, num_embeddings, reserved)
        assert set(rows.tolist()) == set(range(num_embeddings)) - {reserved}


def test_a_table_of_one_row():
    """Its row is the only place there is, reserved or not."""
    assert hash_ids(np.array(EDGES), 1).tolist() == [0] * len(EDGES)
    assert hash_ids(np.array(EDGES), 1, 0).tolist() == [0] * len(EDGES)


@pytest.mark.parametrize("ids", ["neighbours", "multiples", "high bits"])
@pytest.mark.parametrize("reserved", [None, 7])
def test_rows_are_uniform(ids: str, reserved: int | None):
    """Chi-square over 1000 rows: ids that differ in few bits spread as evenly as random ones."""
    count, rows = 200_000, 1000
    numbers = np.arange(count)
    inputs = {"neighbours": numbers, "multiples": numbers * 1000, "high bits": numbers << 44}[ids]
    counts = np.bincount(hash_ids(inputs, rows, reserved), minlength=rows)
    counts = counts if reserved is None else np.delete(counts, reserved)
    expected = count / len(counts)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert chi2.ppf(1e-4, len(counts) - 1) < statistic < chi2.ppf(1 - 1e-4, len(counts) - 1)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_strings_are_their_blake2b(kind: pa.DataType):
    """Each string is the first 8 bytes of BLAKE2b with an 8-byte digest, little-endian, wherever
    it stands; nulls stay null."""
    texts = ["", "a", "68fd1e64", None, "ü", "a", "x" * 1000, None]
    expected = [None if text is None else _blake2b(text.encode()) for text in texts]
    assert strings_to_ids(pa.array(texts, kind)).to_pylist() == expected
    assert strings_to_ids(pa.array(texts, kind).slice(2, 3)).to_pylist() == expected[2:5]


def test_golden_strings():
    """Written down once: a change of the hash would scramble every saved table."""
    found = strings_to_ids(pa.array(["68fd1e64", "80e26c9b", ""])).to_pylist()
    assert found == [-2294098665169095407, 4748881023580448837, -5426141060434712860]


@pytest.mark.parametrize("texts", [[], [None, None]])
def test_no_strings(texts: list[None]):
    """Columns without a string, or without a row, have ids of the same type."""
    found = strings_to_ids(pa.array(texts, pa.string()))
    assert found.to_pylist() == texts and found.type == pa.int64()


def test_strings_need_not_be_utf8():
    """Bytes that a careless writer called a string are hashed as bytes."""
    raw = pa.array([b"\xff\xfe"]).view(pa.string())
    assert strings_to_ids(raw).to_pylist() == [_blake2b(b"\xff\xfe")]


def _blake2b(text: bytes) -> int:
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
