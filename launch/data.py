"""`shardemb data`: data sets made, and what is in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli import stderr

data_app = typer.Typer(no_args_is_help=True, help="Make Parquet data sets.")
convert_app = typer.Typer(
    no_args_is_help=True, help="Turn raw files into Parquet that `shardemb train` reads."
)
data_app.add_typer(convert_app, name="convert")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a run config (YAML)")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="override config keys")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
RowGroupRows = Annotated[
    int | None, typer.Option(help="rows in a Parquet row group; default: 8192, or a 16th", min=1)
]
Sources = Annotated[
    list[str], typer.Argument(metavar="FILE", help="plain or compressed; globs in quotes")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="folder to create")]
TestRows = Annotated[int, typer.Option(help="rows at the end that go to test/", min=0)]
Processes = Annotated[int, typer.Option(help="the result is the same for any number", min=1)]
Extend = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="an earlier data set: its vocabularies' ids stay, new values get those after them",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier data set")]


@convert_app.command()
def criteo(
    sources: Sources,
    out: Out,
    test_rows: TestRows = 0,
    categoricals: Annotated[
        str, typer.Option(help="hex: hexadecimal, as Criteo publishes them; int: decimal")
    ] = "hex",
    min_count: Annotated[
        int | None,
        typer.Option(help="replace categoricals by frequency rank; rarer ones share a row", min=1),
    ] = None,
    extend: Extend = None,
    row_group_rows: RowGroupRows = None,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Criteo's click logs: tab-separated label, I1 to I13, C1 to C26."""
    from shardemb.data.convert_schema import VocabularySchema
    from shardemb.data.criteo import criteo_conversion

    conversion = criteo_conversion(
        sources,
        test_rows=test_rows,
        categoricals=categoricals,  # type: ignore[arg-type]
        vocabulary=None if min_count is None else VocabularySchema(min_count=min_count),
        row_group_rows=row_group_rows,
    )
    _convert(replace(conversion, extends=extend), out, processes, overwrite, as_json)


def _add_generic(kind: str, what: str) -> None:
    @convert_app.command(kind, help=f"{what}, with a declared schema.")
    def generic(
        sources: Sources,
        out: Out,
        schema: Annotated[Path, typer.Option(metavar="SCHEMA.yaml", help="what the columns mean")],
        test_rows: TestRows = 0,
        test_fraction: Annotated[
            float, typer.Option(help="share of rows, drawn by number, that go to test/", min=0)
        ] = 0.0,
        test_source: Annotated[
            list[str] | None, typer.Option(metavar="FILE", help="all of it goes to test/")
        ] = None,
        extend: Extend = None,
        row_group_rows: RowGroupRows = None,
        processes: Processes = 1,
        overwrite: Overwrite = False,
        as_json: Json = False,
    ) -> None:
        from shardemb.data.convert_schema import load_schema
        from shardemb.data.generic import generic_conversion

        conversion = generic_conversion(
            kind,  # type: ignore[arg-type]
            sources,
            load_schema(schema),
            test_rows=test_rows,
            test_fraction=test_fraction,
            test_sources=test_source or (),
            row_group_rows=row_group_rows,
        )
        _convert(replace(conversion, extends=extend), out, processes, overwrite, as_json)


_add_generic("csv", "Comma-separated values")
_add_generic("tsv", "Tab-separated values")
_add_generic("jsonl", "JSON lines")


@convert_app.command()
def movielens(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="of NCF's three files")],
    out: Out,
    negatives: Annotated[int, typer.Option(help="sampled for each training row", min=0)] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    row_group_rows: RowGroupRows = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """MovieLens as the NCF paper evaluates on it: leave one out, among 99 negatives."""
    from shardemb.data.movielens import convert_movielens

    with stderr.status("converting"):
        info = convert_movielens(
            source,
            out,
            negatives=negatives,
            seed=seed,
            row_group_rows=row_group_rows,
            overwrite=overwrite,
        )
    _show_data_set(out, info, as_json)


def _convert(conversion: Any, out: Path, processes: int, overwrite: bool, as_json: bool) -> None:
    from shardemb.data.conversion import convert

    step = ""

    def report(now: str, done: int) -> None:
        nonlocal step
        if now != step:  # also for a log file, which shows no status
            stderr.print(now, highlight=False)
            step = now
        status.update(f"{now}: {done:,}")

    with stderr.status("converting") as status:
        info = convert(
            conversion, out, processes=processes, overwrite=overwrite, on_progress=report
        )
    _show_data_set(out, info, as_json)


@data_app.command()
def synth(
    config_path: ConfigPath,
    overrides: Overrides = None,
    train_rows: Annotated[int, typer.Option(min=1)] = 300_000,
    test_rows: Annotated[int, typer.Option(min=1)] = 50_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    zipf: Annotated[float, typer.Option(help="exponent of the ids' Zipf law", min=0)] = 1.1,
    reuse: Annotated[
        Path | None,
        typer.Option(help="repeat ids as this stats.json, or Meta's locality statistics, says"),
    ] = None,
    row_group_rows: RowGroupRows = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw the data set that CONFIG reads from a known model, into its data.dir."""
    from planner import RequestError
    from shardemb.config import load_config
    from shardemb.data.reuse_skew import read_histograms
    from shardemb.data.schema import BatchSchema
    from shardemb.data.synthetic import SyntheticFeature, synthesize

    config = load_config(config_path, overrides or ())
    weighted = [name for name, f in config.data.features.items() if f.weights]
    if weighted:
        raise RequestError(f"data.features.{weighted[0]}.weights: weights are not drawn; leave out")
    schema = BatchSchema.from_config(config)
    if {label.column for label in schema.labels} != {config.data.label}:
        raise RequestError(
            f"train.tasks: of labels, {config.data.label} (data.label) alone is drawn"
        )
    pooling = {f: t.pooling_factor for t in config.table_specs() for f in t.feature_names}
    histogram_of = read_histograms(reuse) if reuse else lambda name: None
    features = [
        SyntheticFeature(f.column, f.num_embeddings, pooling[f.name], histogram_of(f.name))
        for f in {f.column: f for f in schema.features}.values()
    ]
    with stderr.status("drawing rows") as status:
        info = synthesize(
            Path(config.data.dir),
            features=features,
            dense=config.data.dense.columns,
            label=config.data.label,
            train_rows=train_rows,
            test_rows=test_rows,
            seed=seed,
            zipf=zipf,
            row_group_rows=row_group_rows,
            overwrite=overwrite,
            on_progress=lambda rows: status.update(f"drawing rows: {rows:,}"),
        )
    _show_data_set(Path(config.data.dir), info, as_json)


def _show_data_set(folder: Path, info: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"dir": str(folder), **info.model_dump(mode="json")}))
        return
    rows = ", ".join(f"{count:,} {split}" for split, count in info.rows.items())
    print(f"{folder}: {rows} rows")
    if info.best_reachable:
        best = info.best_reachable
        print(f"best reachable on test: AUC {best.auc:.4f}, log loss {best.logloss:.4f}")
