"""The plan of a run config. Imports no torch."""

from __future__ import annotations

from planner import Plan, Topology, plan_by_rule
from shardemb.config import RunConfig


def plan_run(config: RunConfig, topology: Topology) -> Plan:
    """The plan that the config names, or one by its rules; checked against tables and ranks."""
    tables = config.table_specs()
    if config.sharding.plan is None:
        return plan_by_rule(tables, topology, config.sharding.default, config.sharding.tables)
    plan = Plan.load(config.sharding.plan)
    plan.check_fits(tables, topology)
    return plan
