"""Batches from the pieces of a rank's lanes, a block of steps at a time.

Where every row has as many ids of a feature as any other, each piece goes straight to its place in
the batches, while it is in the CPU's cache. Otherwise rows are put in order first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor

from shardemb.data.batch import Batch
from shardemb.data.columns import Order, Piece, concatenate, in_order
from shardemb.data.order import Share
from shardemb.data.schema import BatchSchema

ALIGNMENT = 64  # bytes; of the parts of a batch


@dataclass(frozen=True)
class Portion:
    """Rows that a lane gives to a block of steps: some of a piece, None where it was skipped."""

    share: Share
    piece: Piece | None
    order: Order
    first: int  # number of its first row among those that the lane gives to the block
    rows: int


class Assembler:
    """Makes a rank's batches of `batch_size` rows; a step has `global_batch_size` on all ranks.

    With `pin_memory` all of a batch lies together in page-locked memory, so that one copy brings
    it to a GPU. Without, batches share what is the same for all of them.
    """

    def __init__(
        self, schema: BatchSchema, batch_size: int, global_batch_size: int, *, pin_memory: bool
    ) -> None:
        self.schema, self.pin_memory = schema, pin_memory
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self._lengths: dict[tuple[int, ...], torch.Tensor] = {}
        self._no_padding = torch.ones(batch_size)

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
            del portion  # before the next one is read, for its memory
        return self._batches(block) if block else []

    def _new_block(self, widths: tuple[int, ...], steps: int) -> _Block:
        parts = self._allocate(steps, self.batch_size * sum(widths), with_constants=self.pin_memory)
        if self.pin_memory:
            parts["lengths"][:] = self._lengths_of(widths)
            parts["mask"].fill_(1)
        return _Block(widths, parts)

    def _batches(self, block: _Block) -> list[Batch]:
        parts = block.parts
        _transform(parts["dense"], self.schema)
        constants = {"lengths": self._lengths_of(block.widths), "mask": self._no_padding}
        return [
            self._batch(
                constants | {name: values[step] for name, values in parts.items()},
                self.global_batch_size,
            )
            for step in range(len(parts["labels"]))
        ]

    def _lengths_of(self, widths: tuple[int, ...]) -> torch.Tensor:
        """The same for all steps, so that it is made once."""
        if widths not in self._lengths:
            lengths = torch.tensor(widths, dtype=torch.int64).repeat_interleave(self.batch_size)
            self._lengths[widths] = lengths
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
        rows, bags = (0, ()) if piece is None else (len(piece), piece.bags)
        allocated = self._allocate(1, sum(len(each.ids) for each in bags), with_constants=True)
        tensors = {name: values[0] for name, values in allocated.items()}
        parts = {name: values.numpy() for name, values in tensors.items()}
        lengths = parts["lengths"].reshape(-1, self.batch_size)
        lengths[:, rows:] = 0
        parts["dense"][:, rows:], parts["labels"][:, rows:] = 0, 0
        parts["mask"][:rows], parts["mask"][rows:] = 1, 0
        if self.schema.group:
            parts["groups"][rows:] = 0
        if piece is not None:
            for row, values in zip(parts["labels"], piece.labels, strict=True):
                row[:rows] = values
            if piece.groups is not None:
                parts["groups"][:rows] = piece.groups
            for row, values in zip(parts["dense"], piece.dense, strict=True):
                row[:rows] = values
            _transform(tensors["dense"][:, :rows], self.schema)
            for row, each in zip(lengths, bags, strict=True):
                row[:rows] = each.lengths(rows)
        _join([each.ids for each in bags], parts["ids"])
        if self.schema.is_weighted:
            _join([each.weights for each in bags if each.weights is not None], parts["weights"])
        return self._batch(tensors, global_rows)

    # --- Both

    def _allocate(self, steps: int, ids: int, *, with_constants: bool) -> dict[str, torch.Tensor]:
        """Tensors [steps, ...] of all that batches have, one batch after the other in memory;
        each has so many `ids`."""
        size, dense, features = self.batch_size, len(self.schema.dense), len(self.schema.features)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "labels": (torch.float32, (len(self.schema.labels), size)),
            "dense": (torch.float32, (dense, size)),
            "ids": (torch.int64, (ids,)),
        }
        if self.schema.is_weighted:
            shapes["weights"] = torch.float32, (ids,)
        if self.schema.group:
            shapes["groups"] = torch.int64, (size,)
        if with_constants:
            shapes["mask"] = torch.float32, (size,)
            shapes["lengths"] = torch.int64, (features * size,)
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values()]
        starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        memory = self._memory(steps * starts[-1]).view(steps, starts[-1])
        return {
            name: memory[:, start : start + size].view(dtype).view(steps, *shape)
            for (name, (dtype, shape)), start, size in zip(
                shapes.items(), starts, sizes, strict=False
            )
        }

    def _memory(self, size: int) -> torch.Tensor:
        if self.pin_memory:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        # Arrow's allocator keeps pages that the last blocks had; new ones cost as much as to fill
        # them.
        return torch.from_numpy(np.frombuffer(pa.allocate_buffer(size), np.uint8))

    def _batch(self, parts: dict[str, torch.Tensor], global_rows: int) -> Batch:
        return Batch(
            dense=parts["dense"].T,
            sparse=KeyedJaggedTensor(
                keys=[feature.name for feature in self.schema.features],
                values=parts["ids"],
                lengths=parts["lengths"],
                weights=parts.get("weights"),
                stride=self.batch_size,
            ),
            labels=parts["labels"][0] if len(parts["labels"]) == 1 else parts["labels"].T,
            mask=parts["mask"],
            global_rows=global_rows,
            groups=parts.get("groups"),
        )


def _join(parts: Sequence[NDArray[Any]], target: NDArray[Any]) -> None:
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        target[start:end] = part


def _transform(values: torch.Tensor, schema: BatchSchema) -> None:
    """In place; a NaN in the data means the same as a null."""
    if schema.dense_transform == "log":
        torch.copysign(values.abs().log1p_(), values, out=values)
    values.nan_to_num_(schema.dense_null_value)


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


class _Block:
    """The batches of several steps; `ids` and `weights` hold one feature after the other."""

    def __init__(self, widths: tuple[int, ...], parts: dict[str, torch.Tensor]) -> None:
        """`parts` are tensors [steps, ...]."""
        self.widths, self.parts = widths, parts
        self._labels, self._dense = parts["labels"].numpy(), parts["dense"].numpy()
        if "groups" in parts:
            self._groups = parts["groups"].numpy()
        self._ids = list(self._of_features(parts["ids"]))
        weights = parts.get("weights")
        self._weights = [] if weights is None else list(self._of_features(weights))

    def _of_features(self, values: torch.Tensor) -> Iterator[NDArray[Any]]:
        """Views [steps, batch_size], or [steps, batch_size, width]."""
        steps, _, size = self._labels.shape
        end = 0
        for width in self.widths:
            start, end = end, end + size * width
            shape = (steps, size) if width == 1 else (steps, size, width)
            yield values[:, start:end].view(shape).numpy()

    def put(self, portion: Portion) -> None:
        piece = portion.piece
        assert piece is not None
        cuts, order = list(_cuts(portion)), portion.order
        for column, labels in enumerate(piece.labels):
            _place(in_order(labels, order), cuts, self._labels[:, column])
        if piece.groups is not None:
            _place(in_order(piece.groups, order), cuts, self._groups)
        for column, values in enumerate(piece.dense):
            _place(in_order(values, order), cuts, self._dense[:, column])
        for bags, ids in zip(piece.bags, self._ids, strict=True):
            _place(in_order(bags.ids.reshape(len(piece), *ids.shape[2:]), order), cuts, ids)
        for bags, weights in zip(piece.bags, self._weights, strict=False):
            assert bags.weights is not None
            rows = bags.weights.reshape(len(piece), *weights.shape[2:])
            _place(in_order(rows, order), cuts, weights)


def _place(values: NDArray[Any], cuts: Sequence[_Cut], target: NDArray[Any]) -> None:
    """Put rows [rows, ...] into `target` [steps, batch_size, ...]."""
    for source, shape, own, steps, places in cuts:
        rows = values[source].reshape(*shape, *values.shape[1:])
        target[steps, places] = rows[:, own]
