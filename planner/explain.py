"""Why a table is sharded as it is: all its options, and the step with each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from planner.constraints import TableConstraint
from planner.cost.predict import predict
from planner.cost.stages import STAGES, CostModel
from planner.errors import PlannerError, RequestError
from planner.geometry import SHARDING_TYPES
from planner.options import Problem, make_problem
from planner.plan import Plan
from planner.report import format_bytes, format_ms, text_table
from planner.request import cost_model
from planner.search.objective import Goal
from planner.search.placement import Placement
from planner.shards import COMPUTE_KERNELS, Floats
from planner.storage import received_bytes
from planner.tables import TableSpec
from planner.validation import nearest

SHOWN = 12
SHARPEST = 8  # the slowest device decides where pieces go


@dataclass(frozen=True)
class Option:
    """A way to shard the table. `step_ms` is what a step takes with it, all other tables kept
    as they are; None where it does not fit there."""

    sharding_type: str
    compute_kernel: str
    cache_load_factor: float | None
    column_shards: int
    devices: int
    work_ms: float
    largest_ms: float
    memory_bytes: int
    host_memory_bytes: int
    step_ms: float | None
    is_chosen: bool = False


@dataclass(frozen=True)
class Explanation:
    """The chosen option comes first, then the others by the step they make."""

    table: str
    together_with: tuple[str, ...]  # tables of its group: they are sharded alike
    spec: TableSpec
    constraint: TableConstraint | None
    reason: str | None
    step_ms: float
    options: tuple[Option, ...]

    def to_dict(self) -> dict[str, Any]:
        """For json.dumps."""
        return {
            **{key: getattr(self, key) for key in ("table", "together_with", "reason", "step_ms")},
            "spec": self.spec.model_dump(mode="json"),
            "constraint": self.constraint and self.constraint.model_dump(mode="json"),
            "options": [asdict(option) for option in self.options],
        }


def explain_table(plan: Plan, name: str) -> Explanation:
    """RequestError where there is no such table; PlannerError where the plan has no costs."""
    if name not in plan.tables:
        raise RequestError(f"the plan has no table {name}{nearest(name, plan.tables)}")
    table, names = plan.tables[name], _group_of(plan, name)
    spec, step_ms = table.spec, plan.predicted.step_ms
    if spec is None or step_ms is None or plan.cost_model is None or plan.batch_size is None:
        raise PlannerError(
            "the plan has no predicted costs, so its options cannot be compared: make it with "
            "`plan TABLES --topology T --cost analytic`"
        )
    model = cost_model(plan.cost_model, plan.batch_size, "the plan's cost_model")
    problem = _problem(plan, names, model)
    return Explanation(
        table=name,
        together_with=tuple(other for other in names if other != name),
        spec=spec,
        constraint=table.constraint,
        reason=table.reason,
        step_ms=step_ms,
        options=_options(plan, names, problem, model),
    )


def _group_of(plan: Plan, name: str) -> list[str]:
    constraint = plan.tables[name].constraint
    group = constraint and constraint.group
    if not group:
        return [name]
    constraints = {other: table.constraint for other, table in plan.tables.items()}
    return [other for other, limit in constraints.items() if limit and limit.group == group]


def _problem(plan: Plan, names: Iterable[str], model: CostModel) -> Problem:
    """That of these tables alone: one unit."""
    tables = [plan.tables[name] for name in names]
    specs = [table.spec for table in tables if table.spec]
    limits = {name: limit for name in names if (limit := plan.tables[name].constraint)}
    assert plan.batch_size is not None
    return make_problem(specs, plan.topology, model, plan.batch_size, limits)


def _options(
    plan: Plan, names: list[str], problem: Problem, model: CostModel
) -> tuple[Option, ...]:
    """All options, each placed where it is best beside the other tables."""
    own = _alone(plan, names, model)
    placement = _others(plan, own, problem)
    found = [_option(placement, problem, number) for number in range(len(problem.options))]
    chosen = _chosen(plan, names, own)
    others = [option for option in found if _kind(option) != _kind(chosen)]
    others.sort(key=lambda o: (o.step_ms is None, o.step_ms or 0.0, o.work_ms))
    return (chosen, *others)


def _alone(plan: Plan, names: list[str], model: CostModel) -> Plan:
    """A plan of these tables, as they are, and nothing else."""
    tables = {name: plan.tables[name] for name in names}
    assert plan.batch_size is not None
    return predict(
        plan.model_copy(update={"tables": tables}),
        model,
        plan.batch_size,
        plan.objective or "stages",
    )


def _others(plan: Plan, own: Plan, problem: Problem) -> Placement:
    """What the devices do without these tables: a placement in which their unit has no place."""
    goal = Goal(problem, plan.objective or "stages")
    placement = Placement(goal, np.ones(goal.load.shape[1]), SHARPEST)
    load = np.maximum(_stages(plan) - _stages(own), 0)
    placement.load = load if goal.load.shape[1] > 1 else load.sum(axis=1, keepdims=True)
    # Embeddings received are of no shard: they stay, whatever the option.
    received = received_bytes(problem.tables, problem.batch_size)
    placement.memory = _memory(plan) - _memory(own) + received
    placement.host_memory = _host_memory(plan) - _host_memory(own)
    placement.sharpen(SHARPEST)
    return placement


def _stages(plan: Plan) -> Floats:
    return np.array([[getattr(d, stage) or 0.0 for stage in STAGES] for d in plan.devices])


def _memory(plan: Plan) -> Floats:
    return np.array([float(device.memory_bytes) for device in plan.devices])


def _host_memory(plan: Plan) -> Floats:
    used = np.zeros(plan.topology.num_hosts)
    for host in plan.hosts:
        used[host.host] = host.memory_bytes
    return used


def _option(placement: Placement, problem: Problem, number: int) -> Option:
    options = problem.options
    cost = float(options.cost[number].sum())
    devices = int(options.devices(problem.topology)[number])
    return Option(
        sharding_type=SHARDING_TYPES[options.sharding_type[number]],
        compute_kernel=COMPUTE_KERNELS[options.compute_kernel[number]],
        cache_load_factor=float(options.cache_load_factor[number]) or None,
        column_shards=int(options.column_shards[number]),
        devices=devices,
        work_ms=cost * devices,
        largest_ms=cost,
        memory_bytes=round(options.memory[number]),
        host_memory_bytes=round(options.host_memory[number]),
        step_ms=_step_with(placement, number),
    )


def _step_with(placement: Placement, option: int) -> float | None:
    choice = placement.best(0, option)
    if choice is None:
        return None
    placement = placement.copy()
    placement.put(0, choice)
    return placement.objective


def _chosen(plan: Plan, names: list[str], own: Plan) -> Option:
    """The option that the plan has; from the plan, since rules and imports have others."""
    table = plan.tables[names[0]]
    received = received_bytes([t.spec for t in own.tables.values() if t.spec], own.batch_size or 0)
    costs = [device.total_ms or 0.0 for device in own.devices]
    return Option(
        sharding_type=table.sharding_type,
        compute_kernel=table.compute_kernel,
        cache_load_factor=table.cache_load_factor,
        column_shards=len({shard.column_offset for shard in table.shards}),
        devices=len(table.shards),
        work_ms=sum(costs),
        largest_ms=max(costs),
        memory_bytes=max(device.memory_bytes for device in own.devices) - received,
        host_memory_bytes=max(
            sum(own.tables[name].shards[i].host_memory_bytes for name in names)
            for i in range(len(table.shards))
        ),
        step_ms=plan.predicted.step_ms,
        is_chosen=True,
    )


def _kind(option: Option) -> tuple[object, ...]:
    share = round(option.cache_load_factor or 0.0, 9)
    return option.sharding_type, option.compute_kernel, share, option.column_shards


# ------------------------------------------------------------------ in the terminal


def print_explanation(explanation: Explanation, console: Console) -> None:
    """What the table is, why its option, and the best of the others."""
    for line in _headline(explanation):
        console.print(Text(line))
    chosen, *others = explanation.options
    shown = text_table(["sharding"])
    shown.add_column("kernel", overflow="fold", min_width=10)
    for column in ("pieces", "work\nms", "ms of\none", "memory\nof one", "step\nms", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for option in (chosen, *others[:SHOWN]):
        style = "bold" if option.is_chosen else ""
        shown.add_row(*_row(option, explanation.step_ms), style=style)
    console.print(shown)
    if len(others) > SHOWN:
        console.print(f"... and {len(others) - SHOWN} more: --json lists all")


def _headline(explanation: Explanation) -> Iterable[str]:
    spec, chosen = explanation.spec, explanation.options[0]
    features = f"{spec.num_features} feature{'s' * (spec.num_features > 1)}"
    yield (
        f"{explanation.table}: {spec.num_embeddings:,} x {spec.embedding_dim} {spec.dtype}, "
        f"{features} of {spec.pooling_factor:g} ids"
    )
    if explanation.together_with:
        yield f"one group, and so sharded alike, with {', '.join(explanation.together_with)}"
    if explanation.constraint:
        yield f"fixed by constraint: {_constraint(explanation.constraint)}"
    yield f"chosen: {_name(chosen)}" + (f": {explanation.reason}" if explanation.reason else "")
    yield _next_best(explanation)
    yield ""


def _constraint(constraint: TableConstraint) -> str:
    given = constraint.model_dump(exclude_defaults=True)
    words = {k: ", ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in given.items()}
    return "; ".join(f"{key} {value}" for key, value in words.items()) or "nothing"


def _next_best(explanation: Explanation) -> str:
    if len(explanation.options) == 1:
        return "It has no other option."
    best = explanation.options[1]
    if best.step_ms is None:
        return "No other option fits beside the other tables."
    return (
        f"The next best, {_name(best)}, would make the step {format_ms(best.step_ms)} ms instead "
        f"of {format_ms(explanation.step_ms)} ms, with all other tables as they are."
    )


def _name(option: Option) -> str:
    count = option.column_shards
    columns = f" in {count} column shards" if count > 1 else ""
    return f"{option.sharding_type}{columns}, {_kernel(option)}"


def _kernel(option: Option) -> str:
    share = option.cache_load_factor
    return option.compute_kernel + ("" if share is None else f" {share:.0%}")


def _row(option: Option, step_ms: float) -> list[str]:
    change, step = "does not fit", ""
    if option.step_ms is not None:
        step, change = format_ms(option.step_ms), f"{100 * (option.step_ms / step_ms - 1):+.1f}%"
    return [
        option.sharding_type,
        _kernel(option),
        f"{option.devices:,}",
        format_ms(option.work_ms),
        format_ms(option.largest_ms),
        format_bytes(option.memory_bytes),
        step,
        "chosen" if option.is_chosen else change,
    ]
