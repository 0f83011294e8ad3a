"""Parquet files to finished batches: rows a second of one core, next to how others do it.

    python -m benchmarks.ingest --markdown benchmarks/results/ingest.md

Files are in the page cache. Each way runs in a process of its own on one core, three times over all
rows; the best counts, so that what the machine does besides counts least. The limit is
`pyarrow.parquet` decoding the same columns and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

if not __package__:  # started as a file: its own folder must not hide the package `planner`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 8192
LABEL = "label"
DENSE = [f"I{i}" for i in range(1, 14)]
SPARSE = [f"C{i}" for i in range(1, 27)]
# Ids of each feature in a row, of MLPerf DLRM-DCNv2 (214 in all).
MULTI_HOT = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]
WIDTHS = {"scalar": [1] * 26, "multi_hot": MULTI_HOT}
ROWS = {"scalar": 1 << 20, "multi_hot": 1 << 17}
SIZES = (100, 10_000, 1_000_000)  # rows of the tables, in turn
EPOCHS = 3
MEMORY_ROWS = 20 << 20


class Row(NamedTuple):
    """One way to read, measured; seconds are of the core, for all rows."""

    schema: str
    way: str
    rows: int
    file_bytes: int
    seconds: float | None
    note: str = ""


# --- The data


def draw(folder: Path, schema: str) -> None:
    """Zipf-like ids, counts of which a tenth are null."""
    from shardemb.data.dataset import write_split

    generator = np.random.default_rng(0)

    def ids(rows: int, size: int) -> np.ndarray:
        return ((size + 1.0) ** generator.random(rows) - 1).astype(np.int64)

    def chunk(rows: int) -> pa.Table:
        columns = {LABEL: pa.array(generator.integers(0, 2, rows).astype(np.int8))}
        for name in DENSE:
            counts = np.exp(generator.normal(2, 1.5, rows)).astype(np.int32)
            columns[name] = pa.array(counts, mask=generator.random(rows) < 0.1)
        for index, (name, width) in enumerate(zip(SPARSE, WIDTHS[schema], strict=True)):
            values = pa.array(ids(rows * width, SIZES[index % len(SIZES)]))
            if schema == "multi_hot":
                offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
                values = pa.ListArray.from_arrays(offsets, values)
            columns[name] = values
        return pa.table(columns)

    write_split(folder, "train", (chunk(1 << 16) for _ in range(ROWS[schema] >> 16)))


# --- The ways; each gives the numbers of rows of its batches


def limit(folder: Path, schema: str) -> Iterator[int]:
    """pyarrow decodes the columns, row group by row group."""
    for path in sorted(folder.rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, use_threads=False).num_rows


def one_copy(folder: Path, schema: str) -> Iterator[int]:
    """As `limit`, with page checksums verified; each column is copied once and nothing checked."""
    targets: dict[tuple[str, int], np.ndarray] = {}
    for path in sorted(folder.rglob("*.parquet")):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                for name, column in zip(table.column_names, table.columns, strict=True):
                    chunk = column.chunk(0)
                    values = chunk.flatten() if schema == "multi_hot" and name in SPARSE else chunk
                    kind = values.type.to_pandas_dtype()
                    numbers = np.frombuffer(values.buffers()[1], kind, len(values))
                    target = targets.setdefault((name, len(values)), np.empty_like(numbers))
                    np.copyto(target, numbers)
                yield table.num_rows


def ours(folder: Path, schema: str, **options: object) -> Iterator[int]:
    """shardemb's reader."""
    from shardemb.data.parquet import ParquetReader
    from shardemb.data.schema import BatchSchema, FeatureSchema

    ids, transform = options.pop("ids", "as_is"), options.pop("transform", "none")
    features = tuple(
        FeatureSchema(name, name, SIZES[index % len(SIZES)], column=name, ids=ids)
        for index, name in enumerate(SPARSE)
    )
    reader = ParquetReader(
        folder / "train",
        BatchSchema(LABEL, tuple(DENSE), transform, features=features),
        batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
        **options,
    )
    for batch in reader.epoch():
        yield batch.global_rows


