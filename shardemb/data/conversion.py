"""Text files -> a data set: read in blocks, count vocabularies, write parts.

Each step is made of pieces of work that leave one Parquet file each. What the pieces are follows
from the request alone, so the result depends neither on the number of processes nor on
interruptions: a piece whose file is finished is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from planner.errors import RequestError, UserError
from shardemb.data.convert_schema import VocabularySchema
from shardemb.data.dataset import (
    COMPRESSION,
    DatasetInfo,
    SplitWriter,
    VocabularyInfo,
    default_row_group_rows,
    part_file,
    read_info,
    rows_of_part,
    write_info,
)
from shardemb.data.splitting import Part, SplitRows, Staged, TestRows, split_rows
from shardemb.data.text_files import Block, LineError, Source, open_source, read_blocks
from shardemb.data.vocabulary import (
    Vocabulary,
    count_values,
    read_vocabulary,
    vocabulary_file,
    write_vocabulary,
)
from shardemb.data.workers import Workers
from shardemb.data.workspace import Workspace, finished_rows, resumable_dataset

# Looking values up takes a hash table of the vocabulary, made anew for each call: large calls.
_ENCODE_BYTES = 64 << 20

READING = "reading rows"

OnProgress = Callable[[str, int], None]


class LineFormat(Protocol):
    """How lines become rows: one row for each."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def has_header(self) -> bool: ...

    def check_header(self, header: bytes) -> None:
        """LineError where the header lacks something."""

    def parse(self, lines: bytes, header: bytes) -> pa.Table:
        """LineError names the first line that is wrong."""


@dataclass(frozen=True)
class Conversion:
    """All that the result depends on, but for the content of the files."""

    format: Literal["criteo", "csv", "jsonl", "tsv"]
    lines: LineFormat
    sources: tuple[Path, ...]
    label: str
    dense: tuple[str, ...]
    sparse: tuple[str, ...]
    test: TestRows = field(default_factory=TestRows)
    vocabularies: Mapping[str, VocabularySchema] = field(default_factory=dict)
    extends: Path | None = None  # a data set whose vocabularies' ids stay as they are
    row_group_rows: int | None = None


