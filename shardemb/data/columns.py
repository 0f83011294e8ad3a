"""Arrow columns to arrays a batch is cut from, every value checked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from planner import UserError
from shardemb.data.hashing import strings_to_ids
from shardemb.data.ids import is_text, rows_of_values
from shardemb.data.schema import BatchSchema, FeatureSchema, LabelSchema


@dataclass(frozen=True)
class Origin:
    """Where the rows of a piece come from, for messages."""

    file: str
    first_row: int  # number within the file, from 0

    def row(self, index: int) -> str:
        return f"{self.file}, row {self.first_row + index}"


Order = NDArray[np.int64] | slice  # of rows: some of them one after the other, or any


def in_order(rows: NDArray[Any], order: Order) -> NDArray[Any]:
    """`rows[order]`; where rows have several values, `take` is four times as fast as an index."""
    return rows[order] if isinstance(order, slice) else rows.take(order, axis=0)


@dataclass(frozen=True)
class Bags:
    """The ids of one feature: `width` in each row, or where rows differ (None) those of row i at
    offsets[i]:offsets[i + 1]."""

    ids: NDArray[Any]  # of any integer type
    width: int | None
    offsets: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None

    def lengths(self, rows: int) -> NDArray[np.int64]:
        """How many ids each of the `rows` rows has."""
        if self.offsets is None:
            assert self.width is not None
            return np.full(rows, self.width)
        return np.diff(self.offsets)

    def take(self, order: Order) -> Bags:
        """The bags of these rows, in this order."""
        if self.offsets is None:
            return replace(self, ids=self._rows(self.ids, order), weights=self._weights(order))
        if isinstance(order, slice):
            order = np.arange(order.start, order.stop)
        lengths = np.diff(self.offsets)[order]
        offsets = _offsets(lengths)
        values = np.arange(offsets[-1]) + np.repeat(self.offsets[order] - offsets[:-1], lengths)
        weights = None if self.weights is None else self.weights[values]
        return Bags(self.ids[values], None, offsets, weights)

    def _rows(self, values: NDArray[Any], order: Order) -> NDArray[Any]:
        if not self.width:
            return values
        rows = values if self.width == 1 else values.reshape(-1, self.width)
        return in_order(rows, order).reshape(-1)

    def _weights(self, order: Order) -> NDArray[np.float32] | None:
        return None if self.weights is None else self._rows(self.weights, order)


@dataclass(frozen=True)
class Piece:
    """Rows, converted: `labels` one [n] a column, `dense` one [n] a feature with NaN for null,
    `bags` one a feature, `groups` [n] numbers that tell the rows' groups apart."""

    labels: tuple[NDArray[np.float32], ...]
    dense: tuple[NDArray[Any], ...]
    bags: tuple[Bags, ...]
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels[0])

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Ids of each feature in a row; None where rows differ."""
        widths = tuple(bags.width for bags in self.bags if bags.width is not None)
        return widths if len(widths) == len(self.bags) else None

    def take(self, order: Order) -> Piece:
        return Piece(
            labels=tuple(in_order(column, order) for column in self.labels),
            dense=tuple(in_order(column, order) for column in self.dense),
            bags=tuple(bags.take(order) for bags in self.bags),
            groups=None if self.groups is None else in_order(self.groups, order),
        )


def concatenate(pieces: Sequence[Piece]) -> Piece:
    """The rows of one piece after those of another."""
    if len(pieces) == 1:
        return pieces[0]
    groups = [piece.groups for piece in pieces if piece.groups is not None]
    return Piece(
        labels=tuple(map(np.concatenate, zip(*(piece.labels for piece in pieces), strict=True))),
        dense=tuple(map(np.concatenate, zip(*(piece.dense for piece in pieces), strict=True))),
        bags=tuple(
            _concatenate_bags(bags, [len(piece) for piece in pieces])
            for bags in zip(*(piece.bags for piece in pieces), strict=True)
        ),
        groups=np.concatenate(groups) if groups else None,
    )


def _concatenate_bags(parts: Sequence[Bags], rows: Sequence[int]) -> Bags:
    ids = np.concatenate([part.ids for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    widths = {part.width for part in parts}
    width = widths.pop() if len(widths) == 1 else None
    lengths = [part.lengths(n) for part, n in zip(parts, rows, strict=True)]
    return Bags(
        ids=ids,
        width=width,
        offsets=_offsets(np.concatenate(lengths)) if width is None else None,
        weights=np.concatenate(weights) if weights else None,
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def convert(table: pa.Table, schema: BatchSchema, origin: Origin) -> Piece:
    """`table` as arrays. UserError names the feature, file and row of a value that is wrong."""
    arrays = _arrays(table)
    return Piece(
        labels=tuple(_labels(arrays[label.column], label, origin) for label in schema.labels),
        dense=tuple(_dense(arrays[name], name, origin) for name in schema.dense),
        bags=tuple(
            _bags(arrays, feature, schema.is_weighted, origin) for feature in schema.features
        ),
        groups=_groups(arrays[schema.group], schema.group, origin) if schema.group else None,
    )


def _arrays(table: pa.Table) -> dict[str, pa.Array]:
    """Each column in one piece."""
    batches = table.to_batches()
    (batch,) = batches if len(batches) == 1 else table.combine_chunks().to_batches()
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def element_type(kind: pa.DataType) -> pa.DataType:
    """The type of a list's elements; `kind` itself where it is not a list."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list or pa.types.is_fixed_size_list(kind) else kind