def data_loader(folder: Path, schema: str) -> Iterator[int]:
    """torch's DataLoader over an IterableDataset that goes through pyarrow's batches."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset
    from torchrec import KeyedJaggedTensor

    class Batches(IterableDataset):
        def __iter__(self):
            for path in sorted(folder.rglob("*.parquet")):
                for rows in pq.ParquetFile(path).iter_batches(BATCH_SIZE, use_threads=False):
                    yield self.convert(rows)

        def convert(self, rows):
            numbers = [rows[name].to_numpy(zero_copy_only=False) for name in DENSE]
            dense = torch.nan_to_num(torch.tensor(np.stack(numbers, axis=1), dtype=torch.float32))
            values, lengths = [], []
            for name in SPARSE:
                column = rows[name]
                if schema == "multi_hot":
                    values.append(torch.tensor(column.flatten().to_numpy()))
                    lengths.append(torch.tensor(column.value_lengths().to_numpy()))
                else:
                    values.append(torch.tensor(column.to_numpy()))
                    lengths.append(torch.ones(len(column), dtype=torch.int32))
            sparse = KeyedJaggedTensor(SPARSE, torch.cat(values), lengths=torch.cat(lengths))
            labels = torch.tensor(rows[LABEL].to_numpy(), dtype=torch.float32)
            return dense, sparse, labels

    for _, _, labels in DataLoader(Batches(), batch_size=None):
        yield len(labels)


def pandas_loader(folder: Path, schema: str) -> Iterator[int]:
    """torch's DataLoader over pandas frames, as tutorials write it."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset
    from torchrec import KeyedJaggedTensor

    class Batches(IterableDataset):
        def __iter__(self):
            for path in sorted(folder.rglob("*.parquet")):
                for rows in pq.ParquetFile(path).iter_batches(BATCH_SIZE, use_threads=False):
                    yield self.convert(rows.to_pandas())

        def convert(self, frame):
            dense = torch.tensor(frame[DENSE].fillna(0).to_numpy(np.float32))
            labels = torch.tensor(frame[LABEL].to_numpy(np.float32))
            if schema == "multi_hot":
                values = [torch.tensor(np.concatenate(frame[name].to_numpy())) for name in SPARSE]
                lengths = [torch.tensor(frame[name].map(len).to_numpy()) for name in SPARSE]
            else:
                values = [torch.tensor(frame[name].to_numpy()) for name in SPARSE]
                lengths = [torch.ones(len(frame), dtype=torch.int64)] * len(SPARSE)
            sparse = KeyedJaggedTensor(SPARSE, torch.cat(values), lengths=torch.cat(lengths))
            return dense, sparse, labels

    for _, _, labels in DataLoader(Batches(), batch_size=None):
        yield len(labels)


