"""A part of a table in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

WEIGHT = "weight"  # beside the names of optimizer states


@dataclass(frozen=True)
class Piece:
    """Rows and columns of a table, and what this rank holds for them: the weights themselves, not
    a copy, or a state of the table's optimizer."""

    table: str
    state: str  # "weight", "sum"
    row: int
    rows: int
    column: int
    columns: int
    tensor: torch.Tensor  # [rows, columns], or [rows]: one value for these columns of a row
    is_replicated: bool = False  # every rank holds the same

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.table}/{self.state}/{self.row}-{self.column}"

    def part_of_rank(self, rank: int, world_size: int) -> Piece:
        """What `rank` writes of it: all, or its share of the rows where all ranks hold the same."""
        if not self.is_replicated:
            return self
        first, last = rank * self.rows // world_size, (rank + 1) * self.rows // world_size
        return replace(
            self, row=self.row + first, rows=last - first, tensor=self.tensor[first:last]
        )

    def before(self, row: int) -> Piece:
        """The part of it that is rows before `row`."""
        rows = min(max(row - self.row, 0), self.rows)
        return replace(self, rows=rows, tensor=self.tensor[:rows])
