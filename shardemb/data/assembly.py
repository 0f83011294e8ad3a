"""Batches from the pieces of a rank's lanes, a block of steps at a time.

Where every row has as many ids of a feature as any other, each piece goes straight to its place in
the batches, while it is in the CPU's cache. Otherwise rows are put in order first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor

from shardemb.data.batch import Batch
from shardemb.data.columns import Bags, Order, Piece, concatenate, transform_dense
from shardemb.data.order import Share
from shardemb.data.schema import BatchSchema


@dataclass(frozen=True)
class Portion:
    """Rows that a lane gives to a block of steps: some of a piece, None where it was skipped."""

    share: Share
    piece: Piece | None
    order: Order
    first: int  # number of its first row among those that the lane gives to the block
    rows: int


class Assembler:
    """Makes a rank's batches of `batch_size` rows; a step has `global_batch_size` on all ranks."""

    def __init__(
        self, schema: BatchSchema, batch_size: int, global_batch_size: int, *, pin_memory: bool
    ) -> None:
        self.schema, self.pin_memory = schema, pin_memory
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self._lengths: dict[tuple[int, ...], torch.Tensor] = {}

    # --- Straight to the place

    def even(self, portions: Iterator[Portion], steps: int) -> list[Batch] | None:
        """The batches of `steps` full steps; None where rows differ in their numbers of ids."""
        block: _Block | None = None
        for portion in portions:
            widths = portion.piece.widths if portion.piece else None
            block = block or (None if widths is None else self._new_block(widths, steps))
            if block is None or widths != block.widths:
                return None
            block.put(portion)
        return self._batches(block) if block else []

    def _new_block(self, widths: tuple[int, ...], steps: int) -> _Block:
        size = self.batch_size
        ids = steps, size * sum(widths)
        return _Block(
            widths=widths,
            labels=self._empty((steps, size), np.float32),
            dense=self._empty((steps, len(self.schema.dense), size), np.float32),
            ids=self._empty(ids, np.int64),
            weights=self._empty(ids, np.float32) if self.schema.is_weighted else None,
        )

    def _batches(self, block: _Block) -> list[Batch]:
        transform_dense(block.dense, self.schema)
        lengths = self._lengths_of(block.widths)
        masks = torch.ones(block.labels.shape, pin_memory=self.pin_memory)
        return [
            Batch(
                dense=torch.from_numpy(block.dense[step]).T,
                sparse=self._jagged(
                    block.ids[step],
                    lengths,
                    None if block.weights is None else block.weights[step],
                ),
                labels=torch.from_numpy(block.labels[step]),
                mask=masks[step],
                global_rows=self.global_batch_size,
            )
            for step in range(len(masks))
        ]

    def _empty(self, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        if self.pin_memory:
            bytes_ = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            # Arrow's allocator keeps pages that the last blocks had; new ones cost as much as to
            # fill them.
            bytes_ = np.frombuffer(pa.allocate_buffer(size), np.uint8)
        return bytes_.view(kind).reshape(shape)

    def _lengths_of(self, widths: tuple[int, ...]) -> torch.Tensor:
        """The same for all steps, so that it is made once."""
        if widths not in self._lengths:
            lengths = torch.tensor(widths, dtype=torch.int64).repeat_interleave(self.batch_size)
            self._lengths[widths] = lengths.pin_memory() if self.pin_memory else lengths
        return self._lengths[widths]

    # --- In order first

    def uneven(self, portions: Iterator[Portion], global_rows: Sequence[int]) -> Iterator[Batch]:
        """A batch for each step; `global_rows` are those of the steps over all ranks."""
        pieces, places = [], []
        for portion in portions:
            share = portion.share
            step, offset = np.divmod(portion.first + np.arange(portion.rows), share.size)
            own = np.flatnonzero((offset >= share.start) & (offset < share.stop))
            if portion.piece is not None and len(own):
                pieces.append(portion.piece.take(portion.order).take(own))
                place = share.place + offset[own] - share.start
                places.append(step[own] * self.batch_size + place)
        if not pieces:
            yield from (self._padded(None, rows) for rows in global_rows)
            return
        place = np.concatenate(places)
        rows_in_order = concatenate(pieces).take(np.argsort(place))
        counts = np.bincount(place // self.batch_size, minlength=len(global_rows))
        ends = np.cumsum(counts).tolist()
        for start, stop, rows in zip([0, *ends], ends, global_rows, strict=False):
            yield self._padded(rows_in_order.take(slice(start, stop)), rows)

    def _padded(self, piece: Piece | None, global_rows: int) -> Batch:
        """`piece`, padded to `batch_size` rows."""
        size, rows = self.batch_size, len(piece) if piece else 0
        dense = self._empty((len(self.schema.dense), size), np.float32)
        labels, mask = (self._empty((size,), np.float32) for _ in range(2))
        dense[:, rows:], labels[rows:] = 0, 0
        mask[:rows], mask[rows:] = 1, 0
        lengths = self._empty((len(self.schema.features), size), np.int64)
        lengths[:, rows:] = 0
        if piece is not None:
            labels[:rows] = piece.labels
            for row, values in zip(dense, piece.dense, strict=True):
                row[:rows] = values
            transform_dense(dense[:, :rows], self.schema)
            for row, bags in zip(lengths, piece.bags, strict=True):
                row[:rows] = bags.lengths(rows)
        parts: tuple[Bags, ...] = piece.bags if piece else ()
        ids = self._joined([bags.ids for bags in parts], np.int64)
        weights = None
        if self.schema.is_weighted:
            given = [bags.weights for bags in parts if bags.weights is not None]
            weights = self._joined(given, np.float32)
        return Batch(
            dense=torch.from_numpy(dense).T,
            sparse=self._jagged(ids, torch.from_numpy(lengths.reshape(-1)), weights),
            labels=torch.from_numpy(labels),
            mask=torch.from_numpy(mask),
            global_rows=global_rows,
        )

    def _joined(self, parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
        joined = self._empty((sum(map(len, parts)),), dtype)
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            joined[start:end] = part
        return joined

    def _jagged(
        self, ids: NDArray[np.int64], lengths: torch.Tensor, weights: NDArray[np.float32] | None
    ) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            keys=[feature.name for feature in self.schema.features],
            values=torch.from_numpy(ids),
            lengths=lengths,
            weights=None if weights is None else torch.from_numpy(weights),
            stride=self.batch_size,
        )


class _Cut(NamedTuple):
    """Rows of a portion that are the same part of one step's share, or all of several steps'."""

    source: slice  # of the portion's rows
    shape: tuple[int, int]  # steps, rows of each
    own: slice  # which of the rows of each are this rank's
    steps: slice
    places: slice  # in the batch


def _cuts(portion: Portion) -> Iterator[_Cut]:
    share, position, end = portion.share, portion.first, portion.first + portion.rows
    while position < end:
        step, offset = divmod(position, share.size)
        whole = (end - position) // share.size if offset == 0 else 0
        rows = share.size if whole else min(share.size - offset, end - position)
        steps, start = max(whole, 1), position - portion.first
        low, high = max(offset, share.start), min(offset + rows, share.stop)
        if low < high:
            place = share.place + low - share.start
            yield _Cut(
                source=slice(start, start + steps * rows),
                shape=(steps, rows),
                own=slice(low - offset, high - offset),
                steps=slice(step, step + steps),
                places=slice(place, place + high - low),
            )
        position += steps * rows


@dataclass(frozen=True)
class _Block:
    """The batches of several steps; `ids` and `weights` hold one feature after the other."""

    widths: tuple[int, ...]
    labels: NDArray[np.float32]
    dense: NDArray[np.float32]
    ids: NDArray[np.int64]
    weights: NDArray[np.float32] | None

    @cached_property
    def ids_of_features(self) -> list[NDArray[np.int64]]:
        return list(self._of_features(self.ids))

    @cached_property
    def weights_of_features(self) -> list[NDArray[np.float32]]:
        return [] if self.weights is None else list(self._of_features(self.weights))

    def _of_features(self, values: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Views [steps, batch_size], or [steps, batch_size, width]."""
        steps, size = self.labels.shape
        end = 0
        for width in self.widths:
            start, end = end, end + size * width
            shape = (steps, size) if width == 1 else (steps, size, width)
            yield values[:, start:end].reshape(shape)

    def put(self, portion: Portion) -> None:
        piece = portion.piece
        assert piece is not None
        cuts, order = list(_cuts(portion)), portion.order
        _place(piece.labels[order], cuts, self.labels)
        for column, values in enumerate(piece.dense):
            _place(values[order], cuts, self.dense[:, column])
        for bags, ids in zip(piece.bags, self.ids_of_features, strict=True):
            _place(bags.ids.reshape(len(piece), *ids.shape[2:])[order], cuts, ids)
        for bags, weights in zip(piece.bags, self.weights_of_features, strict=False):
            assert bags.weights is not None
            _place(bags.weights.reshape(len(piece), *weights.shape[2:])[order], cuts, weights)


def _place(values: NDArray[Any], cuts: Sequence[_Cut], target: NDArray[Any]) -> None:
    """Put rows [rows, ...] into `target` [steps, batch_size, ...]."""
    for source, shape, own, steps, places in cuts:
        rows = values[source].reshape(*shape, *values.shape[1:])
        target[steps, places] = rows[:, own]
