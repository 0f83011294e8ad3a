"""Plans under a profile: the search knows sums over shards, the profile whole kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from planner.cost.learned import LearnedCost
from planner.errors import PlannerError
from planner.make_plan import make_plan
from planner.plan import Plan
from planner.search.baselines import BASELINES, plan_by_baseline
from planner.tables import TableSpec
from planner.topology import Topology


def make_learned_plan(
    tables: Sequence[TableSpec],
    topology: Topology,
    model: LearnedCost,
    batch_size: int,
    *,
    time_budget: float | None = None,
    **settings: Any,
) -> Plan:
    """Of the search's plan and those of the published rules the one that `model.estimate` has as
    the fastest; `settings` are those of `make_plan`, and so is what is raised.

    Its costs, step and bound are sums over shards, as LearnedCost says: the bound, which the search
    proves, holds for all of these plans. Under `max_total`, which the profile does not predict, it
    is the search's plan.
    """
    problem = (tables, topology, model, batch_size)
    searched = make_plan(*problem, time_budget=time_budget, **settings)
    if searched.objective != "stages":
        return searched
    others = (_with_bound(plan, searched) for plan in _plans_by_rule(problem, settings))
    return min([searched, *others], key=lambda plan: model.estimate(plan).step_ms)


def _plans_by_rule(problem: tuple[Any, ...], settings: dict[str, Any]) -> Iterator[Plan]:
    for name in BASELINES:
        try:
            yield plan_by_baseline(name, *problem, **settings)
        except PlannerError:  # no room, or no such option under the constraints
            continue


def _with_bound(plan: Plan, searched: Plan) -> Plan:
    bound, step_ms = searched.predicted.bound_ms, plan.predicted.step_ms
    assert bound is not None and step_ms is not None, "both were predicted"
    gap = 100 * (step_ms / bound - 1) if bound > 0 else None
    predicted = plan.predicted.model_copy(update={"bound_ms": bound, "gap_percent": gap})
    return plan.model_copy(update={"predicted": predicted, "seconds": searched.seconds})


def remarks(plan: Plan, model: LearnedCost) -> list[str]:
    """What the profile says of the plan beyond its sums, and where it is used beyond its reach."""
    estimate, here = model.estimate(plan), model.profile.environment
    low, high = (float(part.max(axis=0).sum()) for part in estimate.compute[1:])
    compute = float(estimate.compute.ms.max(axis=0).sum())
    found = [
        f"predicted with whole kernels: {estimate.step_ms:.3g} ms a step, of it kernels "
        f"{compute:.3g} ms ({low:.3g} to {high:.3g})"
    ]
    hardware = plan.topology.hardware
    if hardware is not None and hardware.is_cpu != (here.device_type == "cpu"):
        found.append(f"warning: the profile is of {here.device_name}, the plan for {hardware.kind}")
    if estimate.extrapolated > 1:
        found.append(
            f"warning: extrapolated, a shard is {estimate.extrapolated:.3g} times beyond what "
            "was measured"
        )
    for kind, times in model.profile.communication.items():
        if times.world_size != plan.topology.world_size and kind == "all_to_all":
            found.append(
                f"warning: collectives were measured over {times.world_size} ranks, the plan has "
                f"{plan.topology.world_size}"
            )
    return found
