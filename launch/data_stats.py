"""`shardemb data stats`: what is in Parquet data, feature by feature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from launch.data import Json
from planner.cli import Html, stderr, stdout
from planner.tables import REUSE_BATCH_SIZE

ENGINES = ("local", "ray")


def stats(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PARQUET", help="files, folders of *.parquet, or globs"),
    ] = None,
    config_path: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG", help="a run config: its features and tables"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="rows of a batch, for reuse in it", min=1)
    ] = REUSE_BATCH_SIZE,
    max_rows: Annotated[int | None, typer.Option(help="count the first rows only", min=1)] = None,
    engine: Annotated[
        str, typer.Option(help="local: in this process; ray: on a Ray cluster")
    ] = "local",
    out: Annotated[
        Path | None, typer.Option(metavar="stats.json", help="write the statistics here")
    ] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Count ids, pooling, skew and reuse of each feature, for the planner and for you.

    Without --config, columns of integers, strings or lists of them are sparse features, other
    numbers are dense.
    """
    from planner.files import check_folder, write_whole
    from planner.request import choose
    from shardemb.config import load_config
    from shardemb.data.statistics import collect_statistics
    from shardemb.data.statistics_report import print_statistics, write_statistics_html

    check_folder("--out", out)
    check_folder("--html", html)
    config = None if config_path is None else load_config(config_path)
    with stderr.status("counting") as status:
        statistics = collect_statistics(
            paths or (),
            config,
            batch_size=batch_size,
            max_rows=max_rows,
            engine=choose("--engine", engine, ENGINES),
            on_progress=lambda done, all_: status.update(f"counting: {done:,} of {all_:,} rows"),
        )
    if out:
        write_whole(out, json.dumps(statistics.to_dict(), indent=1) + "\n", "statistics")
    if html:
        write_statistics_html(statistics, html)
    if as_json:
        print(json.dumps(statistics.to_dict()))
    else:
        print_statistics(statistics, stdout())
