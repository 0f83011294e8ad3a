"""What a plan was predicted to take, beside what it took where it was run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from planner.cost.shipped import profile_path
from planner.cost.stages import COMPUTE, LINKS, STAGES
from planner.plan import Plan
from planner.shards import Floats

MOST_RANKS = 16  # shown one by one


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of each stage [ranks, 4], in the order of planner.cost.stages.

    `measured_step_ms` is that of a step that ran through at once, where one was timed.
    """

    measured: Floats
    predicted: Floats | None = None
    measured_step_ms: float | None = None

    @classmethod
    def of(cls, plan: Plan, measured: Floats, step_ms: float | None = None) -> Comparison:
        """`plan` predicts for itself, or its profile does, which knows kernels as a whole."""
        return cls(measured, predicted_stages(plan), step_ms)

    def to_dict(self) -> dict[str, Any]:
        """Lists have a number for each rank; a step is the sum of its slowest stages."""
        whole = self.measured_step_ms
        return {
            **({} if whole is None else {"unbroken_step_ms": whole}),
            "step_ms": _step(self.measured),
            "predicted_step_ms": None if self.predicted is None else _step(self.predicted),
            "measured": _by_stage(self.measured),
            "predicted": None if self.predicted is None else _by_stage(self.predicted),
        }


def predicted_stages(plan: Plan) -> Floats | None:
    """[ranks, 4]; None where nothing was predicted."""
    profile = profile_path(plan.cost_model or "")
    if profile and profile.exists() and plan.cost_model and plan.batch_size:
        from planner.request import learned_cost

        estimate = learned_cost(plan.cost_model, plan.batch_size).estimate(plan)
        stages = np.empty((plan.topology.world_size, len(STAGES)))
        stages[:, COMPUTE], stages[:, LINKS] = estimate.compute.ms, estimate.links_ms
        return stages
    if any(device.total_ms is None for device in plan.devices):
        return None
    return np.array([[getattr(device, name) for name in STAGES] for device in plan.devices])


def _step(stages: Floats) -> float:
    """Every stage waits for its slowest rank."""
    return float(stages.max(axis=0).sum())


def _by_stage(stages: Floats) -> dict[str, list[float]]:
    return {name: stages[:, i].tolist() for i, name in enumerate(STAGES)}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The slowest rank of each stage, the step, and the kernels of each rank."""
    measured, predicted = comparison.measured, comparison.predicted
    if predicted is None:
        predicted = np.full_like(measured, np.nan)
    table = Table(title="predicted and measured, ms", title_justify="left")
    for name in ("stage", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for rank in range(len(measured)) if len(measured) <= MOST_RANKS else ():
        for i in COMPUTE:
            cells = _cells(predicted[rank, i], measured[rank, i])
            table.add_row(f"{_words(STAGES[i])}, rank {rank}", *cells)
    table.add_section()
    for i, stage in enumerate(STAGES):
        cells = _cells(predicted[:, i].max(), measured[:, i].max())
        table.add_row(f"{_words(stage)}, slowest", *cells)
    table.add_section()
    table.add_row("step: the sum of the slowest", *_cells(_step(predicted), _step(measured)))
    console.print(table)
    if comparison.measured_step_ms is not None:
        console.print(f"a step without stops: {comparison.measured_step_ms:.3g} ms")


def _words(stage: str) -> str:
    return stage.removesuffix("_ms").replace("_", " ")


def _cells(expected: float, found: float) -> tuple[str, str, str]:
    """A dash for what is NaN: nothing was predicted."""
    shown = "-" if math.isnan(expected) else f"{expected:.3g}"
    is_known = found > 0 and not math.isnan(expected)
    return shown, f"{found:.3g}", f"{100 * (expected / found - 1):+.0f}%" if is_known else "-"
