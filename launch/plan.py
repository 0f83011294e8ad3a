"""What `shardemb plan` reads: run configs, beside the planner's table lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from planner import Plan, RequestError, Topology
from planner.cost.predict import predict
from planner.request import (
    AUTO,
    OBJECTIVES,
    PlanRequest,
    Sources,
    choose,
    cost_model,
    plan_tables,
    read_constraints,
    read_document,
    read_tables,
)
from planner.table_list import TableList
from planner.topology import parse_topology

if TYPE_CHECKING:
    from planner.comparison import Comparison
    from shardemb.config import RunConfig

Section = TypeVar("Section", bound=BaseModel)


def read_file(path: Path, overrides: Sequence[str]) -> TableList:
    """The tables of a run config or of a table list."""
    config = _run_config(path, overrides)
    return read_tables(path, overrides) if config is None else _tables(config)


def plan_file(path: Path, overrides: Sequence[str], request: PlanRequest) -> Plan:
    """The plan that `shardemb train` would use for a run config, or the one for a table list."""
    config = _run_config(path, overrides)
    if config is None:
        return plan_tables(path, overrides, request)
    from shardemb.planning import plan_run

    config = _as_asked(config, request)
    topology = _topology(config, request)
    plan = plan_run(config, topology)
    return _with_costs(plan, config) if topology.hardware else plan


def _run_config(path: Path, overrides: Sequence[str]) -> RunConfig | None:
    """None where the file is something else."""
    document = read_document(path)
    if "fingerprint" in document or isinstance(document.get("tables"), list):
        return None
    if path.suffix.lower() == ".json" and not document.keys() & {"data", "model", "tables"}:
        return None
    from shardemb.config import load_config

    return load_config(path, overrides)


def _tables(config: RunConfig) -> TableList:
    from shardemb.planning import tables_to_plan

    return TableList(
        batch_size_per_rank=config.train.batch_size, tables=tuple(tables_to_plan(config))
    )


def _as_asked(config: RunConfig, request: PlanRequest) -> RunConfig:
    """`config` with the options in the place of its keys."""
    _refuse_unknown(request)
    sharding = config.sharding
    if request.search or request.constraints:
        sharding = sharding.model_copy(update={"default": None, "plan": None})
    constraints = sharding.constraints | read_constraints(request.constraints)
    options = {"constraints": constraints, "cost": request.cost, "objective": request.objective}
    changed = {
        "sharding": _changed(sharding, options),
        "data": _changed(config.data, {"stats": request.data_stats}),
        "train": _changed(config.train, {"batch_size": request.batch_size}),
        "seed": request.seed,
    }
    return _changed(config, changed)


def _changed(section: Section, options: Mapping[str, Any]) -> Section:
    """With those of `options` that are given."""
    given = {key: value for key, value in options.items() if value is not None}
    return section.model_copy(update=given)


def _refuse_unknown(request: PlanRequest) -> None:
    if request.cost:
        cost_model(request.cost, batch_size=1)  # a name, or a profile that can be read
    choose("--objective", request.objective or OBJECTIVES[0], OBJECTIVES)
    choose("--search, for a run config,", request.search or AUTO, [AUTO])
    for option in ("time_budget", "dense_bytes"):
        if getattr(request, option) is not None:
            raise RequestError(f"--{option.replace('_', '-')} is for table lists")


def _topology(config: RunConfig, request: PlanRequest) -> Topology:
    """As given; otherwise the workers of this machine, and its hardware where costs are asked."""
    if request.topology is not None:
        return parse_topology(request.topology)
    from shardemb.planning import run_hardware

    wants_costs = any((request.cost, request.objective, request.batch_size, request.verify))
    hardware = run_hardware(config) if wants_costs else None
    nproc = config.launch.nproc_per_node
    return Topology(world_size=nproc, local_world_size=nproc, hardware=hardware)


def _with_costs(plan: Plan, config: RunConfig) -> Plan:
    """Rules predict nothing, and a plan that was made before may predict it by another model."""
    sharding, batch_size = config.sharding, config.train.batch_size
    asked = (sharding.cost, sharding.objective, batch_size)
    if (plan.cost_model, plan.objective, plan.batch_size) == asked:
        return plan
    return predict(plan, cost_model(sharding.cost, batch_size), batch_size, sharding.objective)


def _verify(plan: Plan) -> Comparison:
    from launch.verify import verify

    return verify(plan)


SOURCES = Sources(read_file, plan_file, _verify)
