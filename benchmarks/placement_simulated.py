"""Predicted steps of the plans of DreamShard's policy, the published rules and our planner.

    python -m benchmarks.placement_simulated --markdown benchmarks/results/placement_simulated.md

Nothing is measured but the time that planning takes: all plans are judged by what a shipped profile
predicts for them with whole kernels. Tasks are random tables of the synthetic lists, which no
policy has been trained with.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

if not __package__:  # started as a file: its own folder must not hide the package `planner`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console

from planner import Plan, PlannerError, TableSpec, Topology
from planner.cost.learned import LearnedCost
from planner.cost.profile import Profile
from planner.cost.shipped import shipped
from planner.hardware import preset
from planner.learned_plan import make_learned_plan
from planner.make_plan import make_plan
from planner.search.baselines import BASELINES, plan_by_baseline
from planner.search.dreamshard import plan_by_policy
from planner.table_list import load_table_list
from planner.torchrec_json import import_torchrec

ROOT = Path(__file__).resolve().parents[1]
LISTS = [f"synthetic_856_seed{seed}" for seed in range(3)]
PROFILE = "cpu-2core"
BATCH_SIZE = 64  # on each rank: on 256 ranks kernels look up as many rows as were measured at most
RANKS_A_HOST = 8
SIZES = [(8, 100), (8, 400), (64, 100), (64, 400), (256, 100), (256, 800)]
MEMORY_BYTES = 80 * 2**30  # of a rank, as TorchRec's planner is given
TORCHREC, TORCHREC_SIZES = "TorchRec's planner, tuned", [(8, 100)]
NAMES = {"dreamshard": "dreamshard", "search": "our search alone", "auto": "auto"}


class Task(NamedTuple):
    """Tables to place."""

    tables: tuple[TableSpec, ...]
    topology: Topology

    @property
    def size(self) -> tuple[int, int]:
        return self.topology.world_size, len(self.tables)


class Row(NamedTuple):
    """One plan; without `step_ms` there is none."""

    way: str
    size: tuple[int, int]  # ranks, tables
    step_ms: float | None
    cpu_seconds: float
    bound_ms: float | None = None


def draw_tasks(data: Path, size: tuple[int, int]) -> Iterator[Task]:
    """One of each list."""
    ranks, count = size
    hardware = preset("cpu").model_copy(update={"device_memory_bytes": MEMORY_BYTES})
    topology = Topology(world_size=ranks, local_world_size=RANKS_A_HOST, hardware=hardware)
    for seed, name in enumerate(LISTS):
        tables = load_table_list(data / f"{name}.json").tables
        chosen = np.random.default_rng(seed).choice(len(tables), count, replace=False)
        yield Task(tuple(tables[i] for i in sorted(chosen)), topology)


def rows_of(task: Task, model: LearnedCost) -> Iterator[Row]:
    """Of every way that runs in this process."""
    ways: dict[str, Callable[..., Plan]] = {
        **{name: partial(plan_by_baseline, name) for name in BASELINES},
        NAMES["dreamshard"]: plan_by_policy,
        NAMES["search"]: make_plan,
        NAMES["auto"]: make_learned_plan,
    }
    for way, make in ways.items():
        began = time.process_time()
        try:
            plan = make(task.tables, task.topology, model, BATCH_SIZE)
        except PlannerError:
            yield Row(way, task.size, None, time.process_time() - began)
            continue
        seconds = time.process_time() - began
        bound_ms = plan.predicted.bound_ms if make is make_learned_plan else None
        yield Row(way, task.size, model.estimate(plan).step_ms, seconds, bound_ms)


def torchrec_row(task: Task, model: LearnedCost) -> Row:
    """Its plan is by its own estimate; its seconds are those that it says."""
    shape = f"{task.topology.num_hosts}x{RANKS_A_HOST}"
    with tempfile.TemporaryDirectory() as folder:
        tables, out = Path(folder) / "tables.json", Path(folder) / "plan.json"
        listed = [table.model_dump(mode="json", exclude_defaults=True) for table in task.tables]
        tables.write_text(json.dumps({"tables": listed}))
        command = [sys.executable, "-m", "benchmarks.torchrec_planner", str(tables), shape]
        subprocess.run([*command, str(BATCH_SIZE), "tuned", str(out)], cwd=ROOT, check=True)
        document = json.loads(out.read_text())
    plan = import_torchrec(document, list(task.tables), task.topology)
    return Row(TORCHREC, task.size, model.estimate(plan).step_ms, document["seconds"])


def sheet(rows: list[Row], sizes: list[tuple[int, int]], cell: Callable[[list[Row]], str]) -> str:
    """Ways by sizes."""
    head = " | ".join(f"{ranks} ranks, {tables} tables" for ranks, tables in sizes)
    lines = [f"| way | {head} |", "|---|" + "---:|" * len(sizes)]
    for way in dict.fromkeys(row.way for row in rows):
        own = [[row for row in rows if (row.way, row.size) == (way, size)] for size in sizes]
        lines.append(f"| {way} | " + " | ".join(map(cell, own)) + " |")
    return "\n".join(lines)


def step_cell(rows: list[Row]) -> str:
    found = [row.step_ms for row in rows if row.step_ms is not None]
    if not rows or not found:
        return "no plan" if rows else ""
    some = "" if len(found) == len(rows) else f" (of {len(found)})"
    return f"{statistics.median(found):.1f}{some}"


def seconds_cell(rows: list[Row]) -> str:
    return f"{statistics.median(row.cpu_seconds for row in rows):.1f}" if rows else ""


def bounds(rows: list[Row]) -> list[Row]:
    return [row._replace(way="bound", step_ms=row.bound_ms) for row in rows if row.bound_ms]


def main(
    data: Annotated[Path, typer.Option(help="folder of table lists")] = ROOT
    / "../shared/data/planner",
    with_torchrec: Annotated[bool, typer.Option(help="on the smallest; minutes each")] = False,
    most_ranks: Annotated[int, typer.Option(help="leave out tasks of more ranks")] = 256,
    markdown: Annotated[Path | None, typer.Option(help="write the tables here")] = None,
) -> None:
    """Plan in every way, and print what is predicted."""
    model = LearnedCost(Profile.load(shipped()[PROFILE]), BATCH_SIZE, PROFILE)
    sizes = [size for size in SIZES if size[0] <= most_ranks]
    rows: list[Row] = []
    for size in sizes:
        for task in draw_tasks(data, size):
            rows += rows_of(task, model)
            if with_torchrec and size in TORCHREC_SIZES:
                rows.append(torchrec_row(task, model))
            print(size, file=sys.stderr)
    timed = [row for row in rows if row.way in (*NAMES.values(), TORCHREC)]
    text = f"""# Placement, as predicted

The median of {len(LISTS)} tasks each: random tables of the synthetic lists, {BATCH_SIZE} rows a \
rank, {RANKS_A_HOST} ranks
a host, {MEMORY_BYTES // 2**30} GiB a rank, CPUs with the shipped profile {PROFILE}. No step was \
run: all plans are judged by
what the profile predicts with whole kernels. It was measured on sets of fewer tables than the
largest tasks give a rank here, and collectives over two ranks; links between hosts are the analytic
model's. (`all_table_row_wise` has no plan on one host: there it is row_wise.)

## Milliseconds a step

`auto` takes the best of the search, the policy and the rules; the search alone looks for the least
sums over shards, which are not what is predicted with whole kernels. The bound is that of the
search: of compute, and of communication as its sums charge it.

{sheet(rows + bounds(rows), sizes, step_cell)}

## Seconds to plan

CPU seconds of one process, `auto` with all that it chooses from; TorchRec's as its planner says.

{sheet(timed, sizes, seconds_cell)}
"""
    if markdown:
        markdown.write_text(text)
    Console(width=200).print(text, markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
