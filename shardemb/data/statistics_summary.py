"""Statistics of data, as people, the planner and `stats.json` have them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from planner import TableSpec
from planner.tables import REUSE_BATCH_SIZE
from shardemb.config import RunConfig
from shardemb.data.hashing import hash_ids
from shardemb.data.statistics_counts import Counts, FeatureCounts, Moments
from shardemb.data.statistics_ids import Ints, Skew
from shardemb.data.statistics_input import IdKind, SparseFeature


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Collisions(_Record):
    """Distinct ids that share a row of the table; `measured` where all ids are known."""

    rows: int = Field(description="of the table, that ids are hashed to")
    expected_share: float = Field(description="of the distinct ids, for random rows")
    measured_share: float | None = None
    expected_rows_used: float
    measured_rows_used: int | None = None


class FeatureStatistics(_Record):
    """One sparse feature. Shares are from 0 to 1."""

    column: str
    ids: IdKind
    num_embeddings: int | None = Field(description="of the smallest table that it looks up")
    rows: int
    nulls: int = Field(description="null ids and null lists")
    lookups: int = Field(description="ids, and nulls that a row stands for, times num_hashes")
    out_of_range: int = Field(description="ids that are no row: negative, or beyond the table")
    largest_id: int | None
    distinct_ids: int
    distinct_ids_relative_error: float = Field(description="standard error; 0: exact")
    pooling_factor: float = Field(description="mean lookups of a row")
    pooling_p50: int
    pooling_p99: int
    top_1_percent: float | None = Field(description="share of lookups of the hottest ids")
    top_10_percent: float | None
    skew: list[tuple[float, float]] = Field(
        description="(share of distinct ids, the hottest first; their share of lookups)"
    )
    reuse_histogram: list[float] | None = Field(
        description="share of a batch's lookups whose row occurs 1, 2, 3-4, 5-8, ... times in it"
    )
    collisions: Collisions | None = None

    @property
    def is_exact(self) -> bool:
        """False: distinct ids and skew are estimated from a uniform sample of the ids."""
        return self.distinct_ids_relative_error == 0


class DenseStatistics(_Record):
    """One dense column; mean, standard deviation (of the population) of its finite numbers."""

    rows: int
    nulls: int
    nans: int
    infinite: int
    min: float | None
    mean: float | None
    max: float | None
    std: float | None


class DataStatistics(_Record):
    """What `stats.json` holds."""

    version: Literal[1] = 1
    files: list[str]
    rows: int
    batch_size: int = Field(description="of the reuse histograms")
    batches: int = Field(description="that the reuse histograms are of")
    features: dict[str, FeatureStatistics]
    dense: dict[str, DenseStatistics]
    skipped: dict[str, str] = Field(description="columns of no type to train on: their types")
    table_list: dict[str, Any] | None = Field(
        default=None, description="with a config: its tables, as `shardemb plan` reads them"
    )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is null."""
        return json.loads(self.model_dump_json())


def summarize(counts: Counts, files: Sequence[str], config: RunConfig | None) -> DataStatistics:
    """What the counts of all rows say."""
    return DataStatistics(
        files=list(files),
        rows=counts.rows,
        batch_size=counts.batch_size,
        batches=counts.batches,
        features={f.feature.name: _feature(f, counts.rows) for f in counts.features},
        dense={name: _dense(moments, counts.rows) for name, moments in counts.dense.items()},
        skipped=counts.columns.skipped,
        table_list=None if config is None else _table_list(config, counts),
    )


def _feature(counts: FeatureCounts, rows: int) -> FeatureStatistics:
    feature, lookups = counts.feature, _lookups(counts.lengths)
    skew = Skew(counts.ids, counts.null_lookups, lookups=lookups)
    return FeatureStatistics(
        column=feature.column,
        ids=feature.ids,
        num_embeddings=feature.num_embeddings,
        rows=rows,
        nulls=counts.nulls,
        lookups=lookups,
        out_of_range=counts.out_of_range,
        largest_id=counts.largest_id if feature.ids == "as_is" and lookups else None,
        distinct_ids=counts.ids.distinct,
        distinct_ids_relative_error=counts.ids.relative_error,
        pooling_factor=lookups / rows,
        pooling_p50=_percentile(counts.lengths, 50),
        pooling_p99=_percentile(counts.lengths, 99),
        top_1_percent=skew.top(1) if lookups else None,
        top_10_percent=skew.top(10) if lookups else None,
        skew=skew.curve(),
        reuse_histogram=_shares(counts.reuse),
        collisions=_collisions(counts, feature),
    )


def _lookups(lengths: Counter[int]) -> int:
    return sum(length * rows for length, rows in lengths.items())


def _percentile(lengths: Counter[int], percent: int) -> int:
    """The smallest length that `percent` of the rows do not exceed."""
    seen, needed = 0, percent * lengths.total()
    for length in sorted(lengths):
        seen += lengths[length]
        if 100 * seen >= needed:
            return length
    return 0


def _shares(lookups: Ints) -> list[float] | None:
    total = int(lookups.sum())
    return [count / total for count in lookups.tolist()] if total else None


def _collisions(counts: FeatureCounts, feature: SparseFeature) -> Collisions | None:
    """None too where an id has several rows: those that share one differ in the others."""
    if feature.ids != "hash" or feature.schema is None or feature.num_hashes > 1:
        return None
    if not counts.ids.distinct:
        return None
    size = feature.schema.num_embeddings
    rows = size - (feature.null_row is not None and size > 1)  # nulls have a row of their own
    distinct, is_free = counts.ids.distinct, 1 - 1 / rows  # the chance that an id misses a row
    measured: dict[str, Any] = {}
    if counts.ids.is_exact:
        found = hash_ids(counts.ids.ids, size, feature.null_row, feature.schema.hash_seed)
        _, ids_of_row = np.unique(found, return_counts=True)
        shared = int(ids_of_row[ids_of_row > 1].sum())
        measured = {
            "measured_share": shared / distinct,
            "measured_rows_used": len(ids_of_row),
        }
    return Collisions(
        rows=rows,
        expected_share=1 - is_free ** (distinct - 1),
        expected_rows_used=rows * (1 - is_free**distinct),
        **measured,
    )


def _dense(moments: Moments, rows: int) -> DenseStatistics:
    is_known = moments.count > 0
    return DenseStatistics(
        rows=rows,
        nulls=moments.nulls,
        nans=moments.nans,
        infinite=moments.infinite,
        min=moments.smallest if is_known else None,
        mean=moments.mean if is_known else None,
        max=moments.largest if is_known else None,
        std=math.sqrt(moments.squares / moments.count) if is_known else None,
    )


def _table_list(config: RunConfig, counts: Counts) -> dict[str, Any]:
    """The planner's histograms are of its own batch size; others are left out."""
    lookups = {f.feature.name: _lookups(f.lengths) for f in counts.features}
    has_reuse = counts.batch_size == REUSE_BATCH_SIZE
    return {
        "batch_size_per_rank": config.train.batch_size,
        "tables": [
            _table(
                spec,
                sum(lookups[name] for name in spec.feature_names) / counts.rows,
                _shares(counts.table_reuse[spec.name]) if has_reuse else None,
            )
            for spec in config.table_specs()
        ],
    }


def _table(spec: TableSpec, pooling: float, reuse: list[float] | None) -> dict[str, Any]:
    """As in a table list, where the pooling factor is of all features together."""
    entry = spec.model_dump(mode="json", exclude={"num_features", "reuse_histogram"})
    entry["pooling_factor"] = pooling
    return entry if reuse is None else {**entry, "reuse_histogram": reuse}
