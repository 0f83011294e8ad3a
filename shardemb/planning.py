"""The plan of a run config. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from planner import Plan, RequestError, ShardingRule, TableSpec, Topology, plan_by_rule
from planner.constraints import TableConstraint
from planner.data_stats import with_statistics
from planner.geometry import SHARDING_TYPES
from planner.hardware import PRESETS, Hardware, preset
from planner.request import cost_model, planner_for
from planner.topology import parse_topology
from shardemb.config import RunConfig


def tables_to_plan(config: RunConfig) -> list[TableSpec]:
    """The config's, with what `data.stats` says of them."""
    tables, stats = config.table_specs(), config.data.stats
    return list(with_statistics(tables, stats)) if stats else tables


def plan_run(config: RunConfig, topology: Topology) -> Plan:
    """The plan that the config names, or one by its rules, or the planner's."""
    tables, sharding = tables_to_plan(config), config.sharding
    if sharding.plan is not None:
        plan = Plan.load(sharding.plan)
        plan.check_fits(tables, topology)
        return plan
    if sharding.default is not None:
        return plan_by_rule(tables, topology, sharding.default, sharding.tables)
    if topology.hardware is None:
        topology = topology.model_copy(update={"hardware": run_hardware(config)})
    batch_size = config.train.batch_size
    model = cost_model(sharding.cost, batch_size, "sharding.cost")
    return planner_for(model)(
        tables,
        topology,
        model,
        batch_size,
        objective=sharding.objective,
        constraints=_constraints(config, tables),
        seed=config.seed,
    )


def run_hardware(config: RunConfig) -> Hardware:
    """What `sharding.hardware` names; RequestError where the GPU of this machine is unknown."""
    named = config.sharding.hardware
    if Path(named).suffix:
        hardware = parse_topology(named).hardware
        assert hardware is not None, "a topology file describes hardware"
        return hardware
    if named != "auto":
        return preset(named)
    gpu = None if config.launch.device == "cpu" else _first_gpu()
    if gpu is None:
        return preset("cpu")
    words = set(re.split(r"[^A-Z0-9]+", gpu))
    known = [kind for kind in PRESETS if words.issuperset(kind.upper().split("-"))]
    if not known:
        raise RequestError(
            f"sharding.hardware: this machine's GPU, {gpu}, is none that the planner knows; name "
            f"the nearest of {', '.join(PRESETS)}"
        )
    return preset(known[0])


def _first_gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    names = answer.stdout.split("\n") if answer.returncode == 0 else []
    return names[0].strip().upper() or None if names else None


def _constraints(config: RunConfig, tables: list[TableSpec]) -> dict[str, TableConstraint]:
    """The config's, its rules as constraints, and what the kernels cannot train."""
    constraints = dict(config.sharding.constraints)
    constraints |= {n: _as_constraint(n, rule) for n, rule in config.sharding.tables.items()}
    for table in tables:
        # A replicated table keeps its optimizer's state in its own dtype (see sharding/limits.py).
        if table.dtype != "fp32" and table.optimizer != "sgd" and table.name not in constraints:
            types = tuple(t for t in SHARDING_TYPES if t != "data_parallel")
            constraints[table.name] = TableConstraint(sharding_types=types)
    return constraints


def _as_constraint(name: str, rule: ShardingRule) -> TableConstraint:
    """The planner decides which shard is on which of the rule's ranks: they cost the same."""
    if rule.ranks and len(set(rule.ranks)) < len(rule.ranks):
        raise RequestError(
            f"sharding.tables.{name}.ranks: a rank is named twice, and the planner puts the shards "
            "of a table on different ranks; name each once, or choose a type as sharding.default"
        )
    return TableConstraint(
        sharding_types=(rule.sharding_type,), column_shards=rule.column_shards, ranks=rule.ranks
    )
