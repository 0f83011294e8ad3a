"""Saving a 4 GB table set: how fast, and how long training waits, next to plain file writing.

    python -m benchmarks.checkpoint --folder /tmp --markdown benchmarks/results/checkpoint.md

Two gloo ranks each write as many bytes as they hold of the tables to a file, in 8 MiB pieces, and
fsync it; then checkpoints of the same tables, several times in turn, so that what the disk does
besides falls on all alike.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

if not __package__:  # started as a file: its own folder must not hide the package `planner`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

ROOT = Path(__file__).resolve().parents[1]
TABLES, ROWS, DIM = 4, 4_000_000, 64
GIGABYTES = TABLES * ROWS * (DIM + 1) * 4 / 1e9  # row-wise Adagrad: one more float a row
WAYS = ("plain files", "asynchronous", "streaming")
RANKS, TURNS = 2, 3


def worker(folder: Path) -> None:
    """One rank: prints its measurements as JSON, a line each, where it is rank 0."""
    import torch
    import torch.distributed as dist
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

    from planner import ShardingRule, plan_by_rule
    from shardemb import current_topology, process_group, shard_model, tables_from_module
    from shardemb.checkpoint.checkpoints import Checkpoints
    from shardemb.trainer import Trainer

    class Tables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            configs = [
                EmbeddingBagConfig(
                    name=f"t{i}", num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"t{i}"]
                )
                for i in range(TABLES)
            ]
            self.tables = EmbeddingBagCollection(configs, device="meta")
            self.over = torch.nn.Linear(DIM, 1)

    with process_group("cpu"):
        model = Tables()
        rule = ShardingRule(sharding_type="row_wise")
        plan = plan_by_rule(tables_from_module(model), current_topology(), rule)
        trainer = Trainer(shard_model(model, plan))
        checkpoints = {
            way: Checkpoints(folder / way, keep_last=1, asynchronous=way == "asynchronous")
            for way in WAYS[1:]
        }
        checkpoints["asynchronous"].prepare(trainer)
        for turn in range(TURNS):
            for way in WAYS:
                trainer.step = turn + 1
                dist.barrier()
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                began = time.perf_counter()
                if way == "plain files":
                    write_plain(folder / f"plain-{dist.get_rank()}")
                    blocked = time.perf_counter() - began
                else:
                    checkpoints[way].save(trainer)
                    blocked = time.perf_counter() - began
                    checkpoints[way].wait()
                dist.barrier()
                seconds = time.perf_counter() - began
                more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                (folder / f"plain-{dist.get_rank()}").unlink(missing_ok=True)
                if dist.get_rank() == 0:
                    print(json.dumps([way, seconds, blocked, more / 1024]), flush=True)
        dist.barrier()
        began = time.perf_counter()
        checkpoints["streaming"].load(trainer)
        dist.barrier()
        if dist.get_rank() == 0:
            print(json.dumps(["load", time.perf_counter() - began, 0, 0]), flush=True)


def write_plain(path: Path) -> None:
    piece = bytes(8 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(int(GIGABYTES * 1e9 / RANKS / len(piece))):
            file.write(piece)
        os.fsync(file.fileno())


def measure(folder: Path) -> dict[str, list[list[Any]]]:
    line = ["torchrun", "--nproc_per_node", str(RANKS), __file__, "--worker", str(folder)]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[list[Any]]] = {}
    for way, *numbers in map(json.loads, done.stdout.splitlines()):
        found.setdefault(way, []).append(numbers)
    return found


def to_markdown(found: dict[str, list[list[Any]]]) -> str:
    plain = median(row[0] for row in found["plain files"])
    lines = [
        "# Checkpoints",
        f"{GIGABYTES:.2f} GB of tables and row-wise Adagrad's state on {RANKS} gloo ranks, one "
        f"disk, {platform.machine()}; medians of {TURNS} turns. Blocked: how long training waits. "
        "Memory: what a rank's peak rose by in the first turn, after the copy's was taken.",
        "| way | seconds | GB/s | of plain files | blocked s | of its seconds | MiB more |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        + "\n".join(_line(way, found[way], plain) for way in WAYS),
        f"Loaded, every block checked: {found['load'][0][0]:.2f} s, "
        f"{GIGABYTES / found['load'][0][0]:.2f} GB/s.",
    ]
    return "\n\n".join(lines) + "\n"


def _line(way: str, rows: list[list[Any]], plain: float) -> str:
    seconds, blocked = median(row[0] for row in rows), median(row[1] for row in rows)
    return (
        f"| {way} | {seconds:.2f} | {GIGABYTES / seconds:.2f} | {plain / seconds:.2f} | "
        f"{blocked:.2f} | {blocked / seconds:.1%} | {rows[0][2]:.0f} |"
    )


def main(
    folder: Annotated[Path | None, typer.Option(help="on the disk to measure")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the table here")] = None,
    worker_folder: Annotated[Path | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Measure how fast checkpoints are written, and how long training waits for them."""
    if worker_folder:
        worker(worker_folder)
        return
    own = Path(tempfile.mkdtemp(dir=folder))
    try:
        text = to_markdown(measure(own))
    finally:
        shutil.rmtree(own)
    print(text)
    if markdown:
        markdown.write_text(text)


if __name__ == "__main__":
    typer.run(main)
