"""Parts of tables from a checkpoint into shards of any plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from planner import UserError
from shardemb.checkpoint.manifest import PieceEntry
from shardemb.checkpoint.piece import Piece
from shardemb.checkpoint.tensor_file import BLOCK_BYTES, DTYPES, TensorFile


class SavedTables:
    """The pieces of a checkpoint, found by table and state."""

    def __init__(self, pieces: list[PieceEntry]) -> None:
        self._pieces: dict[tuple[str, str], list[PieceEntry]] = defaultdict(list)
        for piece in sorted(pieces, key=lambda piece: (piece.file, piece.start)):
            self._pieces[piece.table, piece.state].append(piece)

    @torch.no_grad()
    def fill(self, target: Piece, files: dict[str, TensorFile]) -> None:
        """Set all of `target`, on any device and in any dtype.

        A value for several columns of a row, as row-wise Adagrad's mean square gradient, becomes
        that of other columns by the mean over them: exact where whole column shards are joined;
        where one is cut, both parts begin with its value.
        """
        is_rowwise = target.tensor.dim() == 1
        if is_rowwise:
            target.tensor.zero_()
        filled = 0
        for saved in self._pieces[target.table, target.state]:
            first = max(saved.row, target.row)
            last = min(saved.row + saved.rows, target.row + target.rows)
            left = max(saved.column, target.column)
            right = min(saved.column + saved.columns, target.column + target.columns)
            if first >= last or left >= right:
                continue
            filled += (last - first) * (right - left)
            for row, values in _rows(saved, first, last, files):
                rows = target.tensor[row - target.row :][: len(values)]
                if is_rowwise:
                    rows += values.to(rows) * ((right - left) / target.columns)
                else:
                    own = values[:, left - saved.column : right - saved.column]
                    rows[:, left - target.column : right - target.column] = own.to(rows)
        if filled != target.rows * target.columns:
            raise UserError(
                f"the checkpoint holds {filled} of the {target.rows * target.columns} values of "
                f"table {target.table}, {target.state}, that rows {target.row} to "
                f"{target.row + target.rows - 1} need: it is not whole"
            )


def _rows(
    saved: PieceEntry, first: int, last: int, files: dict[str, TensorFile]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows `first` to `last` of the table, some at a time: the first one's number, values."""
    dtype = DTYPES[saved.dtype]
    width = saved.shape[1] if len(saved.shape) == 2 else 1
    row_bytes = width * dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for row in range(first, last, step):
        count = min(step, last - row)
        start = saved.start + (row - saved.row) * row_bytes
        data = files[saved.file].read(start, count * row_bytes, f"table {saved.table}")
        yield row, torch.frombuffer(data, dtype=dtype).view(count, *saved.shape[1:])
