"""Training runs as measurements of their plans."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner import Plan, RequestError
from planner.cost.measurements import Environment
from planner.cost.stages import STAGES
from planner.strict_yaml import read_yaml
from shardemb.profiler.plan_timing import refuse_unpooled
from shardemb.profiler.store import PATTERN, Store, environment_of, read_part

SEQUENCE = "run"


def add_runs(folder: Path, runs: Iterable[Path]) -> int:
    """Put the stages that result.json has of each run's plan into `folder`; how many were new.

    RequestError names a run that has none, or that ran on another machine; then none is added.
    """
    paths = sorted(folder.glob(PATTERN))
    environment = environment_of(paths)
    if environment is None:
        raise RequestError(f"{folder} holds no measurements: run `shardemb profile --out {folder}`")
    rows = [_row(run, environment) for run in runs]
    parts = (read_part(path) for path in paths if path.name.startswith(f"measurements-{SEQUENCE}-"))
    known = [row for part in parts for row in part.to_pylist()]
    seen = {(row["plan"], tuple(row["stages"])) for row in known}
    new = [row for row in rows if (row["plan"], tuple(row["stages"])) not in seen]
    store = Store(folder, SEQUENCE, environment)
    for row in new:
        store.append(row)
    store.flush()
    return len(new)


def _row(run: Path, environment: Environment) -> dict[str, Any]:
    plan = Plan.load(run / "plan.json")
    refuse_unpooled(plan)
    found = _result(run).get("embeddings")
    if found is None:
        raise RequestError(
            f"{run}/result.json does not say what the embeddings took: the run was too short"
        )
    try:
        there = Environment.model_validate(found["environment"])
        stages = [found["measured"][stage] for stage in STAGES]
        steps = int(found["steps"])
    except (KeyError, TypeError, ValidationError) as error:
        raise RequestError(f"{run}/result.json is not of this version: {error}") from error
    if not environment.is_like(there):
        raise RequestError(
            f"{run} ran on {there.described}, the measurements are of {environment.described}"
        )
    batch_size = read_yaml(run / "config.yaml")["train"]["batch_size"]
    return {
        "kind": "plan",
        "plan": plan.model_copy(update={"batch_size": batch_size}).to_json(),
        "stages": [stage[rank] for rank in range(len(stages[0])) for stage in stages],
        "ms": found["step_ms"],
        "repetitions": steps,
        "is_noisy": False,
    }


def _result(run: Path) -> dict[str, Any]:
    try:
        result = json.loads((run / "result.json").read_text())
    except OSError as error:
        raise RequestError(f"cannot read {run}/result.json: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{run}/result.json is not JSON: {error}") from error
    return dict(result)
