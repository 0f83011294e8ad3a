"""The `shardemb` command. Each verb imports what it needs, so that --help is quick."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from launch.checkpoint import checkpoint_app
from launch.data import ConfigPath, Json, Overrides, data_app
from launch.data_stats import stats
from launch.hosts import launch_app
from launch.plan import SOURCES
from launch.profile import profile_app
from planner import Topology
from planner.cli import plan_app, run, stderr
from shardemb.metrics.wall_time import LAUNCHED

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train recommender models whose embedding tables are too large for one device.",
)
data_app.command()(stats)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(plan_app, name="plan", context_settings={"obj": SOURCES})
app.add_typer(profile_app, name="profile")
app.add_typer(launch_app, name="launch")

OptionalConfigPath = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="a run config (YAML)")
]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, whether it matches, and how to mend what does not."""
    from launch.doctor import diagnose, render

    report = diagnose()
    print(json.dumps(report) if as_json else render(report))
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def train(
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    as_json: Json = False,
    print_schema: Annotated[
        bool, typer.Option("--print-schema", help="print the config's JSON Schema and stop")
    ] = False,
) -> None:
    """Plan, start launch.nproc_per_node workers here, train, evaluate."""
    from launch.local import run_workers
    from planner import RequestError
    from shardemb.config import RunConfig, load_config
    from shardemb.preflight import check_run
    from shardemb.summary import summarize

    if print_schema:
        print(json.dumps(RunConfig.model_json_schema()))
        return
    if config_path is None:
        raise RequestError("name a run config: shardemb train CONFIG [KEY=VALUE]...")
    config = load_config(config_path, overrides or ())
    nproc = config.launch.nproc_per_node
    check_run(config, _local_topology(nproc))
    stderr.print(f"starting {nproc} workers on this machine", highlight=False)
    run_workers(["-m", "shardemb.train", str(config_path), *(overrides or ())], nproc)
    result = json.loads((config.output / "result.json").read_text())
    print(json.dumps(result) if as_json else summarize(config, result))


@app.command("eval")
def evaluate(
    config_path: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str, typer.Option(help="latest, best, or a name in checkpoint.dir")
    ] = "latest",
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint of the run in `output` on the test split, on any number of workers."""
    import tempfile

    from launch.local import run_workers
    from planner import UserError
    from shardemb.config import load_config
    from shardemb.summary import summarize_evaluation

    config = load_config(config_path, overrides or ())
    if "test" not in config.data.splits():
        raise UserError(f"data.dir: {config.data.dir} has no test/ folder: nothing to evaluate on")
    with tempfile.TemporaryDirectory(prefix="shardemb-") as scratch:
        result = Path(scratch) / "result.json"
        arguments = [str(config_path), checkpoint, str(result), *(overrides or ())]
        run_workers(["-m", "shardemb.evaluate", *arguments], config.launch.nproc_per_node)
        found = json.loads(result.read_text())
    line = f"step {found['step']}: {summarize_evaluation(config, found['eval'])}"
    print(json.dumps(found) if as_json else line)


def _local_topology(nproc: int) -> Topology:
    return Topology(world_size=nproc, local_world_size=nproc)


def main() -> None:
    """The console script."""
    os.environ[LAUNCHED] = str(time.time())  # for the workers that it starts
    run(app)


if __name__ == "__main__":
    main()
