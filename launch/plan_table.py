"""A plan as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from planner import Plan, TablePlan


def print_plan(plan: Plan) -> None:
    """Each table's sharding and ranks, then each rank's memory."""
    console = Console()
    tables = Table("table", "rows", "columns", "sharding", "kernel", "rank (rows x columns)")
    for name, table in plan.tables.items():
        size = (f"{table.num_embeddings:,}", str(table.embedding_dim))
        tables.add_row(name, *size, table.sharding_type, table.compute_kernel, _shards(table))
    console.print(tables)
    devices = Table("rank", "memory", *(["forward + backward"] if plan.predicted.step_ms else []))
    for device in plan.devices:
        cost = [] if device.total_ms is None else [f"{device.total_ms:.3f} ms"]
        devices.add_row(str(device.rank), f"{device.memory_bytes / 2**20:,.1f} MiB", *cost)
    console.print(devices)
    if plan.predicted.step_ms:
        console.print(f"predicted step: {plan.predicted.step_ms:.3f} ms in embedding tables")
    console.print(f"fingerprint {plan.fingerprint}")


def _shards(table: TablePlan) -> str:
    shown = [f"{s.rank} ({s.rows:,} x {s.columns})" for s in table.shards[:4]]
    return ", ".join(shown) + (f" ... {len(table.shards)} in all" if len(table.shards) > 4 else "")
