"""Which columns become which parts of a batch. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from planner import TableSpec
from shardemb.config import RunConfig


@dataclass(frozen=True)
class FeatureSchema:
    """One sparse feature: where its ids are and which rows of which table they mean."""

    name: str
    table: str
    num_embeddings: int
    column: str
    ids: Literal["as_is", "hash", "vocabulary"] = "as_is"
    weights: str | None = None
    null_row: int | None = None
    hash_seed: int = 0
    num_hashes: int = 1  # rows that each id is hashed to
    vocabulary: str | None = None  # a file: its values are rows 0, 1 ..., others share oov_rows
    oov_rows: int = 1


@dataclass(frozen=True)
class LabelSchema:
    """A column of labels, and what they may be; without `is_whole` any number in the range."""

    column: str
    lowest: float = 0.0
    highest: float = 1.0
    is_whole: bool = False


@dataclass(frozen=True)
class BatchSchema:
    """Which columns become which parts of a batch.

    `label` is the name of a column of labels from 0 to 1, or the schema of each column. Rows with
    one value of column `group` are ranked among each other.
    """

    label: str | tuple[LabelSchema, ...]
    dense: tuple[str, ...] = ()
    dense_transform: Literal["none", "log"] = "none"
    dense_null_value: float = 0.0
    features: tuple[FeatureSchema, ...] = ()
    group: str | None = None

    @cached_property
    def labels(self) -> tuple[LabelSchema, ...]:
        return (LabelSchema(self.label),) if isinstance(self.label, str) else self.label

    @cached_property
    def columns(self) -> list[str]:
        named = [*(label.column for label in self.labels), *self.dense]
        named += [self.group] if self.group else []
        for feature in self.features:
            named += [feature.column] + ([feature.weights] if feature.weights else [])
        return list(dict.fromkeys(named))

    @cached_property
    def is_weighted(self) -> bool:
        return any(feature.weights for feature in self.features)

    @classmethod
    def for_tables(
        cls,
        tables: Iterable[TableSpec],
        *,
        label: str | tuple[LabelSchema, ...] = "label",
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
                    hash_seed=read.hash_seed,
                    num_hashes=read.num_hashes,
                    vocabulary=read.vocabulary,
                    oov_rows=read.oov_rows,
                )
        order = dict.fromkeys(n for table in config.table_specs() for n in table.feature_names)
        return cls(
            label=tuple(
                LabelSchema(name, *task.label_range, is_whole=task.num_classes is not None)
                for task in config.tasks
                for name in task.labels
            ),
            dense=tuple(config.data.dense.columns),
            dense_transform=config.data.dense.transform,
            dense_null_value=config.data.dense.null_value,
            features=tuple(features[name] for name in order),
            group=config.data.group,
        )
