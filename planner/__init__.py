"""Decides how each embedding table is sharded. Imports neither torch nor torchrec nor ray."""

from planner.errors import PlannerError, RequestError, UserError
from planner.plan import DevicePlan, Plan, Predicted, Shard, TablePlan
from planner.rules import ShardingRule, plan_by_rule
from planner.tables import TableSpec
from planner.topology import Topology

__all__ = [
    "DevicePlan",
    "Plan",
    "PlannerError",
    "Predicted",
    "RequestError",
    "Shard",
    "ShardingRule",
    "TablePlan",
    "TableSpec",
    "Topology",
    "UserError",
    "plan_by_rule",
]
