"""`shardemb checkpoint`: what is in a checkpoint, whether it is whole, its values to and from
elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from launch.data import ConfigPath, Json, Overrides
from planner import RequestError
from planner.cli import stdout

if TYPE_CHECKING:
    from shardemb.checkpoint.contents import Found

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into checkpoints; export and import.")

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="a run directory or its checkpoints/: the newest; or one of them"
    ),
]
Formats = ("parquet", "safetensors", "state_dict")


@checkpoint_app.command()
def inspect(
    path: CheckpointPath,
    health: Annotated[
        bool, typer.Option("--health", help="read all tables: norms, rows never trained")
    ] = False,
    as_json: Json = False,
) -> None:
    """Step, tables, optimizer states and bytes."""
    from shardemb.checkpoint.contents import describe

    found = _find(path)
    report = describe(found)
    if health:
        from shardemb.checkpoint.contents import health as health_of

        for table in report["tables"]:
            table["health"] = health_of(found, table["name"])
    if as_json:
        print(json.dumps(report))
    else:
        _show(report, health)


@checkpoint_app.command()
def verify(path: CheckpointPath, as_json: Json = False) -> None:
    """Read every byte; exit code 1 names each damaged file and the tables in it."""
    from shardemb.checkpoint.contents import verify as verify_all

    found = _find(path)
    size = verify_all(found)
    if as_json:
        print(json.dumps({"checkpoint": found.path, "bytes": size, "ok": True}))
    else:
        print(f"{found.path} is whole: {decimal(size)} in {len(found.manifest.files)} files")


@checkpoint_app.command()
def export(
    path: CheckpointPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder; state_dict: file")],
    kind: Annotated[str, typer.Option("--format", help=", ".join(Formats))] = "parquet",
    tables: Annotated[
        list[str] | None, typer.Option("--table", help="this one alone; may be repeated")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tables as Parquet (id, embedding) or safetensors; or the whole model, unsharded."""
    from shardemb.checkpoint.export import export as export_to

    if kind not in Formats:
        raise RequestError(f"--format {kind}: choose one of {', '.join(Formats)}")
    written = export_to(_find(path), out, kind, tables or [])  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"files": [str(file) for file in written]}))
    else:
        print("\n".join(str(file) for file in written))


@checkpoint_app.command("import")
def import_(
    config_path: ConfigPath,
    overrides: Overrides = None,
    tables: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="of TABLE.parquet or .safetensors, as export writes"),
    ] = None,
    state_dict: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="of the unsharded model: .safetensors, or torch.save's"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Weights from elsewhere as a checkpoint that CONFIG's run begins with."""
    from shardemb.checkpoint.contents import describe
    from shardemb.checkpoint.import_weights import import_weights
    from shardemb.config import load_config

    found = import_weights(load_config(config_path, overrides or ()), tables, state_dict)
    if as_json:
        print(json.dumps(describe(found)))
    else:
        print(f"{found.path}: begin a run with it by checkpoint.resume=latest")


def _find(path: str) -> Found:
    from shardemb.checkpoint.contents import find

    return find(path)


def _show(report: dict[str, Any], with_health: bool) -> None:
    epoch = "" if report["epoch"] is None else f", in epoch {report['epoch']}"
    lines = Table(
        title=f"{report['checkpoint']}\nstep {report['step']}{epoch}, {report['samples']:,} "
        f"samples, saved {report['created']} by {report['world_size']} ranks: "
        f"{decimal(report['bytes'])}; {report['dense_parameters']:,} dense parameters",
        title_justify="left",
        title_style="",
    )
    columns = ["table", "rows", "dim", "dtype", "sharding", "optimizer", "states", "size"]
    health_columns = ["rms norm", "max norm", "never trained", "not finite"] if with_health else []
    for column in [*columns, *health_columns]:
        right = column in ("rows", "dim", "size", *health_columns)
        lines.add_column(column, justify="right" if right else "left")
    for table in report["tables"]:
        cells = [
            table["name"], f"{table['num_embeddings']:,}", str(table["embedding_dim"]),
            table["dtype"], table["sharding_type"], table["optimizer"],
            ", ".join(table["states"]) or "none", decimal(table["bytes"]),
        ]  # fmt: skip
        if with_health:
            found = table["health"]
            rows = found["never_trained_rows"]
            cells += [f"{found['rms_norm']:.4f}", f"{found['max_norm']:.4f}"]
            cells += ["unknown" if rows is None else f"{rows:,}", f"{found['not_finite_rows']:,}"]
        lines.add_row(*cells)
    stdout().print(lines)
