"""Statistics of Parquet data, feature by feature, in constant memory.

The files' rows, one after the other, make batches; chunks of whole batches are counted apart, in
this process or on Ray, and their counts merged in order. So all engines have the same result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from planner import RequestError, UserError
from planner.tables import REUSE_BATCH_SIZE
from shardemb.config import RunConfig
from shardemb.data.statistics_counts import Counts
from shardemb.data.statistics_input import (
    Chunk,
    Columns,
    columns_of_config,
    columns_of_files,
    cut_into_chunks,
    find_files,
    read_batches,
    read_footers,
)
from shardemb.data.statistics_summary import DataStatistics, summarize

Engine = Literal["local", "ray"]


def collect_statistics(
    paths: Sequence[str | Path],
    config: RunConfig | None = None,
    *,
    batch_size: int = REUSE_BATCH_SIZE,
    max_rows: int | None = None,
    engine: Engine = "local",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataStatistics:
    """Statistics of the Parquet files that `paths` (files, folders, globs) name.

    With a config, features, tables and dense columns are its own; without one, columns of integers
    or strings, or lists of them, are sparse features, and other numbers are dense. Reuse histograms
    are of batches of `batch_size` rows. Of more than `max_rows` rows the first are counted.
    `on_progress` is given the number of rows done so far, and of all.
    """
    files = find_files(paths)
    footers = read_footers(files)
    columns = columns_of_files(footers) if config is None else columns_of_config(config, footers)
    groups = [group for footer in footers for group in footer.groups]
    chunks = cut_into_chunks(groups, batch_size, max_rows)
    total = sum(part.stop - part.start for chunk in chunks for part in chunk)
    count_all = _count_here if engine == "local" else _count_on_ray
    counts = Counts(columns, batch_size)
    for counted in count_all(chunks, columns, batch_size):
        counts.merge(counted)
        on_progress(counts.rows, total)
    return summarize(counts, [str(file) for file in files], config)


def _count(chunk: Chunk, columns: Columns, batch_size: int) -> Counts:
    counts = Counts(columns, batch_size)
    for batch in read_batches(chunk, columns.names, batch_size):
        counts.add(batch)
    return counts


def _count_here(chunks: Sequence[Chunk], columns: Columns, batch_size: int) -> Iterator[Counts]:
    return (_count(chunk, columns, batch_size) for chunk in chunks)


def _count_on_ray(chunks: Sequence[Chunk], columns: Columns, batch_size: int) -> Iterator[Counts]:
    """In the order of the chunks, though many are counted at a time."""
    try:
        import ray
    except ImportError as error:
        raise RequestError(
            "--engine ray needs Ray, which is not installed: pip install ray, or leave the option "
            "out to count in this process"
        ) from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    task, most = ray.remote(_count), 2 * int(ray.cluster_resources().get("CPU", 1))
    running: deque[ray.ObjectRef] = deque()
    try:
        for chunk in chunks:
            running.append(task.remote(chunk, columns, batch_size))
            if len(running) == most:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None  # Ray's own message is the worker's traceback
        raise