def convert(
    conversion: Conversion,
    out: Path,
    *,
    processes: int = 1,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> DatasetInfo:
    """Write the data set `out`. `on_progress` is given the step and how much of it is done.

    Takes room on disk for the rows twice, beside `out`; the memory does not grow with the rows.
    """
    report = on_progress or (lambda step, done: None)
    conversion.test.check()
    if conversion.row_group_rows is not None:
        rows_of_part(conversion.row_group_rows)
    sources = _open_sources(conversion)
    earlier = _earlier_vocabularies(conversion)
    request = f"{conversion}\n{sources}\n{earlier}\npyarrow {pa.__version__}\n"
    with (
        resumable_dataset(out, request, overwrite=overwrite) as workspace,
        Workers(processes) as workers,
    ):
        if workspace.resumed:
            report("continuing an interrupted conversion", 0)
        staged = _stage(conversion, sources, workspace, workers, report)
        splits = split_rows(staged, conversion.test, len(conversion.sources))
        _make_vocabularies(conversion, splits[0], workspace, workers, report)
        try:
            _write_parts(conversion, splits, workspace, workers, report)
        finally:
            _vocabularies.cache_clear()  # another conversion may write to the same folder
        info = _info(conversion, splits, workspace.dataset)
        write_info(workspace.dataset, info)
    return info


def _open_sources(conversion: Conversion) -> list[Source]:
    lines, sources = conversion.lines, []
    for path in (*conversion.sources, *conversion.test.sources):
        source = open_source(path, has_header=lines.has_header, block_bytes=lines.block_bytes)
        try:
            lines.check_header(source.header)
        except LineError as error:
            raise UserError(f"{path}, line {error.line}{error.problem}") from error
        sources.append(source)
    return sources


def _earlier_vocabularies(conversion: Conversion) -> list[tuple[Path, int]]:
    """The files that are extended, and when they were written; UserError where one cannot be."""
    if conversion.extends is None:
        return []
    if not conversion.vocabularies:
        raise RequestError("--extend: no feature has a vocabulary; declare one, or leave it out")
    info, files = read_info(conversion.extends), []
    for feature, schema in conversion.vocabularies.items():
        found = info.vocabularies.get(feature) if info else None
        if found is None:
            raise UserError(
                f"--extend: {conversion.extends} has no vocabulary of {feature}: name a data set "
                "that was converted with one"
            )
        if found.oov_rows != schema.oov_rows:
            raise UserError(
                f"--extend: {feature} has oov_rows: {found.oov_rows} in {conversion.extends}, and "
                f"{schema.oov_rows} here; rows stay where they are, so it must be the same"
            )
        path = vocabulary_file(conversion.extends, feature)
        files.append((path, path.stat().st_mtime_ns))
    return files


# ------------------------------------------------------------------ reading


def _stage(
    conversion: Conversion,
    sources: Sequence[Source],
    workspace: Workspace,
    workers: Workers,
    report: OnProgress,
) -> list[Staged]:
    """Parse all blocks. UserError names the first line that is wrong."""
    blocks = (
        block
        for index, source in enumerate(sources)
        for block in read_blocks(source, index, conversion.lines.block_bytes)
    )
    headers = [source.header for source in sources]
    parse = partial(_parse_block, conversion.lines, headers, workspace.staged)
    next_line = [source.first_line for source in sources]
    staged: list[Staged] = []
    done = 0
    for block, (rows, mistake) in workers.map(parse, blocks):
        if mistake:
            line = next_line[block.source] + mistake.line - 1
            raise UserError(f"{block.path}, line {line}{mistake.problem}")
        if rows:
            path = _staged_file(workspace.staged, block)
            staged.append(Staged(path, block.source, done, rows))
        next_line[block.source] += rows
        done += rows
        report(READING, done)
    for source, line in zip(sources, next_line, strict=True):
        source.check_unchanged()
        if line == source.first_line:
            raise UserError(f"{source.path} is empty: there are no rows to convert")
    if conversion.format == "jsonl":
        _check_keys(staged)
    return staged


def _check_keys(staged: Sequence[Staged]) -> None:
    """Lines of JSON need not have every key, so a misspelt one shows only after the last."""
    missing = set(pq.read_schema(staged[0].path).names)
    for each in staged:
        missing -= _keys_with_values(pq.read_metadata(each.path))
    if missing:
        raise UserError(f"no line has a value for the key {min(missing)}: correct the schema")


def _keys_with_values(metadata: pq.FileMetaData) -> set[str]:
    names = metadata.schema.to_arrow_schema().names
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = ((names[i], group.column(i)) for group in groups for i in range(len(names)))
    return {name for name, column in columns if column.statistics.null_count < column.num_values}


def _staged_file(folder: Path, block: Block) -> Path:
    return folder / f"{block.source:05d}-{block.number:07d}.parquet"


def _parse_block(
    lines: LineFormat, headers: Sequence[bytes], folder: Path, block: Block
) -> tuple[int, LineError | None]:
    """How many rows it has, or what is wrong with it."""
    path = _staged_file(folder, block)
    finished = finished_rows(path)
    if finished is not None:
        return finished, None
    try:
        text = block.read()
        if not text:
            return 0, None
        table = lines.parse(text, headers[block.source])
    except LineError as error:
        return 0, error
    pq.write_table(table, path, compression=COMPRESSION)
    return table.num_rows, None


# ------------------------------------------------------------------ vocabularies


def _make_vocabularies(
    conversion: Conversion,
    train: SplitRows,
    workspace: Workspace,
    workers: Workers,
    report: OnProgress,
) -> None:
    """Count each feature's values over all training rows: one feature is one piece of work."""
    count = partial(_make_vocabulary, conversion, train, workspace.dataset)
    for done, _ in enumerate(workers.map(count, conversion.vocabularies), start=1):
        report("counting values of features", done)


def _make_vocabulary(conversion: Conversion, train: SplitRows, dataset: Path, feature: str) -> None:
    path, schema = vocabulary_file(dataset, feature), conversion.vocabularies[feature]
    if finished_rows(path) is not None:
        return
    columns = (train.split.read(staged, [feature])[feature] for staged in train.staged)
    counts, earlier = count_values(columns), None
    if conversion.extends:
        before = vocabulary_file(conversion.extends, feature)
        earlier = read_vocabulary(before, schema).values
        if earlier.type != counts["value"].type:
            raise UserError(
                f"--extend: {before} has values of {earlier.type}, feature {feature} of "
                f"{counts['value'].type}; declare the same kind"
            )
    write_vocabulary(path, counts, schema, earlier)


# ------------------------------------------------------------------ writing


def _write_parts(
    conversion: Conversion,
    splits: Sequence[SplitRows],
    workspace: Workspace,
    workers: Workers,
    report: OnProgress,
) -> None:
    schemas = tuple(conversion.vocabularies.items())
    done = 0
    for rows in splits:
        size = conversion.row_group_rows or default_row_group_rows(rows.rows)
        write = partial(_write_part, workspace.dataset, schemas, size)
        for part, _ in workers.map(write, rows.parts(rows_of_part(size))):
            done += part.rows
            report("writing rows", done)


def _write_part(
    dataset: Path,
    schemas: tuple[tuple[str, VocabularySchema], ...],
    row_group_rows: int,
    part: Part,
) -> None:
    if finished_rows(part_file(dataset, part.split.name, part.number)) == part.rows:
        return
    sizes = {"row_group_rows": row_group_rows, "first_part": part.number}
    with SplitWriter(dataset, part.split.name, **sizes) as writer:
        for table in _gathered(part.tables()) if schemas else part.tables():
            writer.write(_encode(table, _vocabularies(dataset, schemas)))


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of a good size."""
    gathered: list[pa.Table] = []
    size = 0
    for table in tables:
        gathered.append(table)
        size += table.nbytes
        if size >= _ENCODE_BYTES:
            yield pa.concat_tables(gathered)
            gathered, size = [], 0
    if gathered:
        yield pa.concat_tables(gathered)


@lru_cache(maxsize=1)
def _vocabularies(
    dataset: Path, schemas: tuple[tuple[str, VocabularySchema], ...]
) -> dict[str, Vocabulary]:
    """Read once by each process."""
    return {
        feature: read_vocabulary(vocabulary_file(dataset, feature), schema)
        for feature, schema in schemas
    }


def _encode(table: pa.Table, vocabularies: Mapping[str, Vocabulary]) -> pa.Table:
    for feature, vocabulary in vocabularies.items():
        ids = vocabulary.encode(table[feature].combine_chunks())
        table = table.set_column(table.column_names.index(feature), feature, ids)
    return table


def _info(conversion: Conversion, splits: Sequence[SplitRows], dataset: Path) -> DatasetInfo:
    vocabularies = {
        feature: VocabularyInfo(
            size=read_vocabulary(vocabulary_file(dataset, feature), schema).size,
            oov_rows=schema.oov_rows,
        )
        for feature, schema in conversion.vocabularies.items()
    }
    return DatasetInfo(
        format=conversion.format,
        rows={rows.split.name: rows.rows for rows in splits},
        label=conversion.label,
        dense=list(conversion.dense),
        sparse=list(conversion.sparse),
        num_embeddings={f: v.size + v.oov_rows for f, v in vocabularies.items()},
        vocabularies=vocabularies,
    )
