"""`shardemb profile`: measure this machine, and fit the cost model to it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.data import Json
from planner.cli import stderr, stdout

DEVICE_SHARE = 0.75  # of the time; the rest is for collectives
CPU_RANKS = 2


def profile(
    minutes: Annotated[
        float, typer.Option(metavar="M", help="measure for so long, then fit", min=0)
    ] = 5.0,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="measurements and profile.json; it may have some")
    ] = Path("profile"),
    nproc: Annotated[
        int | None,
        typer.Option(
            help="ranks of the collectives, 1: measure none; default: the GPUs, or 2 on a CPU",
            min=1,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the work that is drawn, and of the fit", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Measure lookups and collectives here, and fit the cost model that `plan --cost` takes.

    Measurements of an earlier run in DIR are kept, and counted: --minutes 0 fits them anew.
    """
    from planner import RequestError
    from planner.cost.calibrate import fit_profile
    from shardemb.profiler.samples import read_measurements

    if not math.isfinite(minutes):
        raise RequestError(f"--minutes {minutes}: give a number of minutes")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out}: {error.strerror}") from error
    if minutes:
        measure(out, minutes * 60, _ranks(nproc), seed)
    with stderr.status("fitting"):
        fitted = fit_profile(read_measurements(out), seed)
    path = out / "profile.json"
    fitted.save(path)
    summary = {"profile": str(path), **fitted.summary()}
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def _ranks(given: int | None) -> int:
    """A GPU for each rank: collectives of processes that share one are not those of a cluster."""
    import torch

    from planner import RequestError

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and given is not None and given > gpus:
        raise RequestError(f"--nproc {given}: this machine has {gpus} GPUs; give at most so many")
    return given or gpus or CPU_RANKS


def measure(out: Path, seconds: float, nproc: int, seed: int) -> None:
    """Measure one device, then collectives over `nproc` ranks, each in processes of its own.

    A kernel has as many threads as it has where `nproc` ranks train on this machine.
    """
    from launch.local import run_workers

    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    worker = ["-m", "shardemb.profiler.worker", str(out)]
    runs = [(1, DEVICE_SHARE), (nproc, 1 - DEVICE_SHARE)] if nproc > 1 else [(1, 1.0)]
    for ranks, share in runs:
        what = "kernels" if ranks == 1 else f"collectives of {ranks} ranks"
        stderr.print(f"measuring {what} for {share * seconds:.0f} s", highlight=False)
        run_workers([*worker, str(share * seconds), str(seed), str(threads)], ranks)


def print_summary(summary: dict[str, Any]) -> None:
    """What was fitted, for a person."""
    console = stdout()
    console.print(f"{summary['profile']}: {summary['device']}", highlight=False)
    for what, found in summary["fitted"].items():
        console.print(
            f"  {what}: {found['measured']:,} measurements, "
            f"9 of 10 within {found['margin_percent']:.0f}%",
            highlight=False,
        )
