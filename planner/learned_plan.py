"""Plans under a profile: the search knows sums over shards, the profile whole kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from planner.constraints import TableConstraint
from planner.cost.learned import LearnedCost
from planner.errors import PlannerError
from planner.geometry import SHARDING_TYPES, ShardingType
from planner.make_plan import make_plan
from planner.plan import Plan
from planner.search.baselines import BASELINES, plan_by_baseline
from planner.search.dreamshard import plan_by_policy
from planner.tables import TableSpec
from planner.topology import Topology

MOST_FOR_FEWER_TYPES = 20_000  # tables times devices: a search of these takes about a second


def make_learned_plan(
    tables: Sequence[TableSpec],
    topology: Topology,
    model: LearnedCost,
    batch_size: int,
    *,
    time_budget: float | None = None,
    **settings: Any,
) -> Plan:
    """Of the search's plans, that of the profile's policy, where it has one, and those of the
    published rules the one that `model.estimate` has as the fastest; `settings` are those of
    `make_plan`, and so is what is raised.

    Its costs, step and bound are sums over shards, as LearnedCost says: the bound, which the search
    proves, holds for all of these plans. Under `max_total`, which the profile does not predict, it
    is the search's plan.
    """
    problem = (tables, topology, model, batch_size)
    searched = make_plan(*problem, time_budget=time_budget, **settings)
    if searched.objective != "stages":
        return searched
    plans = [searched, *_other_plans(problem, model, settings)]
    if len(tables) * topology.world_size <= MOST_FOR_FEWER_TYPES:
        plans.append(_with_fewer_types(searched, problem, settings))
    fastest = min(plans, key=lambda plan: model.estimate(plan).step_ms)
    return fastest if fastest is searched else _with_bound(fastest, searched)


def _other_plans(
    problem: tuple[Any, ...], model: LearnedCost, settings: dict[str, Any]
) -> Iterator[Plan]:
    ways: list[Callable[..., Plan]] = [partial(plan_by_baseline, name) for name in BASELINES]
    if model.profile.policy is not None:
        ways.append(plan_by_policy)
    for way in ways:
        try:
            yield way(*problem, **settings)
        except PlannerError:  # no room, or no such option under the constraints
            continue


def _with_fewer_types(plan: Plan, problem: tuple[Any, ...], settings: dict[str, Any]) -> Plan:
    """`plan`, or the search's without some of its sharding types, as long as that is faster: each
    has kernels and exchanges of its own, which no sum over shards knows."""
    model: LearnedCost = problem[2]
    best, step_ms = plan, model.estimate(plan).step_ms
    allowed = SHARDING_TYPES
    while True:
        used = sorted({table.sharding_type for table in best.tables.values()})
        found = []
        for left_out in used if len(used) > 1 else ():
            types = tuple(name for name in allowed if name != left_out)
            searched = _search_among(types, problem, settings)
            if searched:
                found.append((model.estimate(searched).step_ms, types, searched))
        fastest = min(found, key=lambda entry: entry[0], default=None)
        if fastest is None or fastest[0] >= step_ms:
            return best
        step_ms, allowed, best = fastest


def _search_among(
    types: tuple[ShardingType, ...], problem: tuple[Any, ...], settings: dict[str, Any]
) -> Plan | None:
    """The search's plan of these sharding types; None where the tables allow no such plan."""
    given: Mapping[str, TableConstraint] = settings.get("constraints") or {}
    narrowed = {}
    for table in problem[0]:
        own = given.get(table.name, TableConstraint())
        both = tuple(t for t in own.sharding_types or SHARDING_TYPES if t in types)
        if not both:
            return None
        narrowed[table.name] = own.model_copy(update={"sharding_types": both})
    try:
        plan = make_plan(*problem, **{**settings, "constraints": narrowed})
    except PlannerError:
        return None
    as_given = {
        name: table.model_copy(update={"constraint": given.get(name)})
        for name, table in plan.tables.items()
    }
    return plan.model_copy(update={"tables": as_given})


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
    profile, ranks = model.profile, plan.topology.world_size
    known = {times.world_size for times in profile.plans or profile.communication.values()}
    if known and ranks not in known:
        listed = " and ".join(map(str, sorted(known)))
        found.append(f"warning: exchanges were measured over {listed} ranks, the plan has {ranks}")
    return found
