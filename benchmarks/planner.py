"""Plans against a certified lower bound, the published rules and TorchRec's own planner.

    python -m benchmarks.planner --markdown benchmarks/results/planner.md

Each plan is made in a process of its own on one core. Its seconds are those from the start of the
process to its end, with plan.json written; CPU seconds are fewer where others use the core. All
plans are judged alike: by their devices, as planner.cost.predict sums TorchRec's estimate over the
shards.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

if not __package__:  # started as a file: its own folder must not hide the package `planner`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

from benchmarks.planner_sheets import (
    OURS,
    TORCHREC,
    Case,
    Row,
    Sheet,
    others_sheet,
    plans_sheet,
    rules_sheet,
    torchrec_sheet,
    wiki_sheet,
)
from planner import Plan, PlannerError
from planner.certificate import prove, verify
from planner.cost.predict import predict
from planner.cost.stages import STAGES
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.options import make_problem
from planner.plan import DevicePlan, HostPlan, Objective
from planner.search.baselines import BASELINES, plan_by_baseline
from planner.table_list import TableList, load_table_list
from planner.topology import parse_topology
from planner.torchrec_json import import_torchrec

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
SYNTHETIC = [f"synthetic_856_seed{seed}" for seed in range(3)]
BATCH_SIZE = 512  # of the synthetic tables, on each rank
# On 80 GB there is no room for what its two unpooled tables receive, which `others` shows.
WIKI, WIKI_TOPOLOGY = "torchrec_wiki_1935", "12x8xH200"
# Every other table list, with the batch size that it names, where it may and may not fit.
OTHERS = [
    ("nvidia_tiny", "1x8xA100-80GB"),
    ("nvidia_medium", "1x8xA100-40GB"),
    ("nvidia_medium", "1x8xA100-80GB"),
    ("mlperf_dlrm_dcnv2", "1x8xA100-40GB"),
    ("mlperf_dlrm_dcnv2", "2x8xA100-80GB"),
    ("hugectr_180table", "1x8xA100-80GB"),
    ("hugectr_180table", "2x8xA100-80GB"),
    ("hugectr_7table", "2x8xA100-80GB"),
    ("hugectr_7table", "8x8xA100-80GB"),
    *((name, "1x8xA100-80GB") for name in SYNTHETIC),
    (WIKI, "12x8xtorchrec-80GB"),
]

MAKE_PLAN = """
import sys
from pathlib import Path
from planner.cost.torchrec_estimate import TorchRecEstimate
from planner.feasibility import DoesNotFit
from planner.make_plan import make_plan
from planner.table_list import load_table_list
from planner.topology import parse_topology

tables, topology, batch_size, objective, out = sys.argv[1:]
batch_size = int(batch_size)
try:
    make_plan(
        load_table_list(tables).tables,
        parse_topology(topology),
        TorchRecEstimate(batch_size),
        batch_size,
        objective=objective,
    ).save(Path(out))
except DoesNotFit as error:
    sys.exit(error.summary)  # without remedies, which are looked for when they are asked for
finally:
    print(Path("/proc/self/status").read_text())
