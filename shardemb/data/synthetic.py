"""Criteo-like data drawn from a known model, so that the best reachable score is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from planner.errors import RequestError
from shardemb.data.click_model import ClickModel, Scores
from shardemb.data.dataset import (
    DatasetInfo,
    default_row_group_rows,
    new_dataset,
    write_info,
    write_split,
)
from shardemb.data.reuse_skew import Histogram, reuse_ranks

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

_CHUNK_ROWS = 16_384  # a column of a chunk fits the cache; part of what a seed means
_CALIBRATION_CHUNKS = 2
_MAX_NUM_EMBEDDINGS = 1 << 31  # so that multiplier * rank fits int64
_GOLDEN = 0.6180339887498949
# Of Criteo's thirteen counts some are often missing: here every fifth column, in 1 row of 20.
_NULL_EVERY, _NULL_SHARE = 5, 0.05
# One stream of random numbers for each purpose, then one for each chunk of it.
_MODEL, _CALIBRATION, _TRAIN, _TEST = range(4)


@dataclass(frozen=True)
class SyntheticFeature:
    """One sparse feature; a pooling factor other than 1 makes its column a list of ids."""

    name: str
    num_embeddings: int
    pooling_factor: float = 1.0
    reuse_histogram: Histogram | None = None  # as TableSpec's; None: Zipf


@dataclass(frozen=True)
class _Bags:
    """The ids of one feature in one chunk, by popularity rank; `lengths` None means one a row."""

    ranks: _Ints
    lengths: _Ints | None


@dataclass(frozen=True)
class _Chunk:
    bags: list[_Bags]
    counts: _Floats  # rows x dense; NaN where missing
    clicks: _Floats  # uniform: a row is clicked where this is below its probability


def synthesize(
    out: Path,
    *,
    features: Sequence[SyntheticFeature],
    dense: Sequence[str],
    label: str = "label",
    train_rows: int,
    test_rows: int,
    seed: int = 0,
    zipf: float = 1.1,
    row_group_rows: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> DatasetInfo:
    """Write a data set drawn from the click model of `seed`; the same seed, the same bytes.

    Ids are Zipf-distributed with exponent `zipf` (0 is uniform), but those of features with a
    reuse histogram. `on_progress` is given the number of rows done so far.
    """
    _check_request(features, dense, label, train_rows, test_rows, seed, zipf)
    world = _World(features, dense, label, seed, zipf)
    scores, done = Scores(), 0

    def tables(stream: int, rows: int) -> Iterator[pa.Table]:
        nonlocal done
        for number, start in enumerate(range(0, rows, _CHUNK_ROWS)):
            chunk = world.draw(stream, number, min(_CHUNK_ROWS, rows - start))
            table, logits = world.table(chunk)
            if stream == _TEST:
                scores.add(logits, table[label].to_numpy())
            yield table
            done += table.num_rows
            if on_progress is not None:
                on_progress(done)

    rows = {"train": train_rows} | ({"test": test_rows} if test_rows else {})
    with new_dataset(out, overwrite=overwrite) as folder:
        for split, stream, count in (("train", _TRAIN, train_rows), ("test", _TEST, test_rows)):
            size = default_row_group_rows(count) if row_group_rows is None else row_group_rows
            write_split(folder, split, tables(stream, count), row_group_rows=size)
        info = DatasetInfo(
            format="synthetic",
            rows=rows,
            label=label,
            dense=list(dense),
            sparse=[feature.name for feature in features],
            best_reachable=scores.best_reachable(),
        )
        write_info(folder, info)
    return info


def _check_request(
    features: Sequence[SyntheticFeature],
    dense: Sequence[str],
    label: str,
    train_rows: int,
    test_rows: int,
    seed: int,
    zipf: float,
) -> None:
    names = [label, *dense, *(feature.name for feature in features)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"column {', '.join(twice)} is named twice: each needs its own name")
    if not features:
        raise RequestError("no sparse features: name at least one")
    if train_rows < 1 or test_rows < 0:
        raise RequestError(
            f"{train_rows} train rows and {test_rows} test rows: at least 1 and 0 are needed"
        )
    if not (zipf >= 0 and np.isfinite(zipf)):
        raise RequestError(f"zipf is {zipf}: it must be 0 (uniform) or more")
    if seed < 0:
        raise RequestError(f"seed is {seed}: it must be 0 or more")
    for feature in features:
        if not 1 <= feature.num_embeddings <= _MAX_NUM_EMBEDDINGS:
            raise RequestError(
                f"feature {feature.name}: num_embeddings is {feature.num_embeddings}, it must be "
                f"1 to {_MAX_NUM_EMBEDDINGS}"
            )
        if not (feature.pooling_factor > 0 and np.isfinite(feature.pooling_factor)):
            raise RequestError(
                f"feature {feature.name}: pooling_factor is {feature.pooling_factor}, it must be "
                "more than 0"
            )


class _World:
    """The columns' distributions and the click model: all that a seed decides before any row."""

    def __init__(
        self,
        features: Sequence[SyntheticFeature],
        dense: Sequence[str],
        label: str,
        seed: int,
        zipf: float,
    ) -> None:
        self._features, self._dense, self._label = features, dense, label
        self._seed, self._zipf = seed, zipf
        random = self._generator(_MODEL, 0)
        self._scrambles = [scramble(f.num_embeddings, random) for f in features]
        self._log_mean = random.uniform(0.5, 3.0, len(dense))
        self._log_std = random.uniform(0.6, 1.4, len(dense))
        self._model = ClickModel(len(features), len(dense), random)
        calibration = [
            self._inputs(self.draw(_CALIBRATION, number, _CHUNK_ROWS))
            for number in range(_CALIBRATION_CHUNKS)
        ]
        effects, counts = (np.concatenate(parts) for parts in zip(*calibration, strict=True))
        self._model.calibrate(effects, counts)

    def _generator(self, stream: int, number: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(stream, number))
        return np.random.Generator(np.random.PCG64(sequence))

    def draw(self, stream: int, number: int, rows: int) -> _Chunk:
        random = self._generator(stream, number)
        bags = [self._draw_bags(feature, rows, random) for feature in self._features]
        shape = (rows, len(self._dense))
        counts = np.floor(np.exp(random.normal(self._log_mean, self._log_std, shape)))
        for column in range(0, len(self._dense), _NULL_EVERY):
            counts[random.random(rows) < _NULL_SHARE, column] = np.nan
        return _Chunk(bags, counts, random.random(rows))

    def _draw_bags(
        self, feature: SyntheticFeature, rows: int, random: np.random.Generator
    ) -> _Bags:
        lengths = (
            None if feature.pooling_factor == 1 else random.poisson(feature.pooling_factor, rows)
        )
        ids = rows if lengths is None else int(lengths.sum())
        uniform, size = random.random(ids), feature.num_embeddings
        if feature.reuse_histogram is None:
            return _Bags(zipf_ranks(uniform, size, self._zipf), lengths)
        pooling_factor = feature.pooling_factor
        return _Bags(reuse_ranks(uniform, size, pooling_factor, feature.reuse_histogram), lengths)

    def _inputs(self, chunk: _Chunk) -> tuple[_Floats, _Floats]:
        """What the click model sees: each bag's mean effect, each count's logarithm."""
        effects = [
            bag_means(self._model.id_effects(feature, bags.ranks), bags.lengths)
            for feature, bags in enumerate(chunk.bags)
        ]
        return np.stack(effects, axis=1), np.log1p(chunk.counts)

    def table(self, chunk: _Chunk) -> tuple[pa.Table, _Floats]:
        """The chunk as a table, and the true logits of its rows."""
        logits = self._model.logits(*self._inputs(chunk))
        clicked = chunk.clicks < 1 / (1 + np.exp(-logits))
        columns: dict[str, pa.Array] = {self._label: pa.array(clicked.astype(np.int8))}
        for index, name in enumerate(self._dense):
            column = chunk.counts[:, index]
            present = np.nan_to_num(column).astype(np.int32)
            columns[name] = pa.array(present, mask=np.isnan(column))
        for feature, bags, (multiplier, offset) in zip(
            self._features, chunk.bags, self._scrambles, strict=True
        ):
            ids = (bags.ranks * multiplier + offset) % feature.num_embeddings
            columns[feature.name] = _id_column(ids, bags.lengths)
        return pa.table(columns), logits


