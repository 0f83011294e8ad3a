"""What the kernels cannot train, told before they try. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from planner import Plan, PlannerError, TableSpec


def refuse_unsupported(plan: Plan, tables: Iterable[TableSpec], device_type: str | None) -> None:
    """Raise PlannerError for the first table that cannot be trained as planned.

    `device_type` is "cpu", "cuda", or None where it is not known yet.
    """
    for table in tables:
        planned = plan.tables[table.name]
        replicated = planned.sharding_type == "data_parallel"
        if replicated and table.dtype != "fp32" and table.optimizer != "sgd":
            raise PlannerError(
                f"table {table.name}: a data_parallel table in {table.dtype} would keep the state "
                f"of {table.optimizer} in {table.dtype}, not in fp32 as sharded tables do (in fp16 "
                "its eps is zero, and rows become NaN); use fp32 or another sharding type"
            )
        if device_type == "cpu" and table.dtype == "bf16":
            raise PlannerError(
                f"table {table.name}: FBGEMM has no bf16 kernels for CPU; use fp32 or fp16"
            )
        if device_type == "cpu" and planned.compute_kernel.startswith("fused_uvm"):
            raise PlannerError(
                f"table {table.name}: the plan's kernel {planned.compute_kernel} needs a GPU; "
                "make a plan for CPU devices"
            )