def ray_data(folder: Path, schema: str) -> Iterator[int]:
    """Ray Data's iter_torch_batches: columns as tensors, not yet one KeyedJaggedTensor."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_parquet(str(folder / "train"))
    for batch in data.iter_torch_batches(batch_size=BATCH_SIZE):
        yield len(batch[LABEL])


WAYS: dict[str, Callable[[Path, str], Iterator[int]]] = {
    "limit: pyarrow alone": limit,
    "pyarrow with checksums, columns copied once": one_copy,
    "shardemb": ours,
    "shardemb, shuffled": lambda folder, schema: ours(folder, schema, shuffle=True),
    "shardemb, ids hashed, counts to logs": lambda folder, schema: ours(
        folder, schema, ids="hash", transform="log"
    ),
    "torch DataLoader over pyarrow": data_loader,
    "torch DataLoader over pandas": pandas_loader,
    "Ray Data iter_torch_batches": ray_data,
}


def time_epochs(folder: Path, schema: str, way: str) -> None:
    """In a process of its own: prints the seconds of the best epoch."""
    import torch

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    seconds = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        rows = sum(WAYS[way](folder, schema))
        seconds.append(time.perf_counter() - began)
        assert rows == ROWS[schema], f"{rows} rows instead of {ROWS[schema]}"
    print(json.dumps(min(seconds)))


def peak_memory(folder: Path) -> None:
    """In a process of its own: reads its files many times over as one data set, and prints the rows
    and the MiB that were resident at most, and before."""
    from shardemb.data.parquet import ParquetReader
    from shardemb.data.schema import BatchSchema, FeatureSchema
    from shardemb.data.sources import parquet_files

    features = tuple(FeatureSchema(name, name, max(SIZES), column=name) for name in SPARSE)
    schema = BatchSchema(LABEL, tuple(DENSE), features=features)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = parquet_files(folder) * (MEMORY_ROWS // ROWS["scalar"])
    reader = ParquetReader(files, schema, batch_size=BATCH_SIZE, rank=0, world_size=1, shuffle=True)
    rows = sum(batch.global_rows for batch in reader.epoch())
    print(json.dumps([rows, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure_memory(folder: Path) -> str:
    code = "import sys; from pathlib import Path; from benchmarks.ingest import peak_memory; "
    code += "peak_memory(Path(sys.argv[1]))"
    line = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    rows, before, peak = json.loads(done.stdout.splitlines()[-1])
    return (
        f"## Memory\n\nA rank that reads {rows:,} rows of the scalar files, shuffled, has "
        f"{peak:,.0f} MiB resident at most, {before:,.0f} of them before it begins.\n"
    )


def measure(folder: Path, schema: str, way: str, core: int) -> Row:
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    row = Row(schema, way, ROWS[schema], size, None)
    for package, word in (("ray", "Ray"), ("pandas", "pandas")):
        if word in way and not find_spec(package):
            return row._replace(note=f"{package} is not installed")
    code = "import sys; from pathlib import Path; from benchmarks.ingest import time_epochs; "
    code += "time_epochs(Path(sys.argv[1]), *sys.argv[2:])"
    line = ["taskset", "-c", str(core), sys.executable, "-c", code, str(folder), schema, way]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return row._replace(note=done.stderr.strip().splitlines()[-1])
    return row._replace(seconds=float(done.stdout.splitlines()[-1]))


def to_markdown(rows: list[Row]) -> str:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    names = [name for name in ("pyarrow", "torch", "torchrec", "pandas", "ray") if find_spec(name)]
    lines = [
        "# From Parquet to batches",
        f"One core of {models[0].partition(': ')[2] if models else platform.machine()}, Python "
        f"{platform.python_version()}, {', '.join(f'{n} {version(n)}' for n in names)}; batches of "
        f"{BATCH_SIZE} rows, files in the page cache, the best of {EPOCHS} epochs.",
    ]
    for schema, widths in WIDTHS.items():
        own = [row for row in rows if row.schema == schema]
        if not own:
            continue
        best = next(row.seconds for row in own if row.way.startswith("limit"))
        lines += [
            f"## {schema}",
            f"A label, {len(DENSE)} counts, {len(SPARSE)} features with {sum(widths)} ids a row; "
            f"{own[0].rows:,} rows in {own[0].file_bytes / 2**20:.0f} MiB.",
            "| way | seconds | rows/s | MB/s of tensors | of the limit |\n"
            "| --- | ---: | ---: | ---: | ---: |\n"
            + "\n".join(_line(row, best, sum(widths)) for row in own),
        ]
    return "\n\n".join(lines) + "\n"


def _line(row: Row, best: float | None, width: int) -> str:
    if row.seconds is None:
        return f"| {row.way} | {row.note} | - | - | - |"
    bytes_of_row = 8 * width + 4 * (len(DENSE) + 1)
    share = f"{best / row.seconds:.2f}" if best else "-"
    return (
        f"| {row.way} | {row.seconds:.3f} | {row.rows / row.seconds:,.0f} | "
        f"{row.rows * bytes_of_row / row.seconds / 1e6:,.0f} | {share} |"
    )


def main(
    schemas: Annotated[str, typer.Option(help="of scalar, multi_hot")] = "scalar,multi_hot",
    core: Annotated[int, typer.Option(help="the core to read on")] = min(os.sched_getaffinity(0)),
    markdown: Annotated[Path | None, typer.Option(help="write the tables here")] = None,
) -> None:
    """Measure how fast batches are made of Parquet files."""
    rows, memory = [], ""
    with tempfile.TemporaryDirectory() as folder:
        for schema in schemas.split(","):
            data = Path(folder) / schema
            data.mkdir()
            draw(data, schema)
            for way in WAYS:
                rows.append(measure(data, schema, way, core))
                print(*rows[-1], file=sys.stderr)
            if schema == "scalar":
                memory = measure_memory(data)
    text = "\n".join([to_markdown(rows), memory])
    print(text)
    if markdown:
        markdown.write_text(text)


if __name__ == "__main__":
    typer.run(main)
