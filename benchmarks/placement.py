"""Measured step times of placements: ours, published rules, TorchRec's planner.

    python -m benchmarks.placement TABLES... --cost profile.json \
        --markdown benchmarks/results/placement.md

A task is some tables of a list, drawn at random, their rows capped so that all fit here (as in
DreamShard, Zha et al., 2022). Every plan of a task is run by the same gloo ranks, forward and
backward with the optimizer, with random ids of the tables' pooling and reuse; all are run once in
random order, then once more in another. A plan's time is the mean of the two medians.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

if not __package__:  # started as a file: its own folder must not hide the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from rich.console import Console
from scipy.stats import kendalltau

from launch.local import run_workers
from planner import Plan, PlannerError, TableSpec, Topology
from planner.hardware import preset
from planner.request import PlanRequest, learned_cost, plan_list
from planner.table_list import TableList, load_table_list
from planner.torchrec_json import import_torchrec

OURS, DREAMSHARD, TORCHREC = "shardemb", "dreamshard", "TorchRec's planner"
RULES = ("random", "size_greedy", "dim_greedy", "lookup_greedy", "size_lookup_greedy")
METHODS = (*RULES, TORCHREC, DREAMSHARD, OURS)
ROUNDS = 2
MOST_ROWS_BYTES = 1536 * 2**20  # of all tables of a task
RESAMPLES = 10_000  # for intervals of means


@dataclass(frozen=True)
class Row:
    """One plan of one task."""

    ranks: int
    tables: int
    task: int
    method: str
    step_ms: float | None  # None: no plan
    rounds_ms: tuple[float, ...] = ()
    predicted_ms: float | None = None


def draw_tasks(
    lists: Sequence[TableList], counts: Sequence[int], tasks: int, seed: int
) -> Iterator[tuple[int, int, tuple[TableSpec, ...]]]:
    """(tables, number, the tables), each task from the next list."""
    for count in counts:
        for task in range(tasks):
            generator = np.random.default_rng([seed, count, task])
            listed = lists[task % len(lists)].tables
            chosen = generator.choice(len(listed), count, replace=count > len(listed))
            named = (
                listed[i].model_copy(update={"name": f"t{n}", "feature_names": ()})
                for n, i in enumerate(chosen)
            )
            yield count, task, _capped(tuple(named))


def _capped(tables: tuple[TableSpec, ...]) -> tuple[TableSpec, ...]:
    """With as many rows at most as makes all of them fit."""
    most = max(table.num_embeddings for table in tables)
    while sum(min(t.num_embeddings, most) * t.embedding_dim * 4 for t in tables) > MOST_ROWS_BYTES:
        most = int(most * 0.9)
    return tuple(
        table.model_copy(update={"num_embeddings": min(table.num_embeddings, most)})
        for table in tables
    )


def plan_by(
    method: str, tables: tuple[TableSpec, ...], topology: Topology, cost: str, batch_size: int
) -> Plan | None:
    """None where the method has no plan."""
    listed = TableList(tables=tables, batch_size_per_rank=batch_size)
    if method == TORCHREC:
        return _torchrec_plan(tables, topology, batch_size)
    search = "auto" if method == OURS else method
    try:
        return plan_list(listed, topology, PlanRequest(cost=cost, search=search))
    except PlannerError:
        return None


def _torchrec_plan(
    tables: tuple[TableSpec, ...], topology: Topology, batch_size: int
) -> Plan | None:
    """Of what TorchRec offers for CPUs, where this is one."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    from benchmarks.torchrec_planner import problem
    from shardemb.sharding.torchrec_plan import torchrec_to_json

    devices = topology.world_size
    collection, planner = problem(tables, 1, devices, batch_size, compute_device="cpu")
    plan = planner.plan(collection, [EmbeddingBagCollectionSharder()])
    found = import_torchrec(torchrec_to_json(plan), tables, topology)
    return found.model_copy(update={"batch_size": batch_size})


def measure(
    plans: dict[str, Path], ranks: int, repetitions: int, seed: int
) -> dict[str, list[float]]:
    """Milliseconds of a step under each plan, once a round."""
    generator = np.random.default_rng(seed)
    order = [name for _ in range(ROUNDS) for name in generator.permutation(list(plans))]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.jsonl"
        paths = [str(plans[name]) for name in order]
        arguments = ["cpu", str(out), str(repetitions), *paths]
        run_workers(["-m", "shardemb.profiler.plan_worker", *arguments], ranks)
        found = [json.loads(line)["step"] for line in out.read_text().splitlines()]
    times: dict[str, list[float]] = {name: [] for name in plans}
    for name, ms in zip(order, found, strict=True):
        times[name].append(ms)
    return times


