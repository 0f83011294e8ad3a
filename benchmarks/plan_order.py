"""Whether cost models put plans into the order that they are measured in.

    python -m benchmarks.plan_order TABLES... --cost profile.json \
        --markdown benchmarks/results/plan_order.md

For each task, tables of a list as in benchmarks.placement, random plans of all sharding types are
run, and Kendall's tau of predicted and measured steps is taken. Regret: of 20 of the plans, how
much longer than the fastest the one takes that is predicted to be the fastest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

if not __package__:  # started as a file: its own folder must not hide the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import typer
from scipy.stats import kendalltau

from benchmarks.placement import draw_tasks, measure, saved, with_hardware
from planner import Plan, TableSpec
from planner.cost.learned import LearnedCost
from planner.cost.predict import predict
from planner.request import cost_model
from planner.shards import Floats
from planner.table_list import load_table_list
from shardemb.profiler.workloads import random_plan

CANDIDATES = 20
DRAWS = 1000  # of so many of the plans, for the mean regret


class Found(NamedTuple):
    """One task."""

    ranks: int
    tables: int
    task: int
    measured: list[list[float]]  # [rounds][plans] ms
    predicted: dict[str, list[float]]  # by cost model


def run_task(
    ranks: int, task: int, tables: Sequence[TableSpec], models: Sequence[str], plans: int, rows: int
) -> Found:
    generator = np.random.default_rng([1, ranks, task])
    drawn = [
        with_hardware(random_plan(tables, ranks, generator), ranks).model_copy(
            update={"batch_size": rows}
        )
        for _ in range(plans)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        paths = {str(i): saved(plan, Path(scratch)) for i, plan in enumerate(drawn)}
        times = measure(paths, ranks, repetitions=7, seed=task)
    rounds = [[times[str(i)][n] for i in range(plans)] for n in range(2)]
    predicted = {name: [predicted_ms(plan, name, rows) for plan in drawn] for name in models}
    return Found(ranks, len(tables), task, rounds, predicted)


def predicted_ms(plan: Plan, name: str, rows: int) -> float:
    model = cost_model(name, rows)
    if isinstance(model, LearnedCost):
        return model.estimate(plan).step_ms
    step = predict(plan, model, rows).predicted.step_ms
    assert step is not None
    return step


def regret(predicted: Floats, measured: Floats) -> float:
    """The mean over draws of CANDIDATES plans."""
    generator, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        chosen = generator.choice(len(measured), min(CANDIDATES, len(measured)), replace=False)
        best = chosen[predicted[chosen].argmin()]
        found.append(measured[best] / measured[chosen].min() - 1)
    return float(np.mean(found))


def markdown(found: Sequence[Found], heading: str) -> str:
    lines = ["# The order of plans", "", heading, ""]
    lines += ["| ranks | tables | cost model | Kendall's tau | regret | median error |"]
    lines += ["|---:|---:|---|---:|---:|---:|"]
    for task in found:
        measured = np.mean(task.measured, axis=0)
        first, second = map(np.array, task.measured)
        again = kendalltau(first, second).statistic
        rows = [("measured once more", again, regret(first, second), first, second)]
        for name, values in task.predicted.items():
            predicted = np.array(values)
            tau = kendalltau(predicted, measured).statistic
            rows.append((Path(name).stem, tau, regret(predicted, measured), predicted, measured))
        for name, tau, lost, expected, actual in rows:
            error = np.median(np.abs(expected / actual - 1))
            cells = f"{tau:.2f} | {100 * lost:.1f}% | {100 * error:.0f}%"
            lines.append(f"| {task.ranks} | {task.tables} | {name} | {cells} |")
    return "\n".join([*lines, ""])


def main(
    files: Annotated[list[Path], typer.Argument(metavar="TABLES...", help="table lists")],
    cost: Annotated[str, typer.Option(help="a profile of this machine")] = "cpu-2core",
    counts: Annotated[str, typer.Option(metavar="N,...", help="tables")] = "20,50",
    ranks: Annotated[str, typer.Option(metavar="N,...")] = "2,4",
    plans: Annotated[int, typer.Option(help="of each task")] = 60,
    batch_size: Annotated[int, typer.Option(help="rows of a rank")] = 1024,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    lists = [load_table_list(path) for path in files]
    models = (cost, "analytic", "torchrec")
    tasks = list(draw_tasks(lists, [int(n) for n in counts.split(",")], 1, seed=1))
    found = []
    for number in map(int, ranks.split(",")):
        for _, task, tables in tasks:
            found.append(run_task(number, task, tables, models, plans, batch_size))
            print(markdown(found[-1:], ""), file=sys.stderr)  # the others take minutes more
    named = ", ".join(path.stem for path in files)
    heading = (
        f"{plans} random plans of each task, each run twice; tables of {named}; {batch_size} rows "
        f"a rank. Regret is the mean over draws of {CANDIDATES} of the plans."
    )
    text = markdown(found, heading)
    if json_path:
        json_path.write_text(json.dumps([task._asdict() for task in found]) + "\n")
    if markdown_path:
        markdown_path.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
