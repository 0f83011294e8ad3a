"""What the kernels cannot train, told before they try. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from planner import Plan, PlannerError, RequestError, TablePlan, TableSpec
from planner.geometry import COLUMN_MULTIPLE
from planner.options import UNPOOLED_TYPES
from shardemb.precision_config import CommunicationConfig


def refuse_unsupported(plan: Plan, tables: Iterable[TableSpec], device_type: str | None) -> None:
    """Raise PlannerError for the first table that cannot be trained as planned.

    `device_type` is "cpu", "cuda", or None where it is not known yet.
    """
    for table in tables:
        planned = plan.tables[table.name]
        problem = (
            _type_problem(table, planned, device_type)
            or _dtype_problem(table, planned, device_type)
            or _kernel_problem(planned, device_type)
        )
        if problem:
            raise PlannerError(f"table {table.name}: {problem}")


def refuse_unsendable(communication: CommunicationConfig, device_type: str | None) -> None:
    """Raise RequestError where the backend of `device_type` cannot send what is asked for."""
    for way in ("forward", "backward"):
        if getattr(communication, way) == "bf16" and device_type == "cpu":
            raise RequestError(
                f"train.communication.{way}: TorchRec does not send bf16 over gloo, which CPUs "
                "use; choose fp16 or fp32"
            )


def _type_problem(table: TableSpec, planned: TablePlan, device_type: str | None) -> str | None:
    if table.pooled:
        return None
    if planned.sharding_type not in UNPOOLED_TYPES:
        return (
            f"TorchRec cannot shard an EmbeddingCollection {planned.sharding_type}; "
            "shard it table_wise, row_wise or column_wise"
        )
    if planned.sharding_type == "data_parallel" and device_type == "cpu":
        return (
            "TorchRec cannot train a data_parallel EmbeddingCollection on CPU; "
            "shard it table_wise, row_wise or column_wise"
        )
    return None


def _dtype_problem(table: TableSpec, planned: TablePlan, device_type: str | None) -> str | None:
    replicated = planned.sharding_type == "data_parallel"
    if replicated and table.dtype != "fp32" and table.optimizer != "sgd":
        return (
            f"a data_parallel table in {table.dtype} would keep the state of {table.optimizer} in "
            f"{table.dtype}, not in fp32 as sharded tables do (in fp16 its eps is zero, and rows "
            "become NaN); use fp32 or another sharding type"
        )
    if table.dtype == "bf16" and device_type == "cpu":
        return "FBGEMM has no bf16 kernels for CPU; use fp32 or fp16"
    if table.dtype == "bf16" and not replicated:
        # Its kernel asks for a cache in the table's dtype, cached or not, and has none in bf16.
        return "FBGEMM 1.8 cannot train sharded bf16 tables; use fp32 or fp16"
    return None


def _kernel_problem(planned: TablePlan, device_type: str | None) -> str | None:
    replicated = planned.sharding_type == "data_parallel"
    kernel = planned.compute_kernel
    if replicated != (kernel == "dense"):
        return (
            f"a {planned.sharding_type} table cannot be trained with the kernel {kernel}: dense "
            "is the one for data_parallel tables, and for them alone"
        )
    if device_type == "cpu" and kernel in ("fused_uvm", "fused_uvm_caching"):
        return f"the plan's kernel {kernel} needs a GPU; make a plan for CPU devices"
    narrow = [s.columns for s in planned.shards if s.columns % COLUMN_MULTIPLE]
    if narrow and not replicated:
        return (
            f"FBGEMM's kernels take rows of a multiple of {COLUMN_MULTIPLE} columns, not of "
            f"{narrow[0]}; change embedding_dim, or make the table data_parallel"
        )
    return None
