"""Arrow columns to arrays a batch is cut from, every value checked on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from planner import TableSpec, UserError
from shardemb.config import RunConfig
from shardemb.data.hashing import hash_ids, strings_to_ids


@dataclass(frozen=True)
class FeatureSchema:
    """One sparse feature: where its ids are and which rows of which table they mean."""

    name: str
    table: str
    num_embeddings: int
    column: str
    ids: Literal["as_is", "hash"] = "as_is"
    weights: str | None = None
    null_row: int | None = None


@dataclass(frozen=True)
class BatchSchema:
    """Which columns become which parts of a batch."""

    label: str
    dense: tuple[str, ...] = ()
    dense_transform: Literal["none", "log"] = "none"
    dense_null_value: float = 0.0
    features: tuple[FeatureSchema, ...] = ()

    @property
    def columns(self) -> list[str]:
        named = [self.label, *self.dense]
        for feature in self.features:
            named += [feature.column] + ([feature.weights] if feature.weights else [])
        return list(dict.fromkeys(named))

    @property
    def is_weighted(self) -> bool:
        return any(feature.weights for feature in self.features)

    @classmethod
    def for_tables(
        cls,
        tables: Iterable[TableSpec],
        *,
        label: str = "label",
        dense: Sequence[str] = (),
        dense_transform: Literal["none", "log"] = "none",
        ids: Literal["as_is", "hash"] = "as_is",
    ) -> BatchSchema:
        """Every feature of `tables` read from the column of its name."""
        features = {
            name: FeatureSchema(name, table.name, table.num_embeddings, column=name, ids=ids)
            for table in sorted(tables, key=lambda t: -t.num_embeddings)
            for name in table.feature_names
        }
        return cls(label, tuple(dense), dense_transform, features=tuple(features.values()))

    @classmethod
    def from_config(cls, config: RunConfig) -> BatchSchema:
        """Each feature once; one used by several tables must fit the smallest of them."""
        features: dict[str, FeatureSchema] = {}
        for table in sorted(config.table_specs(), key=lambda t: -t.num_embeddings):
            for name in table.feature_names:
                read = config.feature(name)
                features[name] = FeatureSchema(
                    name=name,
                    table=table.name,
                    num_embeddings=table.num_embeddings,
                    column=read.column or name,
                    ids=read.ids,
                    weights=read.weights,
                    null_row=read.null_row,
                )
        order = dict.fromkeys(n for table in config.table_specs() for n in table.feature_names)
        return cls(
            label=config.data.label,
            dense=tuple(config.data.dense.columns),
            dense_transform=config.data.dense.transform,
            dense_null_value=config.data.dense.null_value,
            features=tuple(features[name] for name in order),
        )


@dataclass(frozen=True)
class Origin:
    """Where the rows of a piece come from, for messages."""

    file: str
    first_row: int  # number within the file, from 0

    def row(self, index: int) -> str:
        return f"{self.file}, row {self.first_row + index}"


@dataclass(frozen=True)
class Bags:
    """The ids of one feature: those of row i are ids[offsets[i]:offsets[i + 1]]."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None

    def slice(self, start: int, stop: int) -> Bags:
        first, last = self.offsets[start], self.offsets[stop]
        return Bags(
            ids=self.ids[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            weights=None if self.weights is None else self.weights[first:last],
        )

    def take(self, order: NDArray[np.int64]) -> Bags:
        """The bags of rows order[0], order[1] ..."""
        values, lengths = self.offsets[order], np.diff(self.offsets)[order]
        offsets = _offsets(lengths)
        if not (lengths == 1).all():
            shift = np.repeat(values - offsets[:-1], lengths)
            values = np.arange(len(shift)) + shift
        weights = None if self.weights is None else self.weights[values]
        return Bags(self.ids[values], offsets, weights)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows, converted: `labels` [n], `dense` [n, columns], `bags` one a feature."""

    labels: NDArray[np.float32]
    dense: NDArray[np.float32]
    bags: tuple[Bags, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> Piece:
        return Piece(
            labels=self.labels[start:stop],
            dense=self.dense[start:stop],
            bags=tuple(bags.slice(start, stop) for bags in self.bags),
        )

    def take(self, order: NDArray[np.int64]) -> Piece:
        bags = tuple(bags.take(order) for bags in self.bags)
        return Piece(self.labels[order], self.dense[order], bags)


def concatenate(pieces: Sequence[Piece]) -> Piece:
    """The rows of one piece after those of another."""
    if len(pieces) == 1:
        return pieces[0]
    bags = []
    for parts in zip(*(piece.bags for piece in pieces), strict=True):
        weights = [part.weights for part in parts if part.weights is not None]
        bags.append(
            Bags(
                ids=np.concatenate([part.ids for part in parts]),
                offsets=_offsets(np.concatenate([np.diff(part.offsets) for part in parts])),
                weights=np.concatenate(weights) if weights else None,
            )
        )
    return Piece(
        labels=np.concatenate([piece.labels for piece in pieces]),
        dense=np.concatenate([piece.dense for piece in pieces]),
        bags=tuple(bags),
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def convert(table: pa.Table, schema: BatchSchema, origin: Origin) -> Piece:
    """`table` as arrays. UserError names the feature, file and row of a value that is wrong."""
    arrays = {name: table.column(name).combine_chunks() for name in schema.columns}
    return Piece(
        labels=_labels(arrays[schema.label], schema.label, origin),
        dense=_dense(arrays, schema, origin),
        bags=tuple(
            _bags(arrays, feature, schema.is_weighted, origin) for feature in schema.features
        ),
    )


def element_type(kind: pa.DataType) -> pa.DataType:
    """The type of a list's elements; `kind` itself where it is not a list."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list or pa.types.is_fixed_size_list(kind) else kind


def _float32(array: pa.Array) -> NDArray[np.float32]:
    """Rounded to float32; nulls become NaN."""
    return pc.cast(array, pa.float32(), safe=False).to_numpy(zero_copy_only=False)


def _labels(array: pa.Array, name: str, origin: Origin) -> NDArray[np.float32]:
    labels = _float32(array)
    wrong = ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise UserError(
            f"{origin.row(index)}: the label (column {name}) is {_shown(array[index])}, it must be "
            "from 0 to 1; remove such rows from the data"
        )
    return labels


def _shown(value: pa.Scalar) -> str:
    return "null" if value.as_py() is None else str(value.as_py())


def _dense(arrays: dict[str, pa.Array], schema: BatchSchema, origin: Origin) -> NDArray[np.float32]:
    """[rows, columns]; a NaN in the data means the same as a null."""
    dense = np.empty((len(arrays[schema.label]), len(schema.dense)), np.float32)
    for column, name in enumerate(schema.dense):
        dense[:, column] = _float32(arrays[name])
    infinite = np.isinf(dense)
    if infinite.any():
        index, column = np.argwhere(infinite)[0]
        name = schema.dense[column]
        raise UserError(
            f"{origin.row(index)}: dense feature {name} is {arrays[name][int(index)].as_py()}, "
            "which is no finite 32-bit float; correct it or make it null"
        )
    if schema.dense_transform == "log":
        dense = np.sign(dense) * np.log1p(np.abs(dense))
    dense[np.isnan(dense)] = schema.dense_null_value
    return dense


def _bags(
    arrays: dict[str, pa.Array], feature: FeatureSchema, weighted: bool, origin: Origin
) -> Bags:
    values, lengths = _values_and_lengths(arrays[feature.column])
    weights = _weights(arrays, feature, lengths, origin) if weighted else None
    if values.null_count and feature.null_row is None:
        # A null names no row: it adds nothing to its bag.
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        bag_of_value = np.repeat(np.arange(len(lengths)), lengths)[valid]
        lengths = np.bincount(bag_of_value, minlength=len(lengths))
        weights = None if weights is None else weights[valid]
        values = values.drop_null()
    offsets = _offsets(lengths)
    if weights is not None and not np.isfinite(weights).all():
        index = _row_of(int(np.argmin(np.isfinite(weights))), offsets)
        raise UserError(
            f"{origin.row(index)}: feature {feature.name} has a null, NaN or infinite weight "
            f"(column {feature.weights})"
        )
    return Bags(_rows(values, offsets, feature, origin), offsets, weights)


def _row_of(value: int, offsets: NDArray[np.int64]) -> int:
    """The row, among those of `offsets`, that has the value of this number."""
    return int(np.searchsorted(offsets, value, side="right")) - 1


def _values_and_lengths(array: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """All values one after the other, and how many each row has; a null list has none."""
    if not pa.types.is_nested(array.type):
        return array, np.ones(len(array), np.int64)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    return array.flatten(), lengths.astype(np.int64)


def _weights(
    arrays: dict[str, pa.Array], feature: FeatureSchema, lengths: NDArray[np.int64], origin: Origin
) -> NDArray[np.float32]:
    if feature.weights is None:
        return np.ones(int(lengths.sum()), np.float32)
    values, found = _values_and_lengths(arrays[feature.weights])
    if (found != lengths).any():
        index = int(np.argmax(found != lengths))
        raise UserError(
            f"{origin.row(index)}: feature {feature.name} has {lengths[index]} ids "
            f"and {found[index]} weights (column {feature.weights}); each id needs one weight"
        )
    return _float32(values)


def _rows(
    values: pa.Array, offsets: NDArray[np.int64], feature: FeatureSchema, origin: Origin
) -> NDArray[np.int64]:
    """Table rows for the values of one feature."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = strings_to_ids(values)
    is_null = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    filled = pc.fill_null(values, 0) if values.null_count else values
    # Casts wrap: ids beyond int64 hash well, and are negative for the range check.
    ids = pc.cast(filled, pa.int64(), safe=False).to_numpy(zero_copy_only=False)
    if feature.ids == "hash":
        rows = hash_ids(ids, feature.num_embeddings, feature.null_row)
    else:
        _check_range(ids, filled, offsets, feature, origin)
        rows = ids
    if is_null is not None and feature.null_row is not None:
        rows = np.where(is_null, feature.null_row, rows)
    return rows


def _check_range(
    ids: NDArray[np.int64],
    values: pa.Array,
    offsets: NDArray[np.int64],
    feature: FeatureSchema,
    origin: Origin,
) -> None:
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < feature.num_embeddings):
        return
    wrong = int(np.argmax((ids < 0) | (ids >= feature.num_embeddings)))
    raise UserError(
        f"{origin.row(_row_of(wrong, offsets))}: feature {feature.name} has id {values[wrong]}, "
        f"outside table {feature.table}, whose rows are 0 to {feature.num_embeddings - 1}. Raise "
        f"tables.{feature.table}.num_embeddings above the largest id, or hash the ids into the "
        f"table with data.features.{feature.name}.ids: hash"
    )