def _numbers(array: pa.Array) -> NDArray[Any]:
    """The values, without a copy where there are no nulls; nulls become NaN."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if not array.null_count:
        return array.to_numpy()
    valid, values = array.buffers()
    rows = slice(array.offset, array.offset + len(array))
    numbers = np.frombuffer(values, array.type.to_pandas_dtype())[rows].astype(np.float32)
    numbers += _NAN_OF_BITS.take(np.frombuffer(valid, np.uint8), axis=0).reshape(-1)[rows]
    return numbers


# For each byte of a validity bitmap, what to add to eight numbers: NaN to the null ones.
_NAN_OF_BITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, np.nan
).astype(np.float32)


def _labels(array: pa.Array, label: LabelSchema, origin: Origin) -> NDArray[np.float32]:
    labels = _numbers(array)
    if not (labels.min() >= label.lowest and labels.max() <= label.highest):  # NaN is neither
        index = int(np.argmin((labels >= label.lowest) & (labels <= label.highest)))
        raise UserError(_wrong_label(label, array[index], origin.row(index)))
    if label.is_whole and labels.dtype.kind == "f" and (np.floor(labels) != labels).any():
        index = int(np.argmax(np.floor(labels) != labels))
        raise UserError(_wrong_label(label, array[index], origin.row(index)))
    return labels.astype(np.float32, copy=False)


def _wrong_label(label: LabelSchema, found: pa.Scalar, row: str) -> str:
    needed, remedy = f"from {label.lowest:g} to {label.highest:g}", "remove such rows from the data"
    if label.highest > 1e38:
        needed = "a finite 32-bit number" + ("" if label.lowest else ", and not negative")
    if label.is_whole:
        needed = f"a class {needed}"
        remedy = f"set num_classes of its loss to the number of classes, or {remedy}"
    return (
        f"{row}: the label (column {label.column}) is {_shown(found)}, it must be {needed}; "
        f"{remedy}"
    )


def _groups(array: pa.Array, name: str, origin: Origin) -> NDArray[np.int64]:
    if array.null_count:
        index = array.is_null().to_numpy(zero_copy_only=False).argmax()
        raise UserError(
            f"{origin.row(int(index))}: the group (data.group: {name}) is null; give each row one, "
            "or remove such rows from the data"
        )
    numbers = strings_to_ids(array) if is_text(array.type) else array
    return numbers.to_numpy().astype(np.int64, copy=False)


def _shown(value: pa.Scalar) -> str:
    return "null" if value.as_py() is None else str(value.as_py())


def _dense(array: pa.Array, name: str, origin: Origin) -> NDArray[Any]:
    """Numbers that are finite in 32 bits, or NaN."""
    if not pa.types.is_floating(array.type):
        return _numbers(array)
    with np.errstate(over="ignore"):
        numbers = _numbers(array).astype(np.float32, copy=False)
    infinite = np.isinf(numbers)
    if infinite.any():
        index = int(infinite.argmax())
        raise UserError(
            f"{origin.row(index)}: dense feature {name} is {_shown(array[index])}, "
            "which is no finite 32-bit float; correct it or make it null"
        )
    return numbers


def _bags(
    arrays: dict[str, pa.Array], feature: FeatureSchema, weighted: bool, origin: Origin
) -> Bags:
    values, width, offsets = _values_of_rows(arrays[feature.column])
    rows = len(arrays[feature.column])
    weights = None
    if weighted:
        weights = _weights(arrays, feature, values, width, offsets, origin)
    if values.null_count and feature.null_row is None:
        # A null names no row: it adds nothing to its bag.
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        lengths = np.full(rows, width) if offsets is None else np.diff(offsets)
        bag_of_value = np.repeat(np.arange(rows), lengths)[valid]
        width, offsets = None, _offsets(np.bincount(bag_of_value, minlength=rows))
        weights = None if weights is None else weights[valid]
        values = values.drop_null()

    def row_of(value: int) -> str:
        """Where the value of this number is."""
        if offsets is None:
            return origin.row(value // (width or 1))
        return origin.row(int(np.searchsorted(offsets, value, side="right")) - 1)

    if weights is not None and not np.isfinite(weights).all():
        raise UserError(
            f"{row_of(int(np.argmin(np.isfinite(weights))))}: feature {feature.name} has a null, "
            f"NaN or infinite weight (column {feature.weights})"
        )
    rows_of_table = rows_of_values(values, feature, row_of)
    hashes = feature.num_hashes
    if hashes == 1:
        return Bags(rows_of_table, width, offsets, weights)
    return Bags(
        rows_of_table,
        width=None if width is None else width * hashes,
        offsets=None if offsets is None else offsets * hashes,
        weights=None if weights is None else np.repeat(weights, hashes),
    )


def _values_of_rows(array: pa.Array) -> tuple[pa.Array, int | None, NDArray[np.int64] | None]:
    """All values one after the other, and how many each row has: all as many, or the offsets.

    A null list has no values.
    """
    if not pa.types.is_nested(array.type):
        return array, 1, None
    lengths = pc.list_value_length(array)
    if array.null_count:
        lengths = pc.fill_null(lengths, 0)
    lengths = lengths.to_numpy()
    if len(lengths) and (lengths == lengths[0]).all():
        return array.flatten(), int(lengths[0]), None
    return array.flatten(), None, _offsets(lengths)


def _weights(
    arrays: dict[str, pa.Array],
    feature: FeatureSchema,
    ids: pa.Array,
    width: int | None,
    offsets: NDArray[np.int64] | None,
    origin: Origin,
) -> NDArray[np.float32]:
    """One for each id; 1 for those of a feature without weights."""
    if feature.weights is None:
        return np.ones(len(ids), np.float32)
    values, other_width, other_offsets = _values_of_rows(arrays[feature.weights])
    if width != other_width or (offsets is not None and (offsets != other_offsets).any()):
        rows = len(arrays[feature.column])
        wanted = np.full(rows, width) if offsets is None else np.diff(offsets)
        found = np.full(rows, other_width) if other_offsets is None else np.diff(other_offsets)
        index = int(np.argmax(found != wanted))
        raise UserError(
            f"{origin.row(index)}: feature {feature.name} has {wanted[index]} ids "
            f"and {found[index]} weights (column {feature.weights}); each id needs one weight"
        )
    return _numbers(values).astype(np.float32, copy=False)
