"""Arrow columns to arrays a batch is cut from, every value checked on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from planner import UserError
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
    rows: NDArray[np.int64]  # row number within the file, 0-based, of each row

    def row(self, index: int) -> str:
        return f"{self.file}, row {self.rows[index]}"


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


def convert(table: pa.Table, schema: BatchSchema, origin: Origin) -> Piece:
    """`table` as arrays. UserError names the feature, file and row of a value that is wrong."""
    arrays = {name: _one_array(table.column(name)) for name in schema.columns}
    dense = [_dense(arrays[name], schema) for name in schema.dense]
    return Piece(
        labels=_labels(arrays[schema.label], schema.label, origin),
        dense=np.stack(dense, axis=1) if dense else np.zeros((len(table), 0), np.float32),
        bags=tuple(
            _bags(arrays, feature, schema.is_weighted, origin) for feature in schema.features
        ),
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = pa.concat_arrays(combined.chunks) if combined.num_chunks else combined.chunk(0)
    return combined


def _labels(array: pa.Array, name: str, origin: Origin) -> NDArray[np.float32]:
    labels = pc.cast(array, pa.float32()).to_numpy(zero_copy_only=False)
    wrong = ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise UserError(
            f"{origin.row(index)}: label {name} is {array[index].as_py()}, it must be from 0 to 1; "
            "remove such rows from the data"
        )
    return labels


def _dense(array: pa.Array, schema: BatchSchema) -> NDArray[np.float32]:
    values = pc.cast(array, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    if schema.dense_transform == "log":
        values = np.sign(values) * np.log1p(np.abs(values))
    # Arrow gives nulls as NaN here; a NaN in the data means the same.
    return np.nan_to_num(values, copy=True, nan=schema.dense_null_value)


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
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Bags(_rows(values, offsets, feature, origin), offsets, weights)


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
    weights = pc.cast(values, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    if np.isnan(weights).any():
        value = int(np.argmax(np.isnan(weights)))
        index = int(np.repeat(np.arange(len(lengths)), lengths)[value])
        raise UserError(f"{origin.row(index)}: feature {feature.name} has a null or NaN weight")
    return weights


def _rows(
    values: pa.Array, offsets: NDArray[np.int64], feature: FeatureSchema, origin: Origin
) -> NDArray[np.int64]:
    """Table rows for the values of one feature."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = strings_to_ids(values)
    is_null = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    filled = pc.fill_null(values, 0) if values.null_count else values
    ids = _int64(filled, offsets, feature, origin)
    if feature.ids == "hash":
        rows = hash_ids(ids, feature.num_embeddings, feature.null_row)
    else:
        _check_range(ids, offsets, feature, origin)
        rows = ids
    if is_null is not None and feature.null_row is not None:
        rows = np.where(is_null, feature.null_row, rows)
    return rows


def _int64(
    values: pa.Array, offsets: NDArray[np.int64], feature: FeatureSchema, origin: Origin
) -> NDArray[np.int64]:
    if pa.types.is_uint64(values.type):
        # Bit patterns are kept: huge ids hash well, and fail the range check when taken as is.
        return values.to_numpy(zero_copy_only=False).view(np.int64)
    return pc.cast(values, pa.int64()).to_numpy(zero_copy_only=False)


def _check_range(
    ids: NDArray[np.int64], offsets: NDArray[np.int64], feature: FeatureSchema, origin: Origin
) -> None:
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < feature.num_embeddings):
        return
    value = int(np.argmax((ids < 0) | (ids >= feature.num_embeddings)))
    index = int(np.searchsorted(offsets, value, side="right")) - 1
    raise UserError(
        f"{origin.row(index)}: feature {feature.name} has id {ids[value]}, outside table "
        f"{feature.table}, whose rows are 0 to {feature.num_embeddings - 1}. Raise "
        f"tables.{feature.table}.num_embeddings above the largest id, or hash the ids into the "
        f"table with data.features.{feature.name}.ids: hash"
    )