def zipf_ranks(uniform: _Floats, size: int, exponent: float) -> _Ints:
    """Ranks in [0, size) with P(rank) about (rank + 1) ** -exponent: a bounded power law's CDF
    inverted, which needs no table of `size` entries."""
    end = np.log(size + 1.0)
    if exponent == 1:
        log_rank = uniform * end
    else:
        power = 1 - exponent
        log_rank = np.log1p(uniform * np.expm1(power * end)) / power
    ranks: _Ints = np.clip(np.exp(log_rank).astype(np.int64) - 1, 0, size - 1)
    return ranks


def scramble(size: int, random: np.random.Generator) -> tuple[int, int]:
    """(multiplier, offset) of `id = (rank * multiplier + offset) % size`, a bijection.

    A multiplier near the golden section of `size` spreads the hottest ranks evenly over the
    table, so that no shard of consecutive rows gets them all.
    """
    multiplier = max(1, int(size * _GOLDEN))
    while np.gcd(multiplier, size) != 1:
        multiplier += 1
    return multiplier, int(random.integers(size))


def bag_means(effects: _Floats, lengths: _Ints | None) -> _Floats:
    """The mean of each bag; 0 for an empty one."""
    if lengths is None:
        return effects
    ends = np.cumsum(lengths)
    sums = np.concatenate([[0.0], np.cumsum(effects)])
    means: _Floats = (sums[ends] - sums[ends - lengths]) / np.maximum(lengths, 1)
    return means


def _id_column(ids: _Ints, lengths: _Ints | None) -> pa.Array:
    if lengths is None:
        return pa.array(ids)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