"""


class Ran(NamedTuple):
    """A process that ended; `error` is what it said if it failed."""

    seconds: float
    cpu_seconds: float
    peak_mib: float | None
    error: str | None


class Bench(NamedTuple):
    """What all measurements share."""

    data: Path
    core: int
    repeats: int
    timeout: float

    def path(self, name: str) -> Path:
        return self.data / f"{name}.json"

    def load(self, name: str) -> TableList:
        return load_table_list(self.path(name))

    def run(self, *command: object) -> Ran:
        """Python with these arguments on the one core."""
        line = ["taskset", "-c", str(self.core), sys.executable, *map(str, command)]
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        try:
            done = subprocess.run(
                line, cwd=ROOT, capture_output=True, text=True, timeout=self.timeout
            )
        except subprocess.TimeoutExpired:
            error = f"stopped after {self.timeout:g} s"
            return Ran(self.timeout, _cpu_seconds() - cpu_began, None, error)
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
        # A child's RUSAGE would count the memory of this process too, which started it.
        peak = re.search(r"^VmHWM:\s+(\d+) kB", done.stdout, re.MULTILINE)
        return Ran(
            seconds,
            cpu_seconds,
            peak_mib=int(peak[1]) / 1024 if peak else None,
            error=_in_one_line(done.stderr) if done.returncode else None,
        )


def _in_one_line(error: str) -> str:
    """Of a traceback the last line, which says what happened and names no file."""
    text = error.strip().splitlines()[-1] if "Traceback" in error else error
    return " ".join(text.split()) or "it failed without a word"


def _cpu_seconds() -> float:
    """Of all processes started from here that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ours(bench: Bench, section: str, case: Case, objective: Objective) -> Row:
    """The plan that the search makes, as often as it is to be timed."""
    row = Row(section, case, OURS, objective)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        arguments = (bench.path(case.tables), case.topology, case.batch_size, objective, out)
        runs = [bench.run("-c", MAKE_PLAN, *arguments) for _ in range(bench.repeats)]
        row = replace(
            row,
            seconds=statistics.median(run.seconds for run in runs),
            cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
            peak_mib=runs[0].peak_mib,
            error=runs[0].error,
        )
        if row.error:
            return row
        plan = Plan.load(out)
    plan.check_fits(bench.load(case.tables).tables, parse_topology(case.topology))
    bound = plan.predicted.bound_ms
    row = judged(row, predicted(plan, case))
    gap = 100 * (row.objective_ms / bound - 1) if row.objective_ms and bound else None
    return replace(row, bound_ms=bound, gap_percent=gap, fingerprint=plan.fingerprint)


def rules(bench: Bench, section: str, case: Case, objectives: Iterable[Objective]) -> Iterator[Row]:
    """The plan of each published rule, under each objective."""
    tables, topology = bench.load(case.tables).tables, parse_topology(case.topology)
    model = TorchRecEstimate(case.batch_size)
    for name in BASELINES:
        error, plan = None, None
        try:
            plan = plan_by_baseline(name, tables, topology, model, case.batch_size)
        except PlannerError as reason:
            error = str(reason)
        for objective in objectives:
            row = Row(section, case, name, objective, error=error)
            yield judged(row, plan) if plan else row


def torchrec(bench: Bench, section: str, case: Case) -> Iterator[Row]:
    """The plans of TorchRec's planner, under both objectives."""
    shape = case.topology.rpartition("x")[0]
    topology = parse_topology(case.topology)
    for name in TORCHREC:
        row = Row(section, case, name, OBJECTIVES[0])
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "torchrec.json"
            arguments = (bench.path(case.tables), shape, case.batch_size, name.split()[1], out)
            ran = bench.run("-m", "benchmarks.torchrec_planner", *arguments)
            document = json.loads(out.read_text()) if ran.error is None else {}
        row = replace(row, seconds=ran.seconds, cpu_seconds=ran.cpu_seconds, error=ran.error)
        plan = None
        if document:
            row = replace(
                row,
                planning_seconds=document["seconds"],
                own_max_total_ms=document["max_total_ms"],
            )
            tables = bench.load(case.tables).tables
            plan = predicted(import_torchrec(document, tables, topology), case)
        for objective in OBJECTIVES:
            row = replace(row, objective=objective)
            yield judged(row, plan) if plan else row


def predicted(plan: Plan, case: Case) -> Plan:
    return predict(plan, TorchRecEstimate(case.batch_size), case.batch_size)


def judged(row: Row, plan: Plan) -> Row:
    """`row` with what the plan's devices say."""
    slowest = [max(getattr(device, stage) for device in plan.devices) for stage in STAGES]
    totals = [device.total_ms or 0.0 for device in plan.devices]
    places: list[DevicePlan | HostPlan] = [*plan.devices, *plan.hosts]
    shares = [p.memory_bytes / p.memory_limit_bytes for p in places if p.memory_limit_bytes]
    return replace(
        row,
        objective_ms=sum(slowest) if row.objective == "stages" else max(totals),
        max_over_mean=max(totals) * len(totals) / sum(totals),
        memory_share=max(shares, default=None),
    )


def measure_worlds(
    bench: Bench, files: list[str], worlds: list[int], torchrec_worlds: list[int]
) -> Iterator[Row]:
    for name in files:
        for world in worlds:
            case = Case(name, f"{world // 8}x8xtorchrec-80GB", BATCH_SIZE)
            yield from (ours(bench, "worlds", case, objective) for objective in OBJECTIVES)
            yield from rules(bench, "worlds", case, OBJECTIVES)
            if world in torchrec_worlds:
                yield from torchrec(bench, "worlds", case)


