"""The `plan` command and its verbs. Each imports what it needs, so that all start quickly.

`python -m planner` reads table lists; `shardemb` mounts the same command and reads run configs too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from planner.errors import PlannerError, UserError

if TYPE_CHECKING:
    from planner.comparison import Comparison
    from planner.plan import Plan
    from planner.request import Sources

DEFAULT = "make"
WIDTH = 100  # of the reports, at most


class DefaultGroup(TyperGroup):
    """Gives what does not begin with a verb to the verb that is named `make`: `plan FILE` is
    `plan make FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_verb = bool(args) and (args[0] in self.commands or args[0] == "--help")
        if not is_verb and (args or not self.no_args_is_help):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What the default verb takes, and below it the others."""
        shown = copy(self)
        shown.params, shown.subcommand_metavar = self.commands[DEFAULT].params, ""
        super(DefaultGroup, shown).format_help(ctx, formatter)


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Decide how embedding tables are sharded.",
)
plan_app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    help="Decide where each table of FILE goes. A file named like a verb is given as ./NAME.",
)
app.add_typer(plan_app, name="plan")


stderr = Console(stderr=True)


def stdout() -> Console:
    """As wide as the terminal; in a file or a pipe as wide as our tables are at most."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan.json")]
TablesPath = Annotated[
    Path, typer.Argument(metavar="FILE", help="a table list, or (shardemb) a run config")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="override keys of a run config")
]
TopologyText = Annotated[
    str | None,
    typer.Option(
        "--topology", metavar="T", help="HOSTSxDEVICESxKIND, as 2x8xA100-80GB, or a topology file"
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="rows a step on each rank", min=1)]
Cost = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="analytic (default), torchrec: its estimate, the file that `profile` wrote, or a "
        "machine measured for shardemb: cpu-2core",
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT",
        help="stages (default): every stage waits for its slowest device; max_total: a step does",
    ),
]
Search = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="auto (default), dreamshard: a profile's policy, or a baseline such as size_greedy",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0)]
TimeBudget = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="search for so long", min=0)
]
Constraints = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="TABLE: {sharding_types: [...], ranks: [...], ...}"),
]
DenseBytes = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="what the dense model takes on each device, as 1.5GiB"),
]
DataStats = Annotated[
    Path | None,
    typer.Option(metavar="stats.json", help="what `shardemb data stats` found: pooling, reuse"),
]
OutPlan = Annotated[
    Path | None, typer.Option("--out", metavar="plan.json", help="write the plan here")
]
Html = Annotated[Path | None, typer.Option(metavar="FILE.html", help="write one HTML page here")]


@plan_app.command(DEFAULT)
def make(
    ctx: typer.Context,
    path: TablesPath,
    overrides: Overrides = None,
    topology: TopologyText = None,
    batch_size: BatchSize = None,
    cost: Cost = None,
    objective: Objective = None,
    search: Search = None,
    seed: Seed = None,
    time_budget: TimeBudget = None,
    constraints: Constraints = None,
    dense_bytes: DenseBytes = None,
    data_stats: DataStats = None,
    out: OutPlan = None,
    html: Html = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="run the plan on this machine, with random ids")
    ] = False,
    as_json: Json = False,
) -> None:
    """Decide where each table of FILE goes; `make` may be left out."""
    from planner.errors import RequestError
    from planner.files import check_folder
    from planner.request import PlanRequest

    check_folder("--out", out)
    check_folder("--html", html)
    run_plan = _sources(ctx).verify
    if verify and run_plan is None:
        raise RequestError("--verify: the planner runs no plans; use `shardemb plan --verify`")
    request = PlanRequest(
        topology=topology,
        batch_size=batch_size,
        cost=cost,
        objective=objective,
        search=search,
        seed=seed,
        time_budget=time_budget,
        constraints=constraints,
        dense_bytes=dense_bytes,
        data_stats=data_stats,
        verify=verify,
    )
    with stderr.status("planning"), _reported(as_json):
        plan = _sources(ctx).make_plan(path, overrides or (), request)
    _remark(plan)
    if out:
        plan.save(out)
    verified = None
    if verify and run_plan is not None:
        with stderr.status("running the plan"):
            verified = run_plan(plan)
    _show(plan, html, as_json, verified)


@plan_app.command()
def show(path: PlanPath, html: Html = None, as_json: Json = False) -> None:
    """Show a plan."""
    from planner.files import check_folder
    from planner.plan import Plan

    check_folder("--html", html)
    _show(Plan.load(path), html, as_json)


@plan_app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="a plan.json")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="another")],
    as_json: Json = False,
) -> None:
    """Show what changed between two plans."""
    from planner.diff import compare, print_difference
    from planner.plan import Plan

    difference = compare(Plan.load(before), Plan.load(after))
    if as_json:
        _print_json(difference.to_dict())
    else:
        print_difference(difference, stdout())


@plan_app.command()
def explain(
    path: PlanPath,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="its name")],
    as_json: Json = False,
) -> None:
    """Show why a table is sharded as it is, and what its other options would do to the step."""
    from planner.explain import explain_table, print_explanation
    from planner.plan import Plan

    explanation = explain_table(Plan.load(path), table)
    if as_json:
        _print_json(explanation.to_dict())
    else:
        print_explanation(explanation, stdout())


@plan_app.command()
def sweep(
    ctx: typer.Context,
    path: TablesPath,
    kinds: Annotated[str, typer.Option(metavar="KIND,...", help="as A100-80GB,H100")],
    devices: Annotated[str, typer.Option(metavar="N,...", help="in all, as 8,16,32")],
    overrides: Overrides = None,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="B,...", help="rows on each rank; default: the file's")
    ] = None,
    local: Annotated[int, typer.Option(help="devices on a host", min=1)] = 8,
    price: Annotated[
        list[str] | None, typer.Option(metavar="KIND=USD", help="of one device for an hour")
    ] = None,
    cost: Cost = None,
    objective: Objective = None,
    search: Search = None,
    seed: Seed = None,
    time_budget: TimeBudget = None,
    constraints: Constraints = None,
    dense_bytes: DenseBytes = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="write the results here")
    ] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Plan for several kinds and numbers of devices and batch sizes, and compare."""
    from planner.files import check_folder, write_whole
    from planner.request import PlanRequest
    from planner.sweep import SweepRequest, sweep_tables
    from planner.sweep_report import print_sweep, write_sweep_html

    check_folder("--out", out)
    check_folder("--html", html)
    tables = _sources(ctx).read_tables(path, overrides or ())
    request = PlanRequest(
        cost=cost,
        objective=objective,
        search=search,
        seed=seed,
        time_budget=time_budget,
        constraints=constraints,
        dense_bytes=dense_bytes,
    )
    asked = SweepRequest(kinds, devices, batch_sizes, local, tuple(price or ()))
    with stderr.status("planning") as status:
        swept = sweep_tables(tables, asked, request, lambda now: status.update(f"planning {now}"))
    if out:
        write_whole(out, json.dumps(swept.to_dict(), indent=1) + "\n", "results")
    if html:
        write_sweep_html(swept, html)
    if as_json:
        _print_json(swept.to_dict())
    else:
        print_sweep(swept, stdout())


@plan_app.command("export")
def export_plan(
    path: PlanPath,
    form: Annotated[str, typer.Option("--format", help="torchrec")] = "torchrec",
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="of the embedding collection in the model, for all tables"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write here; default: stdout")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a plan in the form in which TorchRec serializes its own."""
    from planner.files import check_folder, write_whole
    from planner.plan import Plan
    from planner.request import choose
    from planner.torchrec_json import export_torchrec

    choose("--format", form, ("torchrec",))
    check_folder("--out", out)
    plan = Plan.load(path)
    hardware = plan.topology.hardware
    on_cpu = hardware is not None and hardware.is_cpu
    document = export_torchrec(plan, module, "cpu" if on_cpu else "cuda")
    if out is None:
        _print_json(document)
        return
    write_whole(out, json.dumps(document, indent=1) + "\n", "plan")
    if as_json:
        _print_json({"out": str(out), "tables": len(plan.tables), "fingerprint": plan.fingerprint})
    else:
        print(f"{out}: {len(plan.tables):,} tables")


@plan_app.command("import")
def import_plan(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="TorchRec's plan, as JSON")],
    tables: Annotated[
        Path, typer.Option(metavar="FILE", help="a table list, or (shardemb) a run config")
    ],
    topology: Annotated[
        str, typer.Option(metavar="T", help="HOSTSxDEVICESxKIND, or a topology file")
    ],
    batch_size: BatchSize = None,
    cost: Cost = None,
    objective: Objective = None,
    out: OutPlan = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Make a plan.json of a plan that TorchRec made, and predict its costs."""
    from planner.files import check_folder
    from planner.request import PlanRequest, import_list

    check_folder("--out", out)
    check_folder("--html", html)
    listed = _sources(ctx).read_tables(tables, ())
    request = PlanRequest(topology=topology, batch_size=batch_size, cost=cost, objective=objective)
    plan = import_list(path, listed, request)
    if out:
        plan.save(out)
    _show(plan, html, as_json)


def _sources(ctx: typer.Context) -> Sources:
    """Those of the command that this one is mounted in."""
    from planner.request import Sources, plan_tables, read_tables

    return ctx.find_object(Sources) or Sources(read_tables, plan_tables)


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """With --json, that nothing fits is an object on stdout too, with what would."""
    try:
        yield
    except PlannerError as error:
        from planner.feasibility import DoesNotFit

        if as_json and isinstance(error, DoesNotFit):
            _print_json(error.report.to_dict())
        raise


def _remark(plan: Plan) -> None:
    """What a profile says of the plan that it was made with, on stderr."""
    from planner.cost.shipped import profile_path
    from planner.request import learned_cost

    profile = profile_path(plan.cost_model or "")
    if profile and profile.exists() and plan.cost_model and plan.batch_size:
        from planner.learned_plan import remarks

        for line in remarks(plan, learned_cost(plan.cost_model, plan.batch_size)):
            stderr.print(line, highlight=False)


def _show(plan: Plan, html: Path | None, as_json: bool, verified: Comparison | None = None) -> None:
    if html:
        from planner.html_report import write_html

        write_html(plan, html)
    if as_json and verified:
        _print_json({"plan": json.loads(plan.to_json()), "verified": verified.to_dict()})
        return
    if as_json:
        print(plan.to_json(), end="")
        return
    from planner.report import print_plan

    print_plan(plan, stdout())
    if verified:
        from planner.comparison import print_comparison

        print_comparison(verified, stdout())


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document))


def run(command: typer.Typer) -> None:
    """A user's mistake ends in one message, never in a traceback."""
    try:
        command()
    except UserError as error:
        stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)


def main() -> None:
    """`python -m planner`."""
    run(app)
