"""What a table begins with: the vectors of a file, and which row each is of. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from planner import RequestError, UserError
from shardemb.config import RunConfig
from shardemb.data.dataset import read_info
from shardemb.data.hashing import strings_to_ids
from shardemb.data.ids import is_text, load_vocabulary
from shardemb.data.sources import first_line
from shardemb.data.vector_blocks import Block, Ints, Place, VectorFile, Wanted
from shardemb.data.vector_files import open_vectors
from shardemb.data.vocabulary import vocabulary_path
from shardemb.pretrained_config import PretrainedConfig


@dataclass(frozen=True)
class Pretrained:
    """A table, and the file that its first values come from. UserErrors name both."""

    table: str
    num_embeddings: int
    embedding_dim: int
    config: PretrainedConfig
    vocabulary: str | None = None  # a file: its values' rows are those of the keys
    option: str | None = None  # where the user named the file, if not in tables.NAME.pretrained

    def check(self) -> None:
        """UserError for all that can be told without reading the vectors."""
        with self.told():
            file, dim = self._file, self.embedding_dim
            if file.dim != dim:
                raise UserError(
                    f"{file.path} has vectors of {file.dim}, the table has embedding_dim {dim}"
                )
            if self.vocabulary and not file.has_keys:
                raise UserError(
                    f"keys: vocabulary, but {file.path} has no keys; write them beside the "
                    "vectors, to a Parquet or a text file"
                )
            if not file.has_keys and (file.rows or 0) > self.num_embeddings:
                raise UserError(
                    f"{file.path} has {file.rows} rows, the table {self.num_embeddings}; raise "
                    f"tables.{self.table}.num_embeddings"
                )

    def shape(self) -> tuple[int | None, int]:
        """How many vectors the file has, where it says so beforehand, and of how many columns."""
        with self.told():
            return self._file.rows, self._file.dim

    def read(self, any_of: Callable[[Ints], bool]) -> Iterator[Block]:
        """The whole file, some vectors at a time, of rows of the table or of -1 where the key is
        unknown; vectors only where `any_of` says so of their rows. To be used with `told`."""
        return self._file.blocks(Wanted(self._rows, any_of))

    @contextmanager
    def told(self) -> Iterator[None]:
        """What goes wrong in the block becomes a UserError that names the table."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._named}: cannot read {self.config.path} ({first_line(error)})"
            ) from error
        except UserError as error:
            raise type(error)(f"{self._named}: {error}") from error

    @property
    def _named(self) -> str:
        return self.option or f"tables.{self.table}.pretrained"

    @cached_property
    def _file(self) -> VectorFile:
        return open_vectors(
            self.config.path,
            self.embedding_dim,
            text_keys=self.vocabulary is not None and load_vocabulary(self.vocabulary).is_text,
            key_column=self.config.key_column,
            vectors=self.config.vectors,
        )

    def _rows(self, keys: pa.Array, place: Place) -> Ints:
        if self.vocabulary:
            vocabulary = load_vocabulary(self.vocabulary)
            if vocabulary.is_text:
                return vocabulary.ranks(strings_to_ids(keys).to_numpy())
            known, numbers = _integers(keys)
            rows = np.full(len(keys), -1)
            rows[known] = vocabulary.ranks(numbers)
            return rows
        known, rows = _integers(keys)
        if not known.all():
            raise UserError(
                f"{place(int(np.argmin(known)))}: the key {keys[int(np.argmin(known))]} is no "
                "integer; say keys: vocabulary to look it up in that of the table's feature"
            )
        outside = (rows < 0) | (rows >= self.num_embeddings)
        if outside.any():
            wrong = int(np.argmax(outside))
            raise UserError(
                f"{place(wrong)}: id {rows[wrong]} is outside the table, whose rows are 0 to "
                f"{self.num_embeddings - 1}; raise tables.{self.table}.num_embeddings"
            )
        return rows


def _integers(keys: pa.Array) -> tuple[NDArray[np.bool_], Ints]:
    """Which keys are integers, and these."""
    if not is_text(keys.type):
        return np.ones(len(keys), bool), keys.to_numpy().astype(np.int64)
    known = pc.match_substring_regex(keys, "^-?[0-9]{1,18}$")
    numbers = keys.filter(known).cast(pa.int64()).to_numpy()
    return known.to_numpy(zero_copy_only=False), numbers


def pretrained_tables(config: RunConfig) -> list[Pretrained]:
    """Those of the config that have a file; RequestError where keys have no vocabulary."""
    return [
        Pretrained(
            spec.name,
            spec.num_embeddings,
            spec.embedding_dim,
            pretrained,
            _vocabulary(config, spec.name) if pretrained.keys == "vocabulary" else None,
        )
        for spec in config.table_specs()
        if (pretrained := config.tables[spec.name].pretrained)
    ]


def _vocabulary(config: RunConfig, table: str) -> str:
    """The one that all features of the table have: their own, or that of their data set."""
    files = {}
    info = read_info(config.data.dir)
    for name in config.tables[table].feature_names or [table]:
        feature = config.feature(name)
        column = feature.column or name
        if feature.vocabulary:
            files[name] = feature.vocabulary
        elif feature.ids == "as_is" and info and column in info.vocabularies:
            files[name] = vocabulary_path(config.data.dir, column)
        else:
            raise RequestError(
                f"tables.{table}.pretrained.keys: vocabulary, but feature {name} has none, its ids "
                f"are {feature.ids}: name one with data.features.{name}.vocabulary, or say "
                "keys: rows"
            )
    if len(set(files.values())) > 1:
        listed = ", ".join(f"{file} (of {name})" for name, file in files.items())
        raise RequestError(
            f"tables.{table}.pretrained.keys: vocabulary, but the table's features have several: "
            f"{listed}; say keys: rows"
        )
    return files.popitem()[1]
