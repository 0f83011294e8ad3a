"""Vectors of a file, some at a time, with the rows of a table that they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Vectors = NDArray[np.float32]
Place = Callable[[int], str]  # where a vector is, by its number in a block, for a message

BLOCK_BYTES = 8 << 20  # of vectors at once; while they are decoded they take five times that


@dataclass(frozen=True)
class Block:
    """Vectors one after the other, and the rows of the table that they are of."""

    rows: Ints
    vectors: Vectors | None  # [rows, dim]; None where they were not wanted
    place: Place


@dataclass(frozen=True)
class Wanted:
    """Which vectors to read: `rows` gives those of keys, integers or text, and `any_of` says
    whether any of some rows is wanted."""

    rows: Callable[[pa.Array, Place], Ints]
    any_of: Callable[[Ints], bool]


class VectorFile(Protocol):
    """`dim` columns a vector, and `rows` vectors, where that is known before all are read. Without
    keys (`has_keys`) their order says of which rows they are."""

    has_keys: bool

    @property
    def path(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def rows(self) -> int | None: ...

    def blocks(self, wanted: Wanted) -> Iterator[Block]:
        """All of it. UserError where the file is damaged, OSError where it cannot be read."""


def row_of_file(path: str, first: int) -> Place:
    return lambda index: f"{path}, row {first + index}"
