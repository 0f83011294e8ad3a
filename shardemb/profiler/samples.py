"""What was measured, as the cost model's fit takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from planner import Plan, RequestError, TableSpec
from planner.cost.measurements import (
    COLLECTIVES,
    CollectiveSample,
    KernelSample,
    Measurements,
    PlanSample,
)
from shardemb.profiler.store import PATTERN, environment_of, read_part


def read_measurements(folder: Path) -> Measurements:
    """All of `folder` but the noisy ones; RequestError where it has none."""
    paths = sorted(folder.glob(PATTERN))
    environment = environment_of(paths)
    if environment is None:
        raise RequestError(f"{folder} holds no measurements ({PATTERN})")
    rows = [row for path in paths for row in read_part(path).to_pylist() if not row["is_noisy"]]
    return Measurements(
        environment=environment,
        kernels=tuple(_kernel(row) for row in rows if row["kind"] == "kernel"),
        collectives=tuple(
            CollectiveSample(row["kind"], tuple(row["sent_bytes"]), row["ms"])
            for row in rows
            if row["kind"] in COLLECTIVES
        ),
        plans=tuple(_plan(row) for row in rows if row["kind"] == "plan"),
    )


def _kernel(row: dict[str, Any]) -> KernelSample:
    tables = tuple(
        TableSpec(name=f"t{i}", dtype=row["dtype"], optimizer=row["optimizer"], **columns)
        for i, columns in enumerate(row["tables"])
    )
    return KernelSample(
        row["task"], tables, row["batch_size"], row["forward_ms"], row["backward_ms"]
    )


def _plan(row: dict[str, Any]) -> PlanSample:
    plan = Plan.from_json(row["plan"])
    return PlanSample(plan, np.array(row["stages"]).reshape(plan.topology.world_size, -1))
