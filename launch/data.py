"""`shardemb data`: data sets made, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli import stderr

data_app = typer.Typer(no_args_is_help=True, help="Make Parquet data sets.")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a run config (YAML)")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="override config keys")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
RowGroupRows = Annotated[
    int | None, typer.Option(help="rows in a Parquet row group; default: 8192, or a 16th", min=1)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier data set")]


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
