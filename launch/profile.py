"""`shardemb profile`: measure this machine, and fit the cost model to it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.data import Json
from planner.cli import DEFAULT, DefaultGroup, stderr, stdout

# Of the time. Plans: TorchRec's part of a step, around kernels and collectives.
SHARES = {"device": 0.6, "collectives": 0.12, "plans": 0.28}
CPU_RANKS = 2


profile_app = typer.Typer(
    cls=DefaultGroup, help="Measure lookups and exchanges here, for `plan --cost profile.json`."
)
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="measurements and profile.json; it may have some")
]
Seed = Annotated[int, typer.Option(help="of the work that is drawn, and of the fit", min=0)]


@profile_app.command(DEFAULT)
def make(
    minutes: Annotated[
        float, typer.Option(metavar="M", help="measure for so long, then fit", min=0)
    ] = 5.0,
    out: Out = Path("profile"),
    nproc: Annotated[
        int | None,
        typer.Option(
            help="ranks of collectives and plans, 1: none; default: the GPUs, or 2 on a CPU",
            min=1,
        ),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure lookups, collectives and plans here, fit the cost model that `plan --cost` takes, and
    train the policy of `plan --search dreamshard` on it.

    Measurements of an earlier run in DIR are kept, and counted: --minutes 0 fits them anew.
    """
    from planner import RequestError

    if not math.isfinite(minutes):
        raise RequestError(f"--minutes {minutes}: give a number of minutes")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out}: {error.strerror}") from error
    if minutes:
        measure(out, minutes * 60, _ranks(nproc), seed)
    _fit(out, seed, as_json)


@profile_app.command()
def update(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="run directories of training runs here")
    ],
    out: Out = Path("profile"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Add what the plans of training runs took to the measurements in DIR, and fit all anew.

    Each run counts as one plan, so that the fit follows where it predicted several of them wrongly.
    """
    from shardemb.profiler.runs import add_runs

    added = add_runs(out, runs)
    stderr.print(f"{added} of {len(runs)} runs added to {out}", highlight=False)
    _fit(out, seed, as_json)


def _fit(out: Path, seed: int, as_json: bool) -> None:
    from planner.cost.calibrate import fit_profile
    from shardemb.profiler.samples import read_measurements
    from shardemb.profiler.train_policy import with_policy

    with stderr.status("fitting"):
        fitted = fit_profile(read_measurements(out), seed)
    with stderr.status("training the placement policy"):
        fitted = with_policy(fitted, seed)
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
    """Measure one device, then collectives and whole plans over `nproc` ranks, each in processes
    of its own.

    A kernel has as many threads as it has where `nproc` ranks train on this machine.
    """
    from launch.local import run_workers

    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    for what, share in SHARES.items() if nproc > 1 else [("device", 1.0)]:
        ranks, name = (1, "kernels") if what == "device" else (nproc, f"{what} of {nproc} ranks")
        stderr.print(f"measuring {name} for {share * seconds:.0f} s", highlight=False)
        arguments = [what, str(out), str(share * seconds), str(seed), str(threads)]
        run_workers(["-m", "shardemb.profiler.worker", *arguments], ranks)


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
