"""Vectors as text, as word2vec and GloVe write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from planner import UserError
from shardemb.data.sources import open_text
from shardemb.data.vector_blocks import BLOCK_BYTES, Block, Wanted


class TextVectors:
    """A key and its vector a line; word2vec has a first line with the number of both, GloVe none.

    A key may have spaces in it, as some of GloVe's have: the vector is what the line ends with.
    """

    has_keys = True

    def __init__(self, path: str, dim: int) -> None:
        self.path = path
        with open_text(path) as lines:
            first = lines.readline().split()
        header = [int(word) for word in first if word.isdecimal()]
        self.rows = header[0] if len(first) == len(header) == 2 else None
        self.dim = header[1] if self.rows is not None else len(first) - 1
        if self.dim > dim and _are_numbers(first[-dim:]) and not _are_numbers(first[1:]):
            self.dim = dim  # the first key has a space in it
        if self.dim < 1:
            raise UserError(f"{path}, line 1: a key and a vector, with spaces between, are needed")

    def blocks(self, wanted: Wanted) -> Iterator[Block]:
        line, size = 1, max(1, BLOCK_BYTES // (100 * self.dim))  # Python's strings are large
        with open_text(self.path) as lines:
            if self.rows is not None:
                lines.readline()
                line = 2
            begin = line
            while rows := [text.rsplit(maxsplit=self.dim) or [""] for text in islice(lines, size)]:
                yield self._block(rows, line, wanted)
                line += len(rows)
        if self.rows not in (None, line - begin):
            raise UserError(
                f"{self.path} is not whole: its first line says {self.rows} vectors, and "
                f"{line - begin} follow"
            )

    def _block(self, rows: Sequence[list[str]], first: int, wanted: Wanted) -> Block:
        def place(index: int) -> str:
            return f"{self.path}, line {first + index}"

        found = wanted.rows(pa.array([row[0] for row in rows], pa.string()), place)
        if not wanted.any_of(found):
            return Block(found, None, place)
        try:
            vectors = np.array([row[1:] for row in rows], np.float32)
        except ValueError:  # of all lines; which one it is takes a second look
            wrong = next(i for i, r in enumerate(rows) if not _are_numbers(r[1:], self.dim))
            raise UserError(
                f"{place(wrong)}: a key and a vector of {self.dim} numbers are needed, found "
                f"{' '.join(rows[wrong])[:60]!r}"
            ) from None
        return Block(found, vectors, place)


def _are_numbers(words: Sequence[str], count: int | None = None) -> bool:
    try:
        return len([float(word) for word in words]) == (len(words) if count is None else count)
    except ValueError:
        return False
