"""Vocabularies: a feature's values in order of frequency, and values replaced by their rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardemb.data.convert_schema import VocabularySchema
from shardemb.data.dataset import COMPRESSION
from shardemb.data.declared import map_values
from shardemb.data.hashing import hash_ids, strings_to_ids

FOLDER = "vocabularies"
_MERGE_ROWS = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """`values[i]` has id i; all others are hashed into the ids of nulls, of which there are
    `oov_rows`, or without nulls into so many ids after these."""

    values: pa.Array
    oov_rows: int

    @property
    def size(self) -> int:
        return len(self.values) - self.values.null_count

    @property
    def num_embeddings(self) -> int:
        return self.size + self.oov_rows

    def encode(self, values: pa.Array) -> pa.Array:
        """The ids of `values`, or of those in lists; nulls stay nulls."""
        return map_values(values, self._ids)

    def _ids(self, values: pa.Array) -> pa.Array:
        ids = pc.index_in(values, value_set=self.values, skip_nulls=True).cast(pa.int64())
        is_unknown = pc.and_(pc.is_null(ids), pc.is_valid(values))
        return pc.replace_with_mask(ids, is_unknown, self._hashed(values.filter(is_unknown)))

    def _hashed(self, unknown: pa.Array) -> pa.Array:
        codes = strings_to_ids(unknown) if pa.types.is_string(unknown.type) else unknown
        nulls = np.flatnonzero(self.values.is_null().to_numpy(zero_copy_only=False))
        places = nulls if len(nulls) else np.arange(self.size, self.num_embeddings)
        return pa.array(places[hash_ids(codes.to_numpy(), self.oov_rows)], pa.int64())


def vocabulary_file(dataset: Path, feature: str) -> Path:
    return Path(vocabulary_path(str(dataset), feature))


def vocabulary_path(dataset: str, feature: str) -> str:
    """`dataset` may be a URL."""
    return f"{dataset.rstrip('/')}/{FOLDER}/{quote(feature, safe=' ')}.parquet"


def count_values(columns: Iterable[pa.ChunkedArray]) -> pa.Table:
    """`value` and `count` of all distinct values but null, whether in lists or not.

    Takes memory for the distinct values, however many there are in all.
    """
    merged: pa.Table | None = None
    pending: list[pa.Table] = []
    pending_rows = 0
    for column in columns:
        counts = _count(column)
        merged = counts.slice(0, 0) if merged is None else merged
        pending.append(counts)
        pending_rows += counts.num_rows
        if pending_rows > max(_MERGE_ROWS, merged.num_rows):
            merged, pending, pending_rows = _merge([merged, *pending]), [], 0
    assert merged is not None, "no columns to count"
    return _merge([merged, *pending])


def _count(column: pa.ChunkedArray) -> pa.Table:
    chunks = (chunk.flatten() if pa.types.is_list(chunk.type) else chunk for chunk in column.chunks)
    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    counts = pc.value_counts(pa.chunked_array(chunks, kind).drop_null())
    return pa.table({"value": counts.field("values"), "count": counts.field("counts")})


def _merge(counts: list[pa.Table]) -> pa.Table:
    grouped = pa.concat_tables(counts).group_by("value").aggregate([("count", "sum")])
    return pa.table({"value": grouped["value"], "count": grouped["count_sum"]})


def write_vocabulary(
    path: Path, counts: pa.Table, schema: VocabularySchema, earlier: pa.Array | None = None
) -> None:
    """Keep the frequent values, most frequent first; of equally frequent ones the smaller first.

    They come after the values of an `earlier` vocabulary, whose ids all stay: those of its
    `oov_rows` too, where nulls keep their place.
    """
    kept = counts.filter(pc.greater_equal(counts["count"], schema.min_count))
    ranked = kept.sort_by([("count", "descending"), ("value", "ascending")])
    if earlier is None:
        ranked = ranked.slice(0, schema.max_size)
    else:
        is_new = pc.invert(pc.is_in(ranked["value"], value_set=earlier))
        size = len(earlier) - earlier.null_count
        room = None if schema.max_size is None else max(0, schema.max_size - size)
        held = _counted(earlier, schema.oov_rows, counts)
        ranked = pa.concat_tables([held, ranked.filter(is_new).slice(0, room)])
    path.parent.mkdir(exist_ok=True)
    pq.write_table(ranked, path, compression=COMPRESSION)


def _counted(earlier: pa.Array, oov_rows: int, counts: pa.Table) -> pa.Table:
    """The earlier values and nulls for their `oov_rows`, with the counts of today."""
    if not earlier.null_count:
        earlier = pa.concat_arrays([earlier, pa.nulls(oov_rows, earlier.type)])
    places = pc.index_in(earlier, value_set=counts["value"].combine_chunks(), skip_nulls=True)
    found = pc.fill_null(pc.take(counts["count"], places), 0)
    return pa.table({"value": earlier, "count": found})


def read_vocabulary(path: Path, schema: VocabularySchema) -> Vocabulary:
    values = pq.read_table(path, columns=["value"])["value"].combine_chunks()
    return Vocabulary(values, schema.oov_rows)