def compare(
    tasks: Sequence[tuple[int, int, tuple[TableSpec, ...]]],
    ranks: int,
    cost: str,
    methods: Sequence[str],
    batch_size: int,
    repetitions: int,
) -> Iterator[Row]:
    """All methods on all tasks; the workers are started once for all plans of a task size."""
    topology = Topology(world_size=ranks, local_world_size=ranks, hardware=preset("cpu"))
    model = learned_cost(cost, batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        plans: dict[str, Plan | None] = {}
        for count, task, tables in tasks:
            for method in methods:
                plan = plan_by(method, tables, topology, cost, batch_size)
                plans[f"{count}-{task}-{method}"] = plan
        paths = {name: saved(plan, Path(scratch)) for name, plan in plans.items() if plan}
        times = measure(paths, ranks, repetitions, seed=ranks)
    for count, task, _ in tasks:
        for method in methods:
            name = f"{count}-{task}-{method}"
            plan, found = plans[name], times.get(name, [])
            mean = float(np.mean(found)) if found else None
            predicted = model.estimate(with_hardware(plan, ranks)).step_ms if plan else None
            yield Row(ranks, count, task, method, mean, tuple(found), predicted)


def saved(plan: Plan, folder: Path) -> Path:
    path = folder / f"{plan.fingerprint}.json"
    plan.save(path)
    return path


def with_hardware(plan: Plan, ranks: int) -> Plan:
    topology = Topology(world_size=ranks, local_world_size=ranks, hardware=preset("cpu"))
    return plan.model_copy(update={"topology": topology})


def markdown(rows: Sequence[Row], heading: str) -> str:
    """For each number of ranks and tables the mean step, and how much longer than ours it is."""
    lines = ["# Measured placements", "", heading, ""]
    for ranks in sorted({row.ranks for row in rows}):
        own = [row for row in rows if row.ranks == ranks]
        counts = sorted({row.tables for row in own})
        lines += [f"## {ranks} ranks", "", "Milliseconds a step, the mean over the tasks; in "]
        lines[-1] += "brackets the geometric mean of its ratio to ours with its 95% interval."
        lines += ["", "| method | " + " | ".join(f"{n} tables" for n in counts) + " | all |"]
        lines += ["|---|" + "---:|" * (len(counts) + 1)]
        for method in METHODS:
            if any(row.method == method for row in own):
                cells = [_cell(own, method, [n]) for n in counts] + [_cell(own, method, counts)]
                lines += [f"| {method} | " + " | ".join(cells) + " |"]
        lines += ["", _ranking(own), ""]
    return "\n".join(lines)


def _by_task(rows: Sequence[Row], method: str, counts: Sequence[int]) -> dict[Any, float]:
    return {
        (row.tables, row.task): row.step_ms
        for row in rows
        if row.method == method and row.tables in counts and row.step_ms is not None
    }


def _cell(rows: Sequence[Row], method: str, counts: Sequence[int]) -> str:
    found, ours = _by_task(rows, method, counts), _by_task(rows, OURS, counts)
    both = sorted(found.keys() & ours.keys())
    if not both:
        return "-"
    mean = np.mean([found[key] for key in both])
    if method == OURS:
        return f"{mean:.1f}"
    ratios = np.log([found[key] / ours[key] for key in both])
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios))).mean(axis=1)
    low, high = np.exp(np.quantile(draws, [0.025, 0.975]))
    return f"{mean:.1f} ({np.exp(ratios.mean()):.2f}, {low:.2f} to {high:.2f})"


def _ranking(rows: Sequence[Row]) -> str:
    """How well the profile orders the plans of a task, and what its choice loses."""
    taus, regrets, errors, scatter = [], [], [], []
    for key in sorted({(row.tables, row.task) for row in rows}):
        own = [r for r in rows if (r.tables, r.task) == key and r.step_ms and r.predicted_ms]
        measured = np.array([row.step_ms for row in own], dtype=float)
        predicted = np.array([row.predicted_ms for row in own], dtype=float)
        taus.append(kendalltau(measured, predicted).statistic)
        regrets.append(measured[predicted.argmin()] / measured.min() - 1)
        errors += list(np.abs(predicted / measured - 1))
        scatter += [abs(row.rounds_ms[0] / row.rounds_ms[1] - 1) for row in own]
    return (
        f"The profile's predictions of these plans are off by {100 * np.median(errors):.1f}% in "
        f"the median; the two rounds differ by {100 * np.median(scatter):.1f}%. Within a task "
        f"Kendall's tau of predicted and measured is {np.mean(taus):.2f} in the mean; the plan "
        f"predicted fastest takes {100 * np.mean(regrets):.1f}% longer than the fastest measured."
    )


def main(
    files: Annotated[list[Path], typer.Argument(metavar="TABLES...", help="table lists")],
    cost: Annotated[str, typer.Option(help="a profile of this machine")] = "cpu-2core",
    counts: Annotated[str, typer.Option(metavar="N,...", help="tables")] = "20,30,40,50",
    tasks: Annotated[int, typer.Option(help="of each number of tables")] = 10,
    ranks: Annotated[str, typer.Option(metavar="N,...")] = "2,4",
    batch_size: Annotated[int, typer.Option(help="rows of a rank")] = 1024,
    repetitions: Annotated[int, typer.Option(help="steps that are timed, of each plan")] = 9,
    methods: Annotated[str, typer.Option(metavar="NAME,...")] = ",".join(METHODS),
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    lists = [load_table_list(path) for path in files]
    console = Console(stderr=True)
    rows: list[Row] = []
    for number in map(int, ranks.split(",")):
        drawn = list(draw_tasks(lists, [int(n) for n in counts.split(",")], tasks, seed=0))
        rows += compare(drawn, number, cost, methods.split(","), batch_size, repetitions)
        console.print(f"{number} ranks done")
    named = ", ".join(path.stem for path in files)
    heading = (
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; tables "
        f"of {named}; {batch_size} rows a rank, {tasks} tasks of each size; profile {cost}."
    )
    text = markdown(rows, heading)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if markdown_path:
        markdown_path.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