def measure_wiki(bench: Bench) -> Iterator[Row]:
    batch_size = bench.load(WIKI).batch_size_per_rank
    assert batch_size is not None
    case = Case(WIKI, WIKI_TOPOLOGY, batch_size)
    yield ours(bench, "wiki", case, "max_total")
    yield from rules(bench, "wiki", case, ["max_total"])


def measure_others(bench: Bench) -> Iterator[Row]:
    for name, topology in OTHERS:
        tables, ranks = bench.load(name), parse_topology(topology).world_size
        batch_size = tables.batch_size_per_rank or (tables.batch_size_global or 0) // ranks
        case = Case(name, topology, batch_size)
        row = ours(bench, "others", case, "stages")
        yield replace(row, proven=None if row.error is None else is_proven(bench, case))


def is_proven(bench: Bench, case: Case) -> bool:
    """Whether there is a certificate that nothing fits, and it holds."""
    tables, topology = bench.load(case.tables).tables, parse_topology(case.topology)
    model = TorchRecEstimate(case.batch_size)
    problem = make_problem(tables, topology, model, case.batch_size)
    certificate = prove(problem)
    return certificate is not None and verify(certificate, problem)


def setting(bench: Bench) -> str:
    """What the seconds were measured on."""
    models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy"))
    return (
        f"One core of {models[0] if models else platform.machine()}, Python "
        f"{platform.python_version()}, {packages}; the median of {bench.repeats} run(s). "
        "Cost model: TorchRec's estimate."
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def sheets_of(rows: list[Row], wiki: Path) -> Iterator[Sheet]:
    """What was measured, section by section."""
    worlds = [row for row in rows if row.section == "worlds"]
    if worlds:
        yield plans_sheet(worlds)
        yield rules_sheet(worlds)
    if any(row.planner in TORCHREC for row in worlds):
        yield torchrec_sheet(worlds)
    for section, sheet in (("wiki", partial(wiki_sheet, wiki)), ("others", others_sheet)):
        chosen = [row for row in rows if row.section == section]
        if chosen:
            yield sheet(chosen)


def main(
    data: Annotated[Path, typer.Option(help="folder of table lists")] = ROOT
    / "../shared/data/planner",
    sections: Annotated[str, typer.Option(help="of worlds, wiki, others")] = "worlds,wiki,others",
    files: Annotated[str, typer.Option(help="table lists of worlds")] = ",".join(SYNTHETIC),
    world_sizes: Annotated[str, typer.Option(help="multiples of 8")] = "8,64,128,256,1024",
    with_torchrec: Annotated[bool, typer.Option(help="also plan with TorchRec; minutes")] = False,
    torchrec_world_sizes: Annotated[str, typer.Option(help="for --with-torchrec")] = "8,64",
    repeats: Annotated[int, typer.Option(min=1, help="timings of each of our plans")] = 1,
    timeout: Annotated[float, typer.Option(help="seconds for one plan")] = 3600,
    core: Annotated[int, typer.Option(help="the core to plan on")] = min(os.sched_getaffinity(0)),
    json_file: Annotated[Path | None, typer.Option("--json", help="write all rows here")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables here")] = None,
) -> None:
    """Measure the planner, and print tables."""
    bench = Bench(data.resolve(), core, repeats, timeout)
    worlds = numbers(world_sizes)
    chosen = numbers(torchrec_world_sizes) if with_torchrec else []
    measured = {
        "worlds": partial(measure_worlds, bench, files.split(","), worlds, chosen),
        "wiki": partial(measure_wiki, bench),
        "others": partial(measure_others, bench),
    }
    if unknown := set(sections.split(",")) - measured.keys():
        raise typer.BadParameter(f"no section {unknown.pop()}; choose of {', '.join(measured)}")
    rows: list[Row] = []
    for section in sections.split(","):
        for row in measured[section]():
            print(row.case.tables, row.case.topology, row.planner, row.objective, file=sys.stderr)
            rows.append(row)
    sheets = list(sheets_of(rows, bench.path(WIKI)))
    console = Console(width=None if sys.stdout.isatty() else 180)
    for sheet in sheets:
        sheet.show(console)
    if json_file:
        document = {"setting": setting(bench), "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    if markdown:
        text = "\n\n".join(["# The planner", setting(bench), *(s.markdown() for s in sheets)])
        markdown.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
