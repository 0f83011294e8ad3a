"""The `shardemb` command. Each verb imports what it needs, so that --help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.plan import SOURCES
from planner import Topology
from planner.cli import plan_app, run, stderr

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train recommender models whose embedding tables are too large for one device.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make Parquet data sets.")
app.add_typer(data_app, name="data")
app.add_typer(plan_app, name="plan", context_settings={"obj": SOURCES})

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a run config (YAML)")]
OptionalConfigPath = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="a run config (YAML)")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="override config keys")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
RowGroupRows = Annotated[
    int | None, typer.Option(help="rows in a Parquet row group; default: 8192, or a 16th", min=1)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier data set")]


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, whether it matches, and how to mend what does not."""
    from launch.doctor import diagnose, render

    report = diagnose()
    print(json.dumps(report) if as_json else render(report))
    raise typer.Exit(0 if report["ok"] else 1)


@data_app.command()
def convert(
    source_format: Annotated[str, typer.Argument(metavar="FORMAT", help="criteo")],
    source: Annotated[Path, typer.Argument(metavar="FILE[.gz]", help="tab-separated rows")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to create")],
    test_rows: Annotated[int, typer.Option(help="rows at the end that go to test/", min=0)] = 0,
    categoricals: Annotated[
        str, typer.Option(help="hex: hexadecimal, as Criteo publishes them; int: decimal")
    ] = "hex",
    row_group_rows: RowGroupRows = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn raw files into Parquet that `shardemb train` reads."""
    from planner import RequestError
    from shardemb.data.criteo import convert_criteo

    if source_format != "criteo":
        raise RequestError(f"there is no format {source_format!r}; choose criteo")
    with stderr.status("converting") as status:
        info = convert_criteo(
            source,
            out,
            test_rows=test_rows,
            categoricals=categoricals,  # type: ignore[arg-type]
            row_group_rows=row_group_rows,
            overwrite=overwrite,
            on_progress=lambda rows: status.update(f"converting: {rows:,} rows"),
        )
    _show_data_set(out, info, as_json)


@data_app.command()
def synth(
    config_path: ConfigPath,
    overrides: Overrides = None,
    train_rows: Annotated[int, typer.Option(min=1)] = 300_000,
    test_rows: Annotated[int, typer.Option(min=1)] = 50_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    row_group_rows: RowGroupRows = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw the data set that CONFIG reads from a known model, into its data.dir."""
    from planner import RequestError
    from shardemb.config import load_config
    from shardemb.data.columns import BatchSchema
    from shardemb.data.synthetic import SyntheticFeature, synthesize

    config = load_config(config_path, overrides or ())
    weighted = [name for name, f in config.data.features.items() if f.weights]
    if weighted:
        raise RequestError(f"data.features.{weighted[0]}.weights: weights are not drawn; leave out")
    pooling = {f: t.pooling_factor for t in config.table_specs() for f in t.feature_names}
    features = [
        SyntheticFeature(f.column, f.num_embeddings, pooling[f.name])
        for f in {f.column: f for f in BatchSchema.from_config(config).features}.values()
    ]
    with stderr.status("drawing rows") as status:
        info = synthesize(
            config.data.dir,
            features=features,
            dense=config.data.dense.columns,
            label=config.data.label,
            train_rows=train_rows,
            test_rows=test_rows,
            seed=seed,
            row_group_rows=row_group_rows,
            overwrite=overwrite,
            on_progress=lambda rows: status.update(f"drawing rows: {rows:,}"),
        )
    _show_data_set(config.data.dir, info, as_json)


def _show_data_set(folder: Path, info: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"dir": str(folder), **info.model_dump(mode="json")}))
        return
    rows = ", ".join(f"{count:,} {split}" for split, count in info.rows.items())
    print(f"{folder}: {rows} rows")
    if info.best_reachable:
        best = info.best_reachable
        print(f"best reachable on test: AUC {best.auc:.4f}, log loss {best.logloss:.4f}")


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
    from shardemb.run_directory import summarize

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


def _local_topology(nproc: int) -> Topology:
    return Topology(world_size=nproc, local_world_size=nproc)


def main() -> None:
    """The console script."""
    run(app)


if __name__ == "__main__":
    main()
